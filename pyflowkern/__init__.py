"""Fused kernels, layers and complete normalizing flows for PyTorch."""

from pyflowkern import flows, interop, nn, ode, ops, transport
from pyflowkern._library import show_config, use_reference
from pyflowkern._memory import keep_memory
from pyflowkern._version import __version__
from pyflowkern.interop import accelerate, restore

__all__ = [
    "__version__",
    "accelerate",
    "flows",
    "interop",
    "keep_memory",
    "nn",
    "ode",
    "ops",
    "restore",
    "show_config",
    "transport",
    "use_reference",
]
