"""The loops that integrate: fixed steps; adaptive steps, decided by host, device or sample; reversible steps."""
