"""Moons to eight Gaussians in four ways: optimal transport, rectified flow before and after a reflow, a bridge.

    python examples/moons_to_gaussians.py                  # ten minutes; a picture, and a row for each method
    python examples/moons_to_gaussians.py --pairs moons-gaussians normal-gaussians normal-moons --seeds 5  # all

All four learn from points of the same interpolation, x_t = (1 - t) x_0 + t x_1 + sigma sqrt(t (1 - t)) z.  They differ
in who is paired with whom, and in sigma:

    OT-CFM   pairs of the optimal plan, sigma = 0                deterministic, straight
    I-CFM    independent pairs, sigma = 0                        deterministic, bent
    reflow   where I-CFM takes a point is its partner, sigma = 0 deterministic, straightened
    [SF]2M   pairs of the entropic plan, sigma = 1               stochastic, the Schrödinger bridge

The table has the 2-Wasserstein distance of 10,000 points that were moved in 100 Euler steps from 10,000 points of the
target, measured as Tong et al. (2024) do: 10,000 training points of each end, 20,000 steps of AdamW with batches of
512, rate 1e-3 and weight decay 1e-5, 3 x 64 hidden units.  Ours differ in that units are SiLU (theirs SELU), the norm
of a gradient is at most 5, and one plan pairs all training points (theirs the 512 of a batch).  "averaged" is the same
run with the exponential moving average of the weights (decay 0.999).  "floor" is the distance of two samples of the
target, "unmoved" that of the ends, of 1,000 points.  Whatever is done is kept in --out, and is not done again.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import fit, options, plt, save
from PIL import Image
from torch import Tensor

from pyflowkern import nn, ode, transport

#: Given points ``[N, 2]`` and a count of steps, returns where they are after each step, ``[steps + 1, N, 2]``.
Walk = Callable[[Tensor, int], Tensor]
METHODS = ("OT-CFM", "I-CFM", "reflow", "[SF]2M")
TITLES = {
    "OT-CFM": "OT-CFM: deterministic",
    "I-CFM": "rectified flow, first round",
    "reflow": "after one reflow: straightened",
    "[SF]2M": "Schrödinger bridge: stochastic",
}
#: Tong et al. 2024, "Simulation-free Schrödinger bridges", table 2; there [SF]2M has the exact plan of a batch.
PUBLISHED = {
    "moons-gaussians": {"OT-CFM": (0.601, 0.027), "I-CFM": (1.557, 0.407), "[SF]2M": (0.726, 0.137)},
    "normal-gaussians": {"OT-CFM": (0.303, 0.043), "I-CFM": (0.373, 0.103), "[SF]2M": (0.275, 0.058)},
    "normal-moons": {"OT-CFM": (0.130, 0.016), "I-CFM": (0.178, 0.014), "[SF]2M": (0.124, 0.023)},
}  # fmt: skip
DRAWN = 20  # steps of the paths in the picture


# --- the points ---------------------------------------------------------------------------------------


def moons(n: int) -> Tensor:
    """Draw two half circles of radius 3, as the papers do: equal angles, moved along the diagonal by up to 0.6."""
    first, second = (torch.linspace(0, math.pi, k) for k in (n // 2, n - n // 2))
    upper = torch.stack((first.cos(), first.sin()), 1)
    lower = torch.stack((1 - second.cos(), 0.5 - second.sin()), 1)
    return 3 * (torch.cat((upper, lower)) + 0.2 * torch.rand(n, 1)) - 1


def gaussians(n: int) -> Tensor:
    """Draw from eight Gaussians on a circle of radius 5, whose variance is sqrt(0.1) in each direction."""
    angle = torch.randint(8, (n,)) * (math.pi / 4)
    return 5 * torch.stack((angle.cos(), angle.sin()), 1) + 0.1**0.25 * torch.randn(n, 2)


def normal(n: int) -> Tensor:
    """Draw from the standard normal distribution."""
    return torch.randn(n, 2)


ENDS = {"moons": moons, "gaussians": gaussians, "normal": normal}


def ends_of(pair: str, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw points of both ends of "source-target"."""
    torch.manual_seed(seed)
    source, target = (ENDS[name](n) for name in pair.split("-"))
    return source, target


# --- who is paired with whom --------------------------------------------------------------------------


def independent(x0: Tensor, x1: Tensor, size: int) -> Iterator[Any]:
    """Yield batches of pairs that have nothing to do with each other."""
    while True:
        yield tuple(x[torch.randint(len(x), (size,))] for x in (x0, x1))


def in_rows(x0: Tensor, x1: Tensor, size: int) -> Iterator[Any]:
    """Yield batches of the rows of both."""
    while True:
        rows = torch.randint(len(x0), (size,))
        yield x0[rows], x1[rows]


# --- training -----------------------------------------------------------------------------------------


