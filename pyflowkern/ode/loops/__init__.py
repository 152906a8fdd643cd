"""The loops that integrate: fixed steps, adaptive steps, steps for each sample, steps decided on the device, pairs."""
