"""Cases that time whole flows and solves."""
