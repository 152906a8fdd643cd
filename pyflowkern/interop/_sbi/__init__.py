"""How the fields of sbi's flow matching and score estimators run."""
