"""What ops, solvers, layers and flows share: registration, checks of arguments, dtypes, second derivatives."""
