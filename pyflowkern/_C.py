"""What the libraries were built from, and the integers that cross from Python to C++, as C++ says them.

``csrc/bindings.cpp`` is compiled into a library of its own, which knows neither torch nor Python: one wheel serves
every Python, and the facts can be read where no kernel may be loaded.
"""

import ctypes
import json
from typing import Any

from pyflowkern._library import built

__all__ = ["build_info", "codes", "limits"]

_NAME = "libpyflowkern_facts.so"
_path = next(built(_NAME), None)
if _path is None:
    raise ImportError(f"{_NAME} was not built or not installed")


def _read(function: str) -> Any:
    call = getattr(ctypes.CDLL(str(_path)), function)
    call.restype = ctypes.c_char_p
    return json.loads(call())


def build_info() -> dict[str, str]:
    """Return version, compiler, SIMD levels and CUDA architectures of this build."""
    facts: dict[str, str] = _read("pyflowkern_build_info")
    return facts


def codes() -> dict[str, dict[str, int]]:
    """Return the enumerations that cross from Python to C++, by name."""
    enumerations: dict[str, dict[str, int]] = _read("pyflowkern_codes")
    return enumerations


def limits() -> dict[str, int]:
    """Return the sizes up to which kernels take an argument, by name."""
    sizes: dict[str, int] = _read("pyflowkern_limits")
    return sizes
