"""Checks of arguments: each raises an error that names the argument, what was wanted and what was given."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Collection, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from pyflowkern._library import FLOATS
from pyflowkern.core.dtypes import autocasts

__all__ = [
    "check_batched",
    "check_callable",
    "check_channels",
    "check_choice",
    "check_context",
    "check_count",
    "check_dense",
    "check_dtype",
    "check_dtype_of",
    "check_flag",
    "check_floating",
    "check_generator",
    "check_list",
    "check_number",
    "check_real",
    "check_same_device",
    "check_shape",
    "check_sizes",
    "is_integer",
    "takes_two",
]


def check_flag(name: str, value: bool) -> bool:
    """Return a flag as a bool; raise TypeError unless it is True or False, Python's or NumPy's.

    Whatever else is true or false (1, None, a tensor) is refused: kernels take flags as bits of one number, where a
    2 would be another flag.
    """
    if value is True or value is False:
        return value
    kind = type(value)
    if kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}")


def check_number(name: str, value: float) -> float:
    """Return a real number as a float; raise TypeError for bools, text, tensors and all else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit a float, got {value}") from None


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, Python's or NumPy's; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_count(name: str, value: int, least: int = 1) -> int:
    """Return a count as an int; raise TypeError unless it is an integer, ValueError below ``least``.

    A symbolic size, as torch.compile has them, stays what it is.
    """
    if isinstance(value, torch.SymInt):
        return value
    if type(value) is not int and not is_integer(value):  # the first test is the faster one
        traced = isinstance(value, Tensor) and torch.jit.is_tracing()
        hint = (
            ": torch.jit.trace makes sizes tensors, use torch.export in its place"
            if traced
            else ""
        )
        raise TypeError(f"{name} must be an int, got {type(value).__name__}{hint}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_callable(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {type(value).__name__}")


def check_generator(generator: torch.Generator | None) -> torch.device:
    """Return the device that a generator draws on, the CPU if there is none; raise TypeError for all else."""
    if generator is None:
        return torch.device("cpu")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    return generator.device


def check_choice(name: str, value: str, known: Collection[str]) -> str:
    """Return one of the ``known`` names; raise ValueError for any other value."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return value


def check_list(name: str, values: object) -> None:
    """Raise TypeError unless ``values`` is a list or the like: a tensor, though it has a length, is not."""
    if type(values) is list:
        return
    if isinstance(values, (Tensor, str, dict)) or not hasattr(values, "__getitem__"):
        raise TypeError(f"{name} must be a list, got {type(values).__name__}")


def check_sizes(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape as a tuple of ints from 0 on; raise TypeError or ValueError unless it is one."""
    check_list(name, shape)
    return tuple(check_count(f"{name}[{i}]", size, 0) for i, size in enumerate(shape))


def check_floating(name: str, t: Tensor) -> None:
    """Raise TypeError unless ``t`` is a dense tensor of a floating-point type that the ops compute with."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be a floating-point tensor of 16, 32 or 64 bits, got {t.dtype}"
        )
    if t.layout != torch.strided:
        check_dense(name, t)


def check_real(name: str, t: Tensor) -> None:
    """Raise TypeError for a complex tensor, of which a cast would drop a part with no more than a warning."""
    if t.is_complex():
        raise TypeError(f"{name} must be real, got {t.dtype}")


def check_dense(name: str, t: Tensor) -> None:
    """Raise TypeError for a sparse tensor."""
    if t.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {t.layout}")


def check_batched(name: str, t: Tensor, min_dim: int = 2) -> None:
    """Raise unless ``t`` is a floating tensor ``[N, C, *space]`` of at least ``min_dim`` axes."""
    check_floating(name, t)
    if t.dim() < min_dim:
        raise ValueError(
            f"{name} must have a batch axis, channels second, then space ([N, C, *space]), "
            f"got shape {tuple(t.shape)}"
        )


def check_channels(name: str, x: Tensor, channels: int) -> None:
    """Raise unless ``x`` is a floating tensor ``[N, channels, *space]``."""
    check_batched(name, x)
    if x.shape[1] != channels:
        raise ValueError(
            f"{name} must have {channels} channels on axis 1 ([N, C, *space]), "
            f"got shape {tuple(x.shape)}"
        )


def check_shape(name: str, t: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless ``t`` has exactly this shape."""
    if t.shape != shape and tuple(t.shape) != tuple(shape):  # a list differs from all shapes
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")


def check_context(context: Tensor | None, features: int, x: Tensor) -> None:
    """Raise unless the context is a floating tensor ``[N, features]``, or None for a field that takes none."""
    if context is not None:
        check_floating("context", context)
    if context is None and not features:
        return
    if context is None or not features or tuple(context.shape) != (x.shape[0], features):
        want = f"have shape ({x.shape[0]}, {features})" if features else "be None"
        got = None if context is None else tuple(context.shape)
        raise ValueError(f"context must {want}, got {got}")


def check_dtype(name: str, t: Tensor, want: torch.dtype, whose: str) -> None:
    """Raise TypeError unless ``t`` has the dtype of the parameters, or autocast converts it."""
    if t.dtype == want or (autocasts(t) and torch.float64 not in (t.dtype, want)):
        return
    raise TypeError(
        f"{name} must have the {whose}'s dtype {want}, got {t.dtype}; "
        f"convert one of them, as by {whose}.to({name}.dtype)"
    )


def check_dtype_of(name: str, t: Tensor, layer: torch.nn.Module) -> None:
    """Call :func:`check_dtype` with the dtype of a network's first parameter, if it has one."""
    known = next(layer.parameters(), None)  # None where the user's own layer has no parameters
    if known is not None and known.is_floating_point():
        check_dtype(name, t, known.dtype, "network")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors lie on one device."""
    device = None
    for t in tensors.values():
        if t is None:
            continue
        if device is None:
            device = t.device
        elif t.device != device:
            devices = {name: t.device for name, t in tensors.items() if t is not None}
            raise ValueError(f"all tensors must be on one device, got {devices}")


def takes_two(function: Callable[..., object]) -> bool:
    """Whether a function can be called with two arguments; True where its signature is not known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(None, None)
    except TypeError:
        return False
    return True
