"""A Schrödinger bridge between two classes of images: handwritten threes become eights.

    python examples/digits_bridge.py            # a minute; writes digits_bridge.md, .json and .png

The digits are scikit-learn's, 8x8, with grey levels from -1 to 1.  Of all processes that lead from the threes to the
eights a bridge is the one that changes the least, so that a slanted three becomes a slanted eight.  Paths begin in 45
threes that were held out, and their ends are compared with 45 eights that were held out.  Columns of the table:

* called 8: the share that a support vector machine, trained on the real digits, takes for an eight;
* W2: the 2-Wasserstein distance from the held-out eights;
* change: the root of the mean squared distance of an end from its start;
* neighbours: that of an end from the nearest training eight; zero for memorised ones.

"any training eights" is the independent coupling: real eights, in no relation to the threes.  "independent pairs" is
trained on that coupling.  What it learns, the mean velocity of all pairs whose paths cross at a point, is a process
that changes much less than its pairs do, almost as little as the bridge.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from common import fit, options, plt, save
from torch import Tensor

from pyflowkern import nn, transport

HELD_OUT = 45  # of each class
COUPLINGS = ("bridge", "independent pairs")
COLUMNS = ("called 8", "W2", "change", "neighbours")
STEPS = 40  # of a path


class Digits(NamedTuple):
    """Training and held-out images ``[N, 1, 8, 8]``, and what tells whether images are eights."""

    threes: Tensor
    eights: Tensor
    held_threes: Tensor
    held_eights: Tensor
    is_eight: Callable[[Tensor], Tensor]


def digits() -> Digits:
    """Split the threes and eights, and train a classifier on all images that are not held out."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    images = (images / 8 - 1).float()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    rows = {k: (labels == k).nonzero().flatten() for k in (3, 8)}
    held = torch.cat([r[:HELD_OUT] for r in rows.values()])
    known = torch.ones(len(images), dtype=torch.bool).index_fill_(0, held, False)
    classifier = SVC().fit(images[known].numpy(), labels[known].numpy())

    def is_eight(x: Tensor) -> Tensor:
        return torch.from_numpy(classifier.predict(x.flatten(1).numpy()) == 8)

    parts = [images[rows[k][HELD_OUT:]] for k in (3, 8)]
    parts += [images[rows[k][:HELD_OUT]] for k in (3, 8)]
    return Digits(*(part.view(-1, 1, 8, 8) for part in parts), is_eight)


def learned(
    data: Digits, coupling: str, seed: int, args: argparse.Namespace
) -> transport.SchrodingerBridge:
    """Return a bridge trained on pairs of one plan between all training images, or on independent ones."""
    torch.manual_seed(seed)
    bridge = transport.SchrodingerBridge(
        (1, 8, 8),
        sigma=args.sigma,
        plan="given",
        network=lambda channels: nn.VectorFieldUNet(channels, args.widths),
    )
    x0, x1 = data.threes, data.eights
    plan = transport.sinkhorn(x0.flatten(1), x1.flatten(1), epsilon=2 * args.sigma**2).plan

    def batch() -> tuple[Tensor, Tensor]:
        if coupling == "bridge":
            i, j = plan.pairs(args.batch)
        else:
            i, j = (torch.randint(len(x), (args.batch,)) for x in (x0, x1))
        return x0[i], x1[j]

    fit(lambda: bridge.loss(*batch()), bridge.parameters(), args.steps, args.lr, say=coupling)
    return bridge.eval()


def measure(data: Digits, starts: Tensor, ends: Tensor) -> dict[str, float]:
    """Return the numbers of a row."""
    nearest = torch.cdist(ends.flatten(1), data.eights.flatten(1)).amin(1)
    return {
        "called 8": float(data.is_eight(ends).float().mean()),
        "W2": transport.wasserstein(ends, data.held_eights),
        "change": float((ends - starts).flatten(1).square().sum(1).mean().sqrt()),
        "neighbours": float(nearest.square().mean().sqrt()),
    }


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Return the table: means over seeds, and their spread where there is more than one."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, found in results.items():
        cells = []
        for column in COLUMNS:
            values = [f[column] for f in found]
            text = f"{statistics.mean(values):.2f}"
            cells.append(text + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(paths: dict[str, Tensor], path: Path, shown: int = 12) -> None:
    """Draw images on the way, a row for each time, and below them the ends of independent pairs."""
    bridge, independent = (paths[name][:, :shown, 0] for name in COUPLINGS)
    rows = [(f"t = {k / 4:g}", bridge[k * STEPS // 4]) for k in range(5)]
    rows.append(("independent", independent[-1]))
    figure, axes = plt.subplots(len(rows), 1, figsize=(0.55 * shown, 0.6 * len(rows)))
    for axis, (label, images) in zip(axes, rows, strict=True):
        strip = (
            torch.nn.functional.pad(images, (0, 1, 0, 0), value=-1.0).permute(1, 0, 2).flatten(1)
        )
        axis.imshow(strip[:, :-1].numpy(), cmap="gray_r", vmin=-1, vmax=1)
        axis.set(xticks=[], yticks=[], frame_on=False)
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Train on matched and on independent pairs; return the numbers, and write them with a picture."""
    parser = options(__doc__, "digits_bridge")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sigma", type=float, default=0.3)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32], help="of the U-Net")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.widths = 60, [8, 16]
    data = digits()
    starts = data.held_threes
    results = {
        "threes, left as they are": [measure(data, starts, starts)],
        "any training eights": [measure(data, starts, data.eights[:HELD_OUT])],
    }
    paths = {}
    for coupling in COUPLINGS:
        for seed in range(args.seed, args.seed + args.seeds):
            bridge = learned(data, coupling, seed, args)
            generator = torch.Generator().manual_seed(seed)
            paths[coupling] = bridge.sample(starts, STEPS, generator=generator)
            results.setdefault(coupling, []).append(measure(data, starts, paths[coupling][-1]))
    text = table(results)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "digits_bridge.md").write_text(text + "\n")
    (args.out / "digits_bridge.json").write_text(json.dumps(results, indent=1) + "\n")
    picture(paths, args.out / "digits_bridge.png")
    return results


if __name__ == "__main__":
    main()
