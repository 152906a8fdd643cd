"""Two separate modes: how much the base distribution matters.

A flow is continuous and cannot divide one normal into two separate modes: some mass stays between them.  With
a base of two Gaussians, learned with the flow, it does not need to.  The measure is the share of samples that
fall between the modes, where there are no data.

    python examples/two_modes.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from common import batches, density_picture, fit, options, plt, save
from torch import Tensor

from pyflowkern import flows

EXTENT = (-4.0, 4.0, -3.0, 3.0)


def draw(n: int) -> Tensor:
    """Draw from two arcs, left and right, with nothing between them."""
    side = torch.randint(0, 2, (n, 1)) * 2.0 - 1
    angle = (torch.rand(n, 1) - 0.5) * 2.4
    arc = torch.cat([side * (1.2 + angle.cos()), 1.2 * angle.sin()], 1)
    return arc + 0.1 * torch.randn(n, 2)


def mixture() -> flows.MixtureOfGaussians:
    return flows.MixtureOfGaussians(2, 2, means=torch.tensor([[-1.5, 0.0], [1.5, 0.0]]), scale=0.7)


@torch.no_grad()
def between(flow: flows.Flow, n: int = 20_000) -> float:
    """Return the share of samples in the gap, where the data have none."""
    return float((flow.sample(n)[:, 0].abs() < 0.8).float().mean())


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    parser = options(__doc__, "two_modes")
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args(argv)
    if args.quick:
        args.steps = 80
    torch.manual_seed(args.seed)
    train, test = draw(5000), draw(5000)
    kinds: dict[str, tuple[type[flows.Flow], dict[str, Any]]] = {
        "MAF": (flows.MAF, {"transforms": 3, "hidden": (64, 64)}),
        "NSF": (flows.NSF, {"transforms": 3, "hidden": (64, 64), "bound": 5.0}),
    }
    figure, axes = plt.subplots(1, 5, figsize=(15, 2.8))
    axes[0].plot(*train[:1500].T.numpy(), ".", markersize=1)
    axes[0].set(title="data", xlim=EXTENT[:2], ylim=EXTENT[2:], xticks=[], yticks=[])
    results: dict[str, tuple[float, float]] = {}
    places = iter(axes[1:])
    for kind, (build, arguments) in kinds.items():
        for base_name, base in (("one normal", None), ("a mixture", mixture())):
            name = f"{kind}, {base_name}"
            flow = build(2, base=base, **arguments)
            rows = batches(train, 256)
            fit(
                lambda flow=flow, rows=rows: -flow.log_prob(rows()).mean(),
                flow.parameters(),
                args.steps,
                5e-3,
            )
            with torch.no_grad():
                nats = float(flow.log_prob(test).mean())
            results[name] = nats, between(flow)
            title = f"{name}: {nats:.2f} nats, {results[name][1]:.1%} between"
            print(title)
            density_picture(next(places), flow.log_prob, EXTENT, title)
    save(figure, args.out / "two_modes.png")
    return results


if __name__ == "__main__":
    main()