def averaged_fit(
    model: torch.nn.Module, loss: Callable[[], Tensor], args: argparse.Namespace
) -> torch.nn.Module:
    """Train as published; return a copy of the model with the moving average of its weights."""
    average = copy.deepcopy(model)
    weights = [[p.detach() for p in m.parameters()] for m in (average, model)]
    steps = itertools.count()

    def averaging() -> Tensor:
        step = next(steps)
        torch._foreach_lerp_(*weights, max(1e-3, 9 / (10 + step)))
        return loss()

    fit(averaging, model.parameters(), args.steps, args.lr, 1e-5, cosine=False)
    return average


def flow(pairs: Iterator[Any], args: argparse.Namespace) -> list[Walk]:
    """Learn the velocity of straight paths; return walks along it, with the last weights and averaged ones."""
    field = nn.VectorFieldMLP(2, (64, 64, 64), "silu", "concat")
    matcher = transport.RectifiedFlow()

    def loss() -> Tensor:
        t, xt, ut = matcher.sample_location_and_conditional_flow(*next(pairs))
        return (field(t, xt) - ut).square().mean()

    def walk_of(velocity: Callable[[Tensor, Tensor], Tensor]) -> Walk:
        @torch.no_grad()
        def walk(x: Tensor, steps: int) -> Tensor:
            times = [k / steps for k in range(steps + 1)]
            return ode.solve(velocity, x, times, method="euler", step_size=1 / steps).ys

        return walk

    return [walk_of(m) for m in (field, averaged_fit(field, loss, args))]


def bridge(pairs: Iterator[Any], args: argparse.Namespace) -> list[Walk]:
    """Learn a Schrödinger bridge; return walks of its SDE, with the last weights and averaged ones."""
    size = (64, 64, 64)
    model = transport.SchrodingerBridge(2, sigma=args.sigma, hidden=size, plan="given")
    average = averaged_fit(model, lambda: model.loss(*next(pairs)), args)
    return [model.sample, average.sample]


def learned(
    method: str, x0: Tensor, x1: Tensor, args: argparse.Namespace, first: Walk | None
) -> list[Walk]:
    """Train a method on the given points; ``first`` is what I-CFM has learned, for a reflow."""
    if method == "I-CFM":
        return flow(independent(x0, x1, args.batch), args)
    if method == "reflow":
        return flow(in_rows(x0, first(x0, 100)[-1], args.batch), args)
    epsilon = 0.02 if method == "OT-CFM" else 2 * args.sigma**2
    plan = transport.sinkhorn(x0, x1, epsilon=epsilon, tolerance=1e-3).plan
    i, j = plan.pairs(32 * len(x0))  # so many that every point is there about as often
    return (flow if method == "OT-CFM" else bridge)(in_rows(x0[i], x1[j], args.batch), args)


# --- results ------------------------------------------------------------------------------------------


def bend(path: Tensor) -> float:
    """Return how much longer paths ``[steps + 1, N, 2]`` are than the lines between their ends, on average."""
    length = path.diff(dim=0).norm(dim=-1).sum()
    return float(length / (path[-1] - path[0]).norm(dim=-1).sum()) - 1


