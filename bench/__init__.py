"""Measurements, and checks of kernels that need no GPU: ``python -m bench --help``."""

import os

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
"""oneDNN keeps 1,024 compiled products for a process. In a benchmark a dozen variants share them, and would push out
one another's where in training each would have them alone. Read at the first product, so set before there is one."""
