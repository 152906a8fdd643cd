"""Single cells of the mouse embryo: a stage that no method has seen, predicted from the other stages.

    # some minutes; writes single_cells.md and single_cells.png
    python examples/single_cells.py --data guo_norm.rda --seeds 5 --growth 1

The data are 48 genes of 428 cells from embryos of 2, 4, 8, 16, 32 and 64 cells (Guo et al. 2010), which Debian has in
the package r-bioc-destiny and Bioconductor in destiny:

    apt-get download r-bioc-destiny && dpkg-deb -x r-bioc-destiny_*.deb destiny && pip install rdata
    # the file is destiny/usr/lib/R/site-library/destiny/data/guo_norm.rda

--data also takes a .csv file: a header, then a row for each cell, the size of its embryo first.  Without --data a
synthetic branching process with as many cells is used, whose results mean nothing.

Each doubling counts as a unit of time.  A method is given all stages but one, moves the cells of the stage before to
the time of the one held out, and is scored by W1, the exact 1-Wasserstein distance from the cells that were held out:
the protocol of TrajectoryNet (Tong et al. 2020) and of the papers on flow matching.  "Interpolated" are points halfway
between paired cells of the stages before and after, the displacement interpolation if pairs are optimal.  The
volatility of the bridge was chosen without the 16-cell stage, by holding out one of the others as well.  Training is
short, as twice as many steps were worse there, too.

With --growth plans may draw on some cells more than on others, as if they had more descendants; the penalty on that is
given in units of the squared distance.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import fit, options, plt, save
from scipy import sparse
from scipy.optimize import linprog
from torch import Tensor

from pyflowkern import nn, ode, transport

COUNTS = (19, 23, 43, 75, 109, 159)  # cells of each stage
GENES = 48
COMPONENTS = 5


# --- data -----------------------------------------------------------------------------------------


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the expression of the genes ``[cells, genes]`` and the stage of each cell, 0 in embryos of 2 cells.

    Raises:
        ValueError: for cells of other stages than those of 2 to 64 cells, or a stage without any.
    """
    if path.suffix == ".csv":
        table = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
        sizes, values = table[:, 0], table[:, 1:]
    else:
        import rdata

        with warnings.catch_warnings():  # of R classes that stay as they are in the file
            warnings.simplefilter("ignore", UserWarning)
            found = rdata.read_rda(path)["guo_norm"]
        values = found.assayData["exprs"].values.T
        sizes = found.phenoData.data["num_cells"].to_numpy(float)
    stages = np.log2(sizes) - 1
    if set(stages) != set(range(len(COUNTS))):
        raise ValueError(f"{path} must have cells of embryos of 2, 4, 8, 16, 32 and 64 cells")
    return values, stages.astype(int)


