"""Schrödinger bridges between two Gaussians, learned from samples and compared with the closed form.

    python examples/gaussian_bridge.py                        # some minutes; writes gaussian_bridge.png
    python examples/gaussian_bridge.py --dims 5 20 50 --seeds 5  # the table, an hour on one core

The ends are N(-0.1, I) and N(0.1, I) with volatility 1, of which 10,000 points each are given (De Bortoli et al. 2021,
Shi et al. 2023).  Between them all is Gaussian: paths that begin at time 1 and run backward must reach mean -0.1,
variance 1 and a covariance of both ends of (sqrt(5) - 1) / 2 = 0.618034 in every dimension.  KL compares the Gaussian
that fits 50,000 forward paths with the closed form: at time 1, and on average over all times of the sampler.  The row
"exact" has the drift of the closed form and the same sampler: what is left there is due to steps and samples.

The plan of "sf2m" is that of the given points: in 50 dimensions 10,000 of them have no near partners, and its
covariance is 0.47 only.  The process that is learned from it comes closer, as after an iteration of Markovian fitting.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from common import fit, options, plt, save
from torch import Tensor

from pyflowkern import transport

METHODS = ("sf2m", "dsbm_imf", "dsbm_ipf", "dsb")
COLUMNS = ("mean", "variance", "covariance", "kl_end", "kl_mean", "seconds")
GOLDEN = (math.sqrt(5) - 1) / 2


class Exact(transport.SchrodingerBridge):
    """The bridge with the drifts of the closed form, not learned."""

    def __init__(self, oracle: transport.GaussianBridge) -> None:
        super().__init__(len(oracle.mean0), hidden=(1,))
        self.oracle = oracle

    def drift(self, t: Tensor | float, x: Tensor, *, backward: bool = False) -> Tensor:
        return (self.oracle.backward_drift if backward else self.oracle.drift)(t, x)


def oracle_of(d: int) -> transport.GaussianBridge:
    """Return the closed form."""
    one = torch.eye(d)
    return transport.gaussian_bridge(-one.sum(0) / 10, one, one.sum(0) / 10, one, sigma=1.0)


def batches_of(method: str, x0: Tensor, x1: Tensor, size: int) -> Callable[[], tuple[Tensor, ...]]:
    """Return what draws a batch: of pairs of one plan between all points for "sf2m", else of points."""
    if method != "sf2m":
        return lambda: tuple(x[torch.randint(len(x), (size,))] for x in (x0, x1))
    plan = transport.sinkhorn(x0, x1, epsilon=2.0, tolerance=1e-2).plan
    i, j = plan.pairs(4 * len(x0))

    def pairs() -> tuple[Tensor, ...]:
        k = torch.randint(len(i), (size,))
        return x0[i[k]], x1[j[k]]

    return pairs


def learned(method: str, d: int, seed: int, args: object) -> transport.SchrodingerBridge:
    """Return a trained bridge."""
    torch.manual_seed(seed)
    x0, x1 = (torch.randn(args.points, d) + m for m in (-0.1, 0.1))
    bridge = transport.SchrodingerBridge(
        d,
        method=method,
        hidden=(args.width, args.width),
        steps=20,
        plan="given" if method == "sf2m" else None,
        iteration_calls=-(-args.steps // args.iterations),
        pool=16_384 if method == "dsb" else 4096,
    )
    batch = batches_of(method, x0, x1, args.batch)
    fit(lambda: bridge.loss(*batch()), bridge.parameters(), args.steps, args.lr)
    return bridge.eval()


def kl(paths: Tensor, mean: Tensor, cov: Tensor) -> float:
    """Return KL from the Gaussian that fits samples ``[N, d]`` to another."""
    x = paths.double()
    ratio = torch.linalg.solve(cov, x.T.cov())
    off = x.mean(0) - mean
    total = ratio.trace() - len(mean) - torch.logdet(ratio) + off @ torch.linalg.solve(cov, off)
    return float(total) / 2


def measure(bridge: transport.SchrodingerBridge, d: int, samples: int) -> dict[str, float]:
    """Return the numbers of a row."""
    oracle = oracle_of(d)
    generator = torch.Generator().manual_seed(1234)
    x0, x1 = (torch.randn(samples, d, generator=generator) + m for m in (-0.1, 0.1))
    back = bridge.sample(x1, 20, backward=True, generator=generator)[-1]
    run = bridge.sample(x0, 20, generator=generator)
    kls = [kl(x, *oracle.marginal(k / 20)) for k, x in enumerate(run)]
    centred = (back - back.mean(0)) * (x1 - x1.mean(0))
    return {
        "mean": float(back.mean()),
        "variance": float(back.var(0).mean()),
        "covariance": float(centred.mean()),
        "kl_end": kls[-1],
        "kl_mean": statistics.mean(kls),
    }


def row(name: str, d: int, found: list[dict[str, float]]) -> str:
    """Return a line of the table: means over seeds, and their spread where there is more than one."""
    cells = []
    for column in COLUMNS:
        values = [f[column] for f in found]
        text = f"{statistics.mean(values):.4f}" if column != "seconds" else f"{values[0]:.0f}"
        if len(values) > 1 and column != "seconds":
            text += f" ± {statistics.stdev(values):.4f}"
        cells.append(text)
    return f"| {d} | {name} | " + " | ".join(cells) + " |"


def picture(results: dict[int, dict[str, list[dict[str, float]]]], path: object) -> None:
    """Draw covariance and KL by method."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    for axis, column in zip(axes, ("covariance", "kl_mean"), strict=True):
        for d, rows in results.items():
            names = list(rows)
            values = [statistics.mean(f[column] for f in rows[n]) for n in names]
            axis.plot(names, values, "o-", markersize=4, label=f"d = {d}")
        axis.set_title({"covariance": "covariance of both ends", "kl_mean": "mean KL"}[column])
        axis.tick_params(axis="x", rotation=30)
    axes[0].axhline(GOLDEN, color="black", linewidth=0.8, label="closed form")
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=7)
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> dict[int, dict[str, list[dict[str, float]]]]:
    """Train every method in every dimension; return the numbers, and write them with a picture."""
    parser = options(__doc__, "gaussian_bridge")
    parser.add_argument("--dims", type=int, nargs="+", default=[5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
    parser.add_argument("--steps", type=int, default=10_000, help="training steps in all")
    parser.add_argument("--iterations", type=int, default=10, help="of the methods that have any")
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.points, args.samples, args.width = 300, 1000, 5000, 32
        args.iterations, args.lr = 4, 5e-3
    head = f"| d | method | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 2)}"
    lines, results = [head], {}
    print(head, flush=True)
    for d in args.dims:
        rows = results[d] = {"exact": [measure(Exact(oracle_of(d)), d, args.samples)]}
        rows["exact"][0]["seconds"] = 0.0
        for method in ("exact", *args.methods):
            for seed in range(args.seed, args.seed + args.seeds) if method != "exact" else ():
                begin = time.monotonic()
                bridge = learned(method, d, seed, args)
                seconds = time.monotonic() - begin
                found = measure(bridge, d, args.samples) | {"seconds": seconds}
                rows.setdefault(method, []).append(found)
            lines.append(row(method, d, rows[method]))
            print(lines[-1], flush=True)
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "gaussian_bridge.md").write_text("\n".join(lines) + "\n")
            (args.out / "gaussian_bridge.json").write_text(json.dumps(results, indent=1))
    picture(results, args.out / "gaussian_bridge.png")
    return results


if __name__ == "__main__":
    main()
