"""Splines: rational-quadratic ones beside nflows and zuko, and the other kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench._case import Case, Inputs, Lazy, Outputs, Provider, nbytes, random_inputs
from pyflowkern import ops

# --- floors --------------------------------------------------------------------------------------


def backward_bytes(i: Inputs, o: Outputs) -> int:
    """Read the inputs and the gradients of the outputs; write the gradients of the inputs."""
    return 2 * nbytes(*i.values()) + nbytes(*o)


# --- peers ---------------------------------------------------------------------------------------


def nflows_spline(smap: ops.SplineMap) -> Callable[[Inputs], Provider]:
    def build(_: Inputs) -> Provider:
        from nflows.transforms.splines import unconstrained_rational_quadratic_spline

        def run(x: Tensor, params: Tensor, inverse: bool = False) -> Any:
            y, terms = unconstrained_rational_quadratic_spline(
                x, *smap.split(params), inverse=inverse, tail_bound=smap.bound
            )
            return y, terms.sum(1)

        return run

    return build


def zuko_spline(smap: ops.SplineMap, compiled: bool = False) -> Callable[[Inputs], Provider]:
    def build(_: Inputs) -> Provider:
        from zuko.transforms import MonotonicRQSTransform

        def run(x: Tensor, params: Tensor, inverse: bool = False) -> Any:
            transform = MonotonicRQSTransform(*smap.split(params), bound=smap.bound)
            if inverse:
                back = transform.inv(x)
                return back, -transform.log_abs_det_jacobian(back, x).sum(1)
            y, terms = transform.call_and_ladj(x)
            return y, terms.sum(1)

        return torch.compile(run, dynamic=False) if compiled else run

    return build


# --- cases ---------------------------------------------------------------------------------------


def spline(name: str, x: Sequence[int], smap: ops.SplineMap, **case: Any) -> Case:
    """Return a case of ``spline(x, params, smap)``."""
    peers: dict[str, Lazy] = case.pop("peers", {})
    return Case(
        name=name,
        make_inputs=random_inputs(x=x, params=(*x, smap.params)),
        providers={
            "eager": partial(ops.spline_reference, spline_map=smap),
            "ours": partial(ops.spline, spline_map=smap),
            **peers,
        },
        backward_bytes=backward_bytes,
        **case,
    )


def coupling(name: str, x: Sequence[int], moved: int, smap: ops.SplineMap, **case: Any) -> Case:
    """Return a case of ``spline_coupling(x, params, smap)``."""
    params = (x[0], moved * smap.params, *x[2:])
    return Case(
        name=name,
        make_inputs=random_inputs(x=x, params=params),
        providers={
            "eager": partial(ops.spline_coupling_reference, spline_map=smap),
            "ours": partial(ops.spline_coupling, spline_map=smap),
        },
        backward_bytes=backward_bytes,
        **case,
    )


RQ = ops.SplineMap(bins=8)
ZUKO = ops.SplineMap(bins=8, parameterization="softclip")
CASES = [
    spline(
        "rq 4096x32 K=8",
        (4096, 32),
        RQ,
        # zuko makes another spline of the same parameters: it is timed here and compared in a case of its own below
        peers={
            "nflows": Lazy(nflows_spline(RQ)),
            "zuko": Lazy(zuko_spline(RQ), comparable=False),
            "zuko compile": Lazy(zuko_spline(RQ, compiled=True), comparable=False),
        },
        targets={
            "forward vs zuko": 15.0,
            "forward vs zuko compile": 5.0,
            "forward+backward vs zuko": 10.0,
            "forward+backward vs zuko compile": 5.0,
            "forward vs nflows": 25.0,
        },
    ),
    spline(
        "rq softclip 4096x32 K=8",
        (4096, 32),
        ZUKO,
        peers={"zuko": Lazy(zuko_spline(ZUKO))},
        extra=True,
    ),
    spline("rq 64x10 K=8", (64, 10), RQ, peers={"nflows": Lazy(nflows_spline(RQ))}),
    coupling("coupling 4096x64 K=8", (4096, 64), 32, RQ, extra=True),
    coupling("coupling 16x12x32x32 K=4", (16, 12, 32, 32), 6, ops.SplineMap(bins=4), extra=True),
    spline("rq circular 4096x32 K=8", (4096, 32), ops.SplineMap(tails="circular"), extra=True),
    spline("rq 4096x32 K=16", (4096, 32), ops.SplineMap(bins=16), extra=True),
    spline("linear 4096x32 K=8", (4096, 32), ops.SplineMap("linear"), extra=True),
    spline("quadratic 4096x32 K=8", (4096, 32), ops.SplineMap("quadratic"), extra=True),
    spline("cubic 4096x32 K=8", (4096, 32), ops.SplineMap("cubic"), extra=True),
    spline("bf16 rq 4096x32 K=8", (4096, 32), RQ, dtype=torch.bfloat16, extra=True),
    spline("fp64 rq 4096x32 K=8", (4096, 32), RQ, dtype=torch.float64, extra=True),
]