def synthetic(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return cells whose course bends, and that choose between two fates from the fourth stage on."""
    random = np.random.default_rng(seed)
    stages = np.repeat(np.arange(len(COUNTS)), COUNTS)
    fate = random.choice([-1.0, 1.0], len(stages))
    apart = np.clip(stages - 2, 0, None) / 3 * fate
    states = np.column_stack([stages - 2.5, 0.3 * (stages - 2.5) ** 2, 2 * apart])
    states = states + random.normal(0, 0.3, states.shape)
    values = states @ random.normal(size=(3, GENES)) + random.normal(0, 0.5, (len(stages), GENES))
    return values, stages


def snapshots(values: np.ndarray, stages: np.ndarray) -> list[Tensor]:
    """Return the cells of each stage as principal components of all cells, each of variance 1.

    So do the papers on such data; the components alone have seen the stage that is held out.
    """
    values = values - values.mean(0)
    left, _, right = np.linalg.svd(values, full_matrices=False)
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(1)])
    cells = (left * signs)[:, :COMPONENTS] * len(values) ** 0.5
    return [torch.tensor(cells[stages == k], dtype=torch.float32) for k in range(len(COUNTS))]


# --- plans ----------------------------------------------------------------------------------------


def best_plan(cost: Tensor, a: Tensor | None = None) -> Tensor:
    """Return the plan of least cost ``[n, m]``, for masses ``a`` (equal ones if None) and equal masses, exactly."""
    n, m = cost.shape
    a = torch.full((n,), 1 / n) if a is None else a
    rows = sparse.kron(sparse.eye(n), np.ones((1, m)))
    columns = sparse.kron(np.ones((1, n)), sparse.eye(m))
    masses = np.concatenate([a.double() / a.double().sum(), np.full(m, 1 / m)])
    constraints = sparse.vstack([rows, columns]).tocsr()
    found = linprog(cost.double().flatten().numpy(), A_eq=constraints, b_eq=masses, method="highs")
    if found.status != 0:
        raise RuntimeError(f"the linear program was not solved: {found.message}")
    return torch.from_numpy(found.x).view(n, m).clamp(min=0)


def w1(x: Tensor, a: Tensor | None, y: Tensor) -> float:
    """Return the 1-Wasserstein distance of points ``x`` with masses ``a`` from points ``y`` with equal masses."""
    cost = torch.cdist(x.double(), y.double())
    return float((best_plan(cost, a) * cost).sum())


def squared(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x.double(), y.double()).square()


class Task(NamedTuple):
    """What a method is given: the stages that are not held out, and the times at which they are."""

    times: tuple[float, ...]
    clouds: list[Tensor]
    held: int

    @property
    def before(self) -> Tensor:
        """The cells of the stage before the one that is held out."""
        return self.clouds[self.held - 1]

    @property
    def after(self) -> Tensor:
        """The cells of the stage after it."""
        return self.clouds[self.held]

    def plans(self, kind: str, sigma: float = 0.0, growth: float | None = None) -> list[Tensor]:
        """Return a plan between each stage and the next: "independent", "exact" or "entropic"."""
        found = []
        for k, (x, y) in enumerate(pairwise(self.clouds)):
            if kind == "independent":
                found.append(torch.full((len(x), len(y)), 1 / (len(x) * len(y))))
            elif kind == "exact":
                found.append(best_plan(squared(x, y)))
            else:
                epsilon = 2 * sigma**2 * (self.times[k + 1] - self.times[k])
                solution = transport.sinkhorn(
                    x, y, epsilon=epsilon, unbalanced=growth and (growth, None)
                )
                found.append(solution.plan.dense())
        return found


def lineages(task: Task, plans: list[Tensor], size: int) -> list[Tensor]:
    """Draw cells of the last stage and for each an ancestor of every stage before, by the plans."""
    j = torch.randint(len(task.clouds[-1]), (size,))
    line = [task.clouds[-1][j]]
    for x, plan in zip(reversed(task.clouds[:-1]), reversed(plans), strict=True):
        j = torch.multinomial(plan.T[j], 1)[:, 0]
        line.append(x[j])
    return line[::-1]


# --- methods --------------------------------------------------------------------------------------


def interpolated(task: Task, plan: Tensor, draws: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the points halfway between the pairs of a plan, and their masses; or of some pairs drawn from it."""
    i, j = (plan > 1e-12).nonzero().T
    masses = plan[i, j]
    if draws is not None:
        k = torch.multinomial(masses, draws, replacement=True)
        i, j, masses = i[k], j[k], torch.ones(draws)
    return (task.before[i] + task.after[j]) / 2, masses


def flow_matching(
    task: Task, plans: list[Tensor], seed: int, args: argparse.Namespace
) -> nn.VectorFieldMLP:
    """Return a velocity of all times, regressed on straight lines between cells of one stage and the next."""
    torch.manual_seed(seed)
    field = nn.VectorFieldMLP(COMPONENTS, (args.width, args.width), "silu", "concat")
    matcher = transport.ConditionalFlowMatcher(args.flow_sigma)

    def loss() -> Tensor:
        cells, parts = lineages(task, plans, args.batch), []
        for (start, end), (x0, x1) in zip(pairwise(task.times), pairwise(cells), strict=True):
            s, x, u = matcher.sample_location_and_conditional_flow(x0, x1)
            parts.append((start + (end - start) * s, x, u / (end - start)))
        t, x, u = map(torch.cat, zip(*parts, strict=True))
        return (field(t, x) - u).square().mean()

    fit(loss, field.parameters(), args.steps, args.lr)
    return field.eval()


def bridge(
    task: Task, plans: list[Tensor], seed: int, args: argparse.Namespace
) -> transport.SchrodingerBridge:
    """Return a bridge through all stages, trained on lineages that the plans give."""
    torch.manual_seed(seed)
    model = transport.SchrodingerBridge(
        COMPONENTS,
        sigma=args.sigma,
        times=task.times,
        plan="given",
        hidden=(args.width, args.width),
    )
    fit(
        lambda: model.loss(lineages(task, plans, args.batch)),
        model.parameters(),
        args.steps,
        args.lr,
    )
    return model.eval()


@torch.no_grad()
def pushed(velocity: Callable[[Any, Tensor], Tensor], task: Task) -> Tensor:
    """Return where an ODE takes the cells of the stage before."""
    times = [task.held - 1.0, float(task.held)]
    return ode.solve(velocity, task.before, times, rtol=1e-4, atol=1e-4).ys[-1]


def drawn(model: transport.SchrodingerBridge, task: Task, copies: int) -> Tensor:
    """Return where the SDE of a bridge takes ``copies`` of each cell of the stage before."""
    start = task.before.repeat(copies, 1)
    return model.sample(start, 20, start=task.held - 1, end=task.held)[-1]


def scores(
    task: Task, truth: Tensor, args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return W1 of every method, one value for each seed if it has any randomness; and the models of the last seed."""
    exact, independent = task.plans("exact"), task.plans("independent")
    entropic = task.plans("entropic", args.sigma)
    found = {
        "the stage before, copied": [w1(task.before, None, truth)],
        "the stage after, copied": [w1(task.after, None, truth)],
        "optimal pairs, interpolated": [w1(*interpolated(task, exact[task.held - 1]), truth)],
    }
    models: dict[str, Any] = {}

    def add(name: str, points: Tensor, masses: Tensor | None = None) -> None:
        found.setdefault(name, []).append(w1(points, masses, truth))

    for seed in range(args.seed, args.seed + args.seeds):
        torch.manual_seed(seed)
        pairs = interpolated(task, independent[task.held - 1], draws=500)
        add("independent pairs, interpolated", *pairs)
        for name, plans in (("independent pairs", independent), ("optimal pairs", exact)):
            field = models[f"flow matching, {name}"] = flow_matching(task, plans, seed, args)
            add(f"flow matching, {name}", pushed(field, task))
        for name, plans in (("[SF]2M, independent pairs", independent), ("[SF]2M", entropic)):
            model = models[name] = bridge(task, plans, seed, args)
            add(name, drawn(model, task, args.copies))
            add(f"{name}, probability flow", pushed(model.velocity, task))
        if args.growth is not None:
            plans = task.plans("entropic", args.sigma, args.growth)
            model = bridge(task, plans, seed, args)
            # halfway from masses that are all the same to those that have descendants
            masses = plans[task.held - 1].sum(1).sqrt()
            add("[SF]2M, growth", drawn(model, task, args.copies), masses.repeat(args.copies))
        print({name: round(values[-1], 3) for name, values in found.items()}, flush=True)
    return found, models


# --- results --------------------------------------------------------------------------------------


def table(results: dict[int, dict[str, list[float]]]) -> str:
    """Return the table: W1 for each stage that was held out, means over seeds and their standard deviations."""
    results = dict(sorted(results.items()))
    sizes = [f"{2 ** (held + 1)} cells" for held in results]
    lines = [
        f"| W1 of the held-out stage | {' | '.join(sizes)} |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for name in next(iter(results.values())):
        cells = []
        for found in results.values():
            values = found[name]
            text = f"{statistics.mean(values):.3f}"
            cells.append(text + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def clearest(clouds: list[Tensor]) -> list[int]:
    """Return the two components by which stages differ the most, in units of the variance of all cells."""
    means = torch.stack([cloud.mean(0) for cloud in clouds])
    return (means - means.mean(0)).square().mean(0).topk(2).indices.tolist()


@torch.no_grad()
def picture(task: Task, truth: Tensor, models: dict[str, Any], path: Path) -> None:
    """Draw the cells of all stages with the paths of two methods, and what they say of the stage held out."""
    figure, axes = plt.subplots(1, 3, figsize=(8.6, 2.9), sharex=True, sharey=True)
    field, model = models["flow matching, optimal pairs"], models["[SF]2M"]
    start, shown = task.clouds[0], clearest(task.clouds)
    times = torch.linspace(task.times[0], task.times[-1], 61).tolist()
    paths = {
        "OT-CFM": ode.solve(field, start, times, rtol=1e-4, atol=1e-4).ys,
        "[SF]2M": model.sample(start, 40),
    }
    colours = plt.get_cmap("viridis")

    def points(axis: plt.Axes, cells: Tensor, **style: Any) -> None:
        axis.scatter(*cells[:, shown].T.numpy(), **style)

    hollow = {"s": 14, "facecolors": "none", "edgecolors": "red", "linewidths": 0.6}
    for axis, (name, run) in zip(axes, paths.items(), strict=False):
        for time, cloud in zip(task.times, task.clouds, strict=True):
            colour = [colours(time / (len(COUNTS) - 1))]
            points(axis, cloud, s=8, c=colour, label=f"{2 ** int(time + 1)} cells")
        points(axis, truth, **hollow)
        axis.plot(*run[:, :, shown].permute(2, 0, 1).numpy(), "k", linewidth=0.5, alpha=0.6)
        axis.set_title(f"paths of {name} from the first stage", fontsize=9)
    axes[0].legend(fontsize=6)
    points(axes[2], truth, label=f"{2 ** (task.held + 1)} cells, held out", **hollow)
    points(axes[2], pushed(field, task), s=10, marker="x", label="OT-CFM")
    points(axes[2], drawn(model, task, 1), s=10, marker="+", label="[SF]2M")
    axes[2].legend(fontsize=6)
    axes[2].set_title("the stage held out, and predictions of it", fontsize=9)
    low, high = torch.cat([*task.clouds, truth])[:, shown].aminmax(dim=0)
    (left, bottom), (right, top) = (low - 0.5).tolist(), (high + 0.5).tolist()
    axes[0].set(xlim=(left, right), ylim=(bottom, top))
    for axis in axes:
        axis.set(xlabel=f"component {shown[0] + 1}", xticks=[], yticks=[])
    axes[0].set_ylabel(f"component {shown[1] + 1}")
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> dict[int, dict[str, list[float]]]:
    """Hold out each inner stage in turn; return W1 of every method, and write them with a picture."""
    parser = options(__doc__, "single_cells")
    parser.add_argument("--data", type=Path, help="guo_norm.rda, or a .csv file")
    parser.add_argument("--held", type=int, nargs="+", default=[1, 2, 3, 4], help="stages, from 0")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
    parser.add_argument("--steps", type=int, default=500, help="of training")
    parser.add_argument("--sigma", type=float, default=0.25, help="volatility of the bridge")
    parser.add_argument("--flow-sigma", type=float, default=0.1, help="noise of flow matching")
    parser.add_argument(
        "--growth", type=float, help="penalty of a plan in which cells may multiply"
    )
    parser.add_argument("--copies", type=int, default=3, help="paths of the bridge from each cell")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64, help="lineages")
    parser.add_argument("--lr", type=float, default=5e-3)
    args = parser.parse_args(argv)
    if args.quick:
        args.held, args.steps, args.copies = [4], 100, 1
    stages = snapshots(*(read(args.data) if args.data else synthetic()))
    results, shown = {}, args.held[-1] if 3 not in args.held else 3
    args.out.mkdir(parents=True, exist_ok=True)
    for held in args.held:
        kept = [k for k in range(len(stages)) if k != held]
        task = Task(tuple(map(float, kept)), [stages[k] for k in kept], held)
        results[held], models = scores(task, stages[held], args)
        (args.out / "single_cells.md").write_text(table(results) + "\n")
        (args.out / "single_cells.json").write_text(json.dumps(results, indent=1) + "\n")
        if held == shown:
            picture(task, stages[held], models, args.out / "single_cells.png")
    print(table(results))
    return results


if __name__ == "__main__":
    main()
