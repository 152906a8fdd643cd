"""Models of other libraries, made faster in place, and functions with their signatures."""

from pyflowkern.interop._accelerate import accelerate, restore
from pyflowkern.interop._report import Entry, Report

__all__ = ["Entry", "Report", "accelerate", "restore"]