class Results:
    """The runs so far, in a file that is written after each."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path = folder / "moons_to_gaussians.json"
        self.settings = settings
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            self.rows = json.loads(self.path.read_text())

    def of(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the runs with these properties, and the present settings."""
        wanted = {**wanted, **self.settings}
        return [r for r in self.rows if all(r.get(k) == v for k, v in wanted.items())]

    def add(self, **row: Any) -> None:
        """Add a run."""
        self.rows.append({**row, **self.settings})
        self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        """Write the file and its table, and print the run that is new."""
        self.path.write_text(json.dumps(self.rows, indent=0) + "\n")
        self.path.with_suffix(".md").write_text(self.table() + "\n")
        cells = (f"{k} {v:.3f}" for k, v in row.items() if isinstance(v, float))
        print(row["pair"], row["method"], "seed", row["seed"], *cells, flush=True)

    def table(self) -> str:
        """Return means over seeds, their spread and, unless it is 5, how many there are."""
        pairs = list(PUBLISHED)
        lines = [f"| W2 | {' | '.join(pairs)} |", "|---" * (len(pairs) + 1) + "|"]
        for method in ("unmoved", "floor", *METHODS):
            for key, name in (("w2", method), ("averaged", f"{method}, averaged")):
                runs = [self.of(pair=pair, method=method) for pair in pairs]
                found = [[r[key] for r in some if key in r] for some in runs]
                if any(found):
                    lines.append(f"| {name} | {' | '.join(map(spread, found))} |")
            if any(method in PUBLISHED[pair] for pair in pairs):
                cells = ("{:.3f} ± {:.3f}".format(*PUBLISHED[pair][method]) for pair in pairs)
                lines.append(f"| {method}, published | {' | '.join(cells)} |")
        return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation (count)."""
    if len(values) < 2:
        return f"{values[0]:.3f} (1)" if values else ""
    count = "" if len(values) == 5 else f" ({len(values)})"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}{count}"


def train(pair: str, seed: int, results: Results, args: argparse.Namespace) -> None:
    """Train the methods that are wanted, and keep where they take the points of the test."""
    x0, x1 = ends_of(pair, args.points, seed)
    test0, test1 = ends_of(pair, args.test, 1000 + seed)
    first: Walk | None = None
    for method in args.methods:
        if results.of(pair=pair, seed=seed, method=method):
            continue
        if method == "reflow" and first is None:
            torch.manual_seed(seed)
            first = learned("I-CFM", x0, x1, args, None)[0]
        torch.manual_seed(seed)
        begin = time.process_time()
        walks = learned(method, x0, x1, args, first)
        seconds = time.process_time() - begin
        first = walks[0] if method == "I-CFM" else first
        last, averaged = (walk(test0, 100) for walk in walks)
        kept = {"w2": last[-1].clone(), "averaged": averaged[-1].clone()}
        torch.save(kept, args.kept / f"{pair} {method} {seed}.pt")
        if pair == args.pairs[0] and seed == args.seed:
            some = torch.randperm(len(test0))[:120]
            drawn = averaged[:: 100 // DRAWN, some].clone()
            torch.save((drawn, test1[:1000].clone()), args.kept / f"{method}.pt")
        results.add(pair=pair, method=method, seed=seed, bend=bend(last), seconds=seconds)


def measure(pair: str, seed: int, key: str, results: Results, args: argparse.Namespace) -> None:
    """Measure the distances that are missing: those of the "averaged" weights, or ("w2") of the last and others."""
    test1 = ends_of(pair, args.test, 1000 + seed)[1]
    if key == "w2" and not results.of(pair=pair, seed=seed, method="floor"):
        again = ends_of(pair, args.test, 2000 + seed)[1]
        few = ends_of(pair, min(args.test, 1000), 2000 + seed)
        for name, ends in (("unmoved", few), ("floor", (again, test1))):
            distance = transport.wasserstein(*ends)
            results.add(pair=pair, method=name, seed=seed, w2=distance)
    for method in args.methods:
        for row in results.of(pair=pair, seed=seed, method=method):
            if key not in row:
                points = torch.load(args.kept / f"{pair} {method} {seed}.pt")[key]
                row[key] = transport.wasserstein(points, test1)
                results.write(row)


def picture(args: argparse.Namespace) -> None:
    """Draw paths of the methods side by side."""
    names = [name for name in METHODS if (args.kept / f"{name}.pt").exists()]
    figure, axes = plt.subplots(1, len(names), figsize=(2.9 * len(names), 3.1), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        paths, target = torch.load(args.kept / f"{name}.pt")
        axis.plot(*target.T.numpy(), ".", color="#bbbbbb", markersize=1.5)
        axis.plot(*paths.permute(2, 0, 1).numpy(), color="#5577bb", linewidth=0.5)
        axis.plot(*paths[0].T.numpy(), ".", color="black", markersize=2)
        axis.plot(*paths[-1].T.numpy(), ".", color="#cc4433", markersize=2)
        axis.set_title(TITLES[name], fontsize=9)
        axis.set(xlim=(-7, 7), ylim=(-7, 7), xticks=[], yticks=[], aspect="equal")
    path = args.out / "moons_to_gaussians.png"
    save(figure, path)
    with Image.open(path) as full:
        full.convert("RGB").quantize(32).save(path, optimize=True)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run what has no result yet; return the means of the distances of the first pair by method."""
    parser = options(__doc__, "moons_to_gaussians")
    parser.add_argument("--pairs", nargs="+", default=["moons-gaussians"], choices=list(PUBLISHED))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
    parser.add_argument("--steps", type=int, default=20_000, help="training steps of each run")
    parser.add_argument("--points", type=int, default=10_000, help="of each end, to train")
    parser.add_argument("--test", type=int, default=10_000, help="points that are compared")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sigma", type=float, default=1.0, help="of the bridge")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.points, args.test, args.batch, args.lr = 250, 2000, 500, 128, 5e-3
    args.out.mkdir(parents=True, exist_ok=True)
    settings = ("steps", "points", "test", "batch", "lr", "sigma")
    results = Results(args.out, {k: getattr(args, k) for k in settings})
    args.kept = args.out / "-".join(str(getattr(args, k)) for k in settings)  # where paths end
    args.kept.mkdir(exist_ok=True)
    runs = [(p, s) for s in range(args.seed, args.seed + args.seeds) for p in args.pairs]
    for pair, seed in runs:
        train(pair, seed, results, args)
    for key in ("w2", "averaged"):
        for pair, seed in runs:
            measure(pair, seed, key, results, args)
    print(results.table())
    picture(args)
    of_first = {
        m: results.of(pair=args.pairs[0], method=m) for m in ("unmoved", "floor", *METHODS)
    }
    return {m: statistics.mean(r["w2"] for r in rows) for m, rows in of_first.items() if rows}


if __name__ == "__main__":
    main()
