"""Entropic optimal transport: Sinkhorn's iteration.

A target that is missed: 512 problems in one call in a tenth of the time of 512 calls.  Both do the same work, and a
call takes 1.6 times as long as a core takes for its problem: one call can gain that, and the second core.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench._case import Case, Inputs, Lazy, Outputs, Provider, nbytes
from pyflowkern import ops

EPSILON = 0.05  # times the number of coordinates


# --- peers ---------------------------------------------------------------------------------------


def dense_sinkhorn(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, epsilon: float, iterations: int
) -> Outputs:
    """Iterate with the matrix of costs in memory, as it is written in a few lines of PyTorch."""
    cost = (
        (x[:, :, None] - y[:, None]).square().sum(-1)
        if x.shape[-1] < 8
        else torch.cdist(x, y).square()
    )
    a, b = a.to(x.dtype), b.to(x.dtype)
    f = torch.zeros_like(a)
    for _ in range(iterations):
        g = -epsilon * torch.logsumexp(a.log()[:, :, None] + (f[:, :, None] - cost) / epsilon, 1)
        f = -epsilon * torch.logsumexp(b.log()[:, None] + (g[:, None] - cost) / epsilon, 2)
    return f, g


def pot_sinkhorn(inputs: Inputs, epsilon: float, iterations: int, numpy: bool) -> Provider:
    """Python Optimal Transport in the logarithmic domain, on arrays in float64 or on the tensors in float32."""
    import ot

    def run(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Any:
        cost = torch.cdist(x[0], y[0]).square()
        given: Any = (a[0].to(x.dtype), b[0].to(x.dtype), cost)
        if numpy:
            given = (t.double().numpy() for t in given)
        options = {"numItermax": iterations, "stopThr": 0.0, "warn": False}
        return ot.sinkhorn(*given, epsilon, method="sinkhorn_log", **options)

    return run


def one_by_one(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, epsilon: float, iterations: int
) -> Outputs:
    """A call for each problem of the batch."""
    found = [
        ours(*(t[i : i + 1] for t in (x, y, a, b)), epsilon=epsilon, iterations=iterations)
        for i in range(x.shape[0])
    ]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def ours(x: Tensor, y: Tensor, a: Tensor, b: Tensor, epsilon: float, iterations: int) -> Outputs:
    out = ops.sinkhorn(x, y, a, b, epsilon=epsilon, max_iterations=iterations, tolerance=0.0)
    return out.f.to(x.dtype), out.g.to(x.dtype)


# --- cases ---------------------------------------------------------------------------------------


def _bytes(inputs: Inputs, outputs: Outputs) -> int:
    return nbytes(*inputs.values(), *outputs)


def clouds(problems: int, n: int, m: int, d: int) -> Any:
    """Return a ``make_inputs`` of two normal clouds with equal masses."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
        def points(count: int) -> Tensor:
            drawn = torch.randn(problems, count, d, generator=generator, device=device)
            return drawn.to(dtype)

        def mass(count: int) -> Tensor:
            return torch.full((problems, count), 1 / count, device=device, dtype=torch.float64)

        return {"x": points(n), "y": points(m), "a": mass(n), "b": mass(m)}

    return make


def sinkhorn(
    name: str,
    size: Sequence[int],
    iterations: int = 100,
    peers: bool = True,
    dense: bool = True,
    compiles: bool = True,
    **case: Any,
) -> Case:
    """Return a case of ``[problems, n, m, d]``; its flops are those of the products alone."""
    problems, n, m, d = size
    options = {"epsilon": EPSILON * d, "iterations": iterations}
    providers: dict[str, Any] = {"ours": partial(ours, **options)}
    providers["eager"] = partial(dense_sinkhorn, **options) if dense else providers["ours"]
    if problems > 1:
        providers["a call a problem"] = partial(one_by_one, **options)
    elif peers:
        for peer, numpy in (("POT", True), ("POT on tensors", False)):
            build = partial(pot_sinkhorn, **options, numpy=numpy)
            providers[peer] = Lazy(build, comparable=False)
    return Case(
        name=name,
        make_inputs=clouds(*size),
        providers=providers,
        passes=("forward",),
        forward_bytes=_bytes,
        flops=lambda _: 2.0 * iterations * problems * n * m * 2 * d,
        constants=("x", "y", "a", "b"),
        compiles=compiles and dense,
        **case,
    )


CASES = [
    sinkhorn(
        "1000 x 1000, d=2, 100 iterations",
        (1, 1000, 1000, 2),
        targets={
            "forward vs eager": 10.0,
            "forward vs compile": 4.0,
            "forward vs POT": 25.0,
        },
    ),
    sinkhorn(
        "1000 x 1000, d=64, 100 iterations", (1, 1000, 1000, 64), targets={"forward vs floor": 2.0}
    ),
    sinkhorn(
        "512 problems 64 x 64, d=2, 100 iterations",
        (512, 64, 64, 2),
        targets={"forward vs a call a problem": 10.0},
    ),
    sinkhorn(
        "50000 x 50000, d=2, 1 iteration",
        (1, 50000, 50000, 2),
        1,
        dense=False,
        peers=False,
        extra=True,
    ),
    sinkhorn(
        "10000 x 10000, d=64, 100 iterations",
        (1, 10_000, 10_000, 64),
        peers=False,
        compiles=False,  # the graph of all iterations takes longer than the rest
        targets={"forward vs eager": 1.0, "forward vs floor": 2.0},
        devices=("cuda",),
    ),
]
