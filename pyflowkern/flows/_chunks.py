"""Calls with many rows, computed some rows at a time: memory is needed for those alone."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import repeat
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pyflowkern._library import observed
from pyflowkern.core.checks import check_count
from pyflowkern.flows._hints import has_statistics
from pyflowkern.nn import ActNorm, BatchNorm

__all__ = ["Array", "decode_in_chunks", "log_prob_in_chunks"]

#: A NumPy array of rows, such as a memory-mapped file.  NumPy is no dependency, so its name is not at hand.
Array: TypeAlias = Any
#: Gives a part of the rows when it is called, so that a file is read no sooner.
Part = Callable[[], Tensor | None]


class Chunked(Protocol):
    """What of a :class:`~pyflowkern.flows.Flow` is used here."""

    _anchor: Tensor

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Yield all modules."""

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the log-density ``[N]``."""

    def _check_data(self, name: str, x: Tensor) -> None: ...

    def _check_context(self, context: Tensor | None, n: int) -> Tensor | None: ...


def log_prob_in_chunks(
    flow: Chunked, x: Tensor | Array, context: Tensor | Array | None, chunk: int
) -> Tensor:
    """Return the log-density ``[N]``, on the device of ``x``, computed from ``chunk`` rows at a time.

    Raises:
        TypeError: for rows that are neither a tensor nor a NumPy array, or of another dtype, and for a ``chunk`` that
            is no int.
        ValueError: for another shape, a ``chunk`` below 1, and layers in training mode through which rows depend on
            each other.
    """
    chunk = check_count("chunk", chunk)
    _check_rows_independent(flow, inverse=False)
    flow._check_data("x", _outline("x", x, flow))
    n = int(x.shape[0])
    if _has_rows(context, n):
        flow._check_context(_outline("context", context, flow), n)  # they are read later
    else:
        context = flow._check_context(_read(context, flow) if _is_array(context) else context, n)
    home = x.device if isinstance(x, Tensor) else torch.device("cpu")

    def density(x: Tensor, context: Tensor | None) -> tuple[Tensor]:
        return (flow.log_prob(x, context).to(home),)

    parts = _parts(x, n, chunk, flow), _parts(context, n, chunk, flow)
    return _joined(density, n, flow._anchor, *parts)[0]


def decode_in_chunks(
    flow: Chunked,
    decode: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]],
    z: Tensor,
    context: Tensor | None,
    chunk: int,
) -> tuple[Tensor, ...]:
    """Return ``decode(z, context)``, computed from ``chunk`` rows at a time; ``context`` has a row for each or is None.

    Raises:
        TypeError: for a ``chunk`` that is no int.
        ValueError: for one below 1, and layers in training mode through which rows depend on each other.
    """
    chunk = check_count("chunk", chunk)
    _check_rows_independent(flow, inverse=True)
    n = z.shape[0]
    parts = _parts(z, n, chunk, flow), _parts(context, n, chunk, flow)
    return _joined(decode, n, flow._anchor, *parts)


def _joined(
    call: Callable[..., tuple[Tensor, ...]], n: int, at: Tensor, *rows: Iterable[Part]
) -> tuple[Tensor, ...]:
    """Return what ``call`` makes of the parts of each set of ``n`` rows, one after the other.

    Where gradients are recorded, the activations of a part are not kept but computed again in the backward pass, whose
    memory is then that of a part, too (Chen et al. 2016, *Training deep nets with sublinear memory cost*).

    Args:
        call: computes a part.
        n: how many rows there are.
        at: a tensor on the device that computes.
        *rows: what gives the parts.
    """

    def compute(*parts: Part) -> tuple[Tensor, ...]:
        return call(*(part() for part in parts))

    def on_device(at: Tensor, *parts: Part) -> tuple[Tensor, ...]:
        return compute(*parts)

    if observed():
        return tuple(map(torch.cat, zip(*map(compute, *rows), strict=True)))
    if torch.is_grad_enabled():
        # random numbers are drawn again from the generators of the devices that arguments lie on
        again = partial(checkpoint, on_device, at, use_reentrant=False)
        return tuple(map(torch.cat, zip(*map(again, *rows), strict=True)))
    whole: tuple[Tensor, ...] = ()
    begin = 0
    for parts in map(compute, *rows):  # written into the result, of which no second copy is made
        whole = whole or tuple(part.new_empty(n, *part.shape[1:]) for part in parts)
        for into, part in zip(whole, parts, strict=True):
            into[begin : begin + len(part)] = part
        begin += len(parts[0])
    return whole


def _parts(rows: Tensor | Array | None, n: int, chunk: int, flow: Chunked) -> Iterable[Part]:
    """Return what gives the rows ``chunk`` at a time; no rows give None as often as is asked."""
    if rows is None:
        return repeat(lambda: None)
    if isinstance(rows, Tensor):
        return [partial(part.to, flow._anchor.device) for part in rows.split(chunk)]
    begins = range(0, max(1, n), chunk)
    return [partial(_read, rows, flow, begin, begin + chunk) for begin in begins]


def _is_array(rows: Any) -> bool:
    return not isinstance(rows, Tensor) and type(rows).__module__.split(".")[0] == "numpy"


def _has_rows(context: Any, n: int) -> bool:
    """Whether a context is an array with numbers or a label for each row."""
    if not _is_array(context) or n == 1:
        return False
    by_rows = context.ndim == 2 or context.dtype.kind in "iu"
    return bool(by_rows and context.shape[:1] == (n,))


def _dtype_of(array: Array, flow: Chunked) -> torch.dtype:
    """Return the dtype that an array is read as: the flow's for floating-point numbers, integers keep theirs."""
    if array.dtype.kind == "f":
        return flow._anchor.dtype
    kept: torch.dtype | None = getattr(torch, array.dtype.name, None)
    if not isinstance(kept, torch.dtype):
        raise TypeError(f"an array of rows must hold real numbers, got {array.dtype}")
    return kept


