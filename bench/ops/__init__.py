"""One file of cases for every op family, named like the family."""
