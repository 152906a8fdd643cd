"""``python -m bench.spline_accuracy``: the accuracy of rational-quadratic splines in float32, against float64.

Measured are the largest error of the output, the largest residual of the inverse (both in units of
eps bound (1 + slope), eps = 2^-23), and the largest and the root-mean-square error of the log-derivative.  Inputs are
uniform in [-4, 4] and include the ends of the interval and their neighbours; raw parameters are N(0, s^2).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyflowkern import ops

__all__ = ["main"]

Spline = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
EPS, BOUND, BATCH = 2.0**-23, 3.0, 200_000


def ours(parameterization: ops.spline_map.Parameterization) -> Spline:
    smap = ops.SplineMap(bound=BOUND, parameterization=parameterization)
    return lambda x, p, inverse: ops.spline(x, p, smap, inverse=inverse, elementwise=True)


def peers() -> dict[str, tuple[Spline, Spline]]:
    """Return each spline with the one that serves as its exact result in float64."""
    smap = ops.SplineMap(bound=BOUND)
    softmax, softclip = ours("softmax"), ours("softclip")
    found = {"ours": (softmax, softmax), "ours (softclip)": (softclip, softclip)}
    try:
        from nflows.transforms.splines import unconstrained_rational_quadratic_spline as nflows

        def run_nflows(x: Tensor, p: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
            y, terms = nflows(x, *smap.split(p), inverse=inverse, tail_bound=BOUND)
            return y, terms

        found["nflows"] = run_nflows, softmax
    except ImportError:
        pass
    try:
        from zuko.transforms import MonotonicRQSTransform

        def run_zuko(x: Tensor, p: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
            transform = MonotonicRQSTransform(*smap.split(p), bound=BOUND)
            if inverse:
                back = transform.inv(x)
                return back, -transform.log_abs_det_jacobian(back, x)
            y, terms = transform.call_and_ladj(x)
            return y, terms

        found["zuko"] = run_zuko, softclip
    except ImportError:
        pass
    return found


def draw(generator: torch.Generator, size: float) -> tuple[Tensor, Tensor]:
    ends = torch.tensor([-BOUND, BOUND])
    ends = torch.cat([ends, *(torch.nextafter(ends, torch.full((2,), v)) for v in (-9, 0, 9))])
    x = 8 * torch.rand(BATCH, generator=generator) - 4
    x[: len(ends)] = ends
    params = ops.SplineMap().params
    return x, size * torch.randn(BATCH, params, generator=generator)


def errors(run: Spline, exact: Spline, size: float, draws: int) -> list[float]:
    """Return forward error, inverse residual, and log-derivative errors: largest, root mean square."""
    generator = torch.Generator().manual_seed(int(size))
    forward = residual = largest = squares = 0.0
    batches = math.ceil(draws / BATCH)
    for _ in range(batches):
        x, p = draw(generator, size)
        y, terms = run(x, p, False)
        want, log_slope = exact(x.double(), p.double(), False)
        forward = max(forward, _worst((y - want) / (EPS * BOUND * (1 + log_slope.exp()))))
        wrong = (terms - log_slope).abs()
        largest, squares = max(largest, _worst(wrong)), squares + float(wrong.square().mean())
        back, _ = run(x, p, True)
        again, log_slope = exact(back.double(), p.double(), False)
        residual = max(residual, _worst((again - x) / (EPS * BOUND * (1 + log_slope.exp()))))
    return [forward, residual, largest, math.sqrt(squares / batches)]


def _worst(t: Tensor) -> float:
    return float(t.abs().nan_to_num(math.inf).max())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.spline_accuracy", description=__doc__)
    parser.add_argument("--draws", type=int, default=10_000_000)
    parser.add_argument("--peer-draws", type=int, default=200_000)
    arguments = parser.parse_args()
    print("| spline | s | draws | forward | inverse | log f' | log f' (rms) |")
    print("|---|---|---|---|---|---|---|")
    for name, (run, exact) in peers().items():
        draws = arguments.draws if name.startswith("ours") else arguments.peer_draws
        for size in (1.0, 5.0, 20.0, 100.0):
            try:
                cells = [f"{v:.3g}" for v in errors(run, exact, size, draws)]
            except (AssertionError, RuntimeError, IndexError) as error:
                cells = [type(error).__name__] * 4
            print(f"| {name} | {size:g} | {draws} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
