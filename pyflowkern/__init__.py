"""Fused kernels, layers and complete normalizing flows for PyTorch."""

from pyflowkern import flows, nn, ode, ops, transport
from pyflowkern._library import show_config, use_reference
from pyflowkern._memory import keep_memory
from pyflowkern._version import __version__

__all__ = [
    "__version__",
    "flows",
    "keep_memory",
    "nn",
    "ode",
    "ops",
    "show_config",
    "transport",
    "use_reference",
]
