"""Timing kernels on a GPU: an interface to the device, and timers written against it alone."""
