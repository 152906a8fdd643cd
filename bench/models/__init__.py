"""Cases that time a whole flow."""
