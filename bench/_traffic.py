"""The memory traffic of the CUDA kernels, counted by running them on the host.

The library is that of tests/cuda_on_host, compiled so that every access of a kernel to a tensor is reported.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench._case import nbytes, outputs_of
from pyflowkern import ops

__all__ = ["CASES", "Traffic", "TrafficCase", "count", "dtypes", "measure"]

WIDTHS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class TrafficCase:
    """A call that must read every input and write every output once.

    Args:
        name: of the call.
        make: returns the inputs for a dtype; the first is what the function transforms.
        run: called with the inputs.
        backward: count only the backward of ``run``.
        half: also count in bfloat16.
    """

    name: str
    make: Callable[[torch.dtype], Sequence[Tensor]]
    run: Callable[..., Any]
    backward: bool = False
    half: bool = True


@dataclass
class Traffic:
    """Traffic of the inputs and outputs: bytes requested by width of access, bytes moved, and the least possible."""

    name: str
    dtype: torch.dtype
    requested: dict[int, int]
    moved: int
    floor: int

    @property
    def scalar_share(self) -> float:
        """The share of the requested bytes in accesses of less than 8 bytes."""
        wide = self.requested[8] + self.requested[16]
        return 1 - wide / max(1, sum(self.requested.values()))


def _normal(*shapes: Sequence[int]) -> Callable[[torch.dtype], list[Tensor]]:
    return lambda dtype: [torch.randn(tuple(shape)).to(dtype) for shape in shapes]


def _channels_last(shape: Sequence[int], *others: Sequence[int]) -> Callable[..., list[Tensor]]:
    def make(dtype: torch.dtype) -> list[Tensor]:
        first, *rest = _normal(shape, *others)(dtype)
        return [first.contiguous(memory_format=torch.channels_last), *rest]

    return make


def _actnorm_parameters(make: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    def with_parameters(dtype: torch.dtype) -> list[Tensor]:
        x = make(dtype)[0]
        return [x, 0.1 * torch.randn(x.shape[1]), torch.randn(x.shape[1])]

    return with_parameters


def _glow(dtype: torch.dtype) -> list[Tensor]:
    c = 24
    weight = torch.eye(c) + 0.3 / c**0.5 * torch.randn(c, c)
    return [
        torch.randn(IMAGE).to(dtype),
        0.1 * torch.randn(c),
        torch.randn(c),
        weight,
        torch.tensor(0.5),
    ]


IMAGE = (8, 24, 16, 16)
SPLINE = ops.SplineMap()


def _spline(x: Tensor, params: Tensor) -> Any:
    return ops.spline(x, params, SPLINE)


def _layer(p: Tensor, bias: Tensor, gate: Tensor | None = None) -> Tensor:
    return ops.field_layer(p, bias, gate, tangents=1)


CASES = [
    TrafficCase("affine coupling", _normal(IMAGE, IMAGE), ops.affine_coupling),
    TrafficCase("affine coupling", _normal(IMAGE, IMAGE), ops.affine_coupling, backward=True),
    TrafficCase("affine", _normal(IMAGE, IMAGE, IMAGE), ops.affine),
    TrafficCase("affine", _normal(IMAGE, IMAGE, IMAGE), ops.affine, backward=True),
    TrafficCase("actnorm", _actnorm_parameters(_normal(IMAGE)), ops.actnorm),
    TrafficCase("actnorm", _actnorm_parameters(_normal(IMAGE)), ops.actnorm, backward=True),
    TrafficCase("actnorm channels_last", _actnorm_parameters(_channels_last(IMAGE)), ops.actnorm),
    TrafficCase(
        "actnorm channels_last",
        _actnorm_parameters(_channels_last(IMAGE)),
        ops.actnorm,
        backward=True,
    ),
    TrafficCase("spline", _normal((8, 64), (8, 64, SPLINE.params)), _spline),
    TrafficCase("spline", _normal((8, 64), (8, 64, SPLINE.params)), _spline, backward=True),
    TrafficCase("channel moments", _normal(IMAGE), ops.channel_moments),
    TrafficCase("glow step", _glow, ops.glow_step),
    TrafficCase("glow step", _glow, ops.glow_step, backward=True),
    TrafficCase("normal_log_prob conditional", _normal(*[IMAGE] * 3), ops.normal_log_prob),
    TrafficCase(
        "normal_log_prob conditional", _normal(*[IMAGE] * 3), ops.normal_log_prob, backward=True
    ),
    TrafficCase("normal_log_prob", _normal(IMAGE, IMAGE[1:], IMAGE[1:]), ops.normal_log_prob),
    TrafficCase(
        "normal_log_prob",
        _normal(IMAGE, IMAGE[1:], IMAGE[1:]),
        ops.normal_log_prob,
        backward=True,
    ),
    TrafficCase("field layer", _normal(IMAGE, (24,)), _layer, half=False),
    TrafficCase("field layer", _normal(IMAGE, (24,)), _layer, backward=True, half=False),
    TrafficCase("field layer gated", _normal(IMAGE, (24,), (24,)), _layer, half=False),
    TrafficCase(
        "field layer gated", _normal(IMAGE, (24,), (24,)), _layer, backward=True, half=False
    ),
    TrafficCase("field layer channels_last", _channels_last(IMAGE, (24,)), _layer, half=False),
    TrafficCase(
        "field layer map", _normal(IMAGE, (1, *IMAGE[1:])), _layer, backward=True, half=False
    ),
    TrafficCase("logit", lambda dtype: [torch.rand(IMAGE).to(dtype)], ops.logit),
    TrafficCase("logit", lambda dtype: [torch.rand(IMAGE).to(dtype)], ops.logit, backward=True),
    TrafficCase(
        "dequantize + logit",
        lambda _: [torch.randint(0, 256, IMAGE, dtype=torch.uint8)],
        lambda x: ops.dequantize(x, alpha=0.05, seed=1),
        half=False,
    ),
    TrafficCase(
        "euler_maruyama",
        _normal(IMAGE, IMAGE),
        lambda x, u: ops.euler_maruyama(x, u, 0.1, 1.0, seed=1),
        half=False,
    ),
    TrafficCase(
        "rk_combine",
        _normal(IMAGE, (IMAGE[0], *IMAGE)),
        lambda y, slopes: ops.rk_combine(y, slopes, [0.1] * IMAGE[0], 0.3),
        half=False,
    ),
    TrafficCase(
        "rk_error",
        _normal(IMAGE, IMAGE, (IMAGE[0], *IMAGE)),
        lambda *t: ops.rk_error(*t, [0.1] * IMAGE[0], 0.3, rtol=0.1, atol=0.1),
        half=False,
    ),
]


def _library() -> ctypes.CDLL:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import on_host

    return ctypes.CDLL(str(on_host.build("count")))


def count(case: TrafficCase, dtype: torch.dtype) -> Traffic:
    """Run one case on the host and return the traffic of its inputs and outputs, without parameters and scratch."""
    library = _library()
    import on_host

    with on_host.kernels(Path(library._name)):
        inputs = [
            t.requires_grad_(case.backward and t.is_floating_point()) for t in case.make(dtype)
        ]
        _counted(library)
        _watch(library, inputs)
        results = outputs = outputs_of(case.run(*inputs))
        read: Sequence[Tensor] = inputs
        if case.backward:
            upstream = [torch.randn_like(t) for t in outputs]
            read = [*inputs, *upstream]
            _counted(library)
            _watch(library, read)
            wanted = [t for t in inputs if t.requires_grad]
            results = torch.autograd.grad(outputs, wanted, upstream)
        regions = _counted(library)
    data = {
        t.data_ptr(): nbytes(t) for t in (*read, *results) if t.dim() and t.shape[0] == IMAGE[0]
    }
    data = {pointer: size for pointer, size in data.items() if size > 4 * IMAGE[0]}  # no [N]
    found = [r for r in regions if r[0] in data]
    requested = {w: sum(r[2 + i] + r[7 + i] for r in found) for i, w in enumerate(WIDTHS)}
    touched = [r for r in found if sum(r[2:12])]
    floor = sum(data[r[0]] for r in touched)
    return Traffic(_name(case), dtype, requested, sum(r[12] + r[13] for r in touched), floor)


def _watch(library: ctypes.CDLL, tensors: Sequence[Tensor]) -> None:
    for t in tensors:
        library.pfk_watch(ctypes.c_void_p(t.data_ptr()), ctypes.c_int64(nbytes(t)))


def _counted(library: ctypes.CDLL) -> list[list[int]]:
    """Return address, bytes, loads and stores by width, and sectors loaded and stored, of each region."""
    found = (ctypes.c_int64 * 14 * 64)()
    library.pfk_counted.restype = ctypes.c_int64
    number = library.pfk_counted(found, ctypes.c_int64(64))
    return [list(row) for row in found[:number]]


def _name(case: TrafficCase) -> str:
    return f"{case.name} {'backward' if case.backward else 'forward'}"


def dtypes(case: TrafficCase) -> tuple[torch.dtype, ...]:
    """Return the dtypes to count a case in."""
    return (torch.float32, torch.bfloat16) if case.half else (torch.float32,)


def measure() -> list[Traffic]:
    """Count every case in each of its dtypes."""
    return [count(case, dtype) for case in CASES for dtype in dtypes(case)]