def _outline(name: str, rows: Tensor | Array, flow: Chunked) -> Tensor:
    """Return a tensor without memory that has the shape and the dtype of the rows."""
    if isinstance(rows, Tensor):
        return rows
    if not _is_array(rows):
        raise TypeError(
            f"{name} must be a torch.Tensor, or with chunk also a NumPy array, got {type(rows).__name__}"
        )
    return torch.empty(tuple(rows.shape), dtype=_dtype_of(rows, flow), device="meta")


def _read(array: Array, flow: Chunked, begin: int | None = None, end: int | None = None) -> Tensor:
    """Copy an array, which may lie in a file, or some of its rows into a tensor on the flow's device."""
    import numpy as np

    array = array if begin is None else array[begin:end]
    native = np.array(array, dtype=array.dtype.newbyteorder("="))
    pages = getattr(array, "_mmap", None)  # of a file
    if isinstance(pages, mmap.mmap) and array.mode == "r":
        pages.madvise(mmap.MADV_DONTNEED)  # the file has them, so that the process need not
    return torch.from_numpy(native).to(flow._anchor.device, _dtype_of(array, flow))


def _check_rows_independent(flow: Chunked, *, inverse: bool) -> None:
    """Raise ValueError where a layer would take statistics of a part of the rows for those of all."""
    for name, layer in flow.named_modules():
        waits = (
            isinstance(layer, ActNorm)
            and layer.awaits_first_batch(inverse=inverse)
            and not has_statistics(layer)
        )
        if waits or _takes_moments(layer, inverse):
            how, remedy = "in training mode", "call flow.eval() first"
            if waits:
                remedy = "call the flow with a batch first"
            elif not layer.training:
                how, remedy = "without running statistics", "call the flow without chunk"
            raise ValueError(
                f"chunk needs rows that do not depend on each other, but {name}, a {type(layer).__name__} {how}, "
                f"takes its statistics from all rows of a call: {remedy}"
            )


def _takes_moments(layer: torch.nn.Module, inverse: bool) -> bool:
    if isinstance(layer, _BatchNorm):
        return layer.training or layer.running_mean is None
    # the inverse of our BatchNorm takes its running statistics in both modes
    return isinstance(layer, BatchNorm) and layer.training and not inverse
