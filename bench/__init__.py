"""Measurements, and checks of kernels that need no GPU: ``python -m bench --help``."""
