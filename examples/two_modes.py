"""Two separate modes: how much the base distribution matters, and what one normal asks of the Jacobian.

A flow is continuous and cannot divide one normal into two separate modes: some mass stays between them.  With
a base of two Gaussians, learned with the flow, it does not need to.  The measure is the share of samples that
fall between the modes, where there are no data.

The lower row shows why: log |det dz/dx| over the plane.  One normal has much mass in its middle, which a flow must
squeeze into the empty gap or spread over the modes: between the modes a step in x must cross hardly any latent mass,
beside them much, so that the determinant varies by orders of magnitude.  "range" is the difference between its
largest and its smallest logarithm on the line from mode to mode, in nats.  Splines reach a dozen; affine layers do not,
and leave a bridge, unless the base has two modes of its own.

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


def line(n: int = 400) -> Tensor:
    """Return points of the line from mode to mode."""
    return torch.stack((torch.linspace(-2.2, 2.2, n), torch.zeros(n)), 1)


@torch.no_grad()
def volume_picture(ax: plt.Axes, flow: flows.Flow, n: int = 150) -> float:
    """Show log |det dz/dx| over the plane; return its range on the line from mode to mode."""
    x, y = torch.linspace(*EXTENT[:2], n), torch.linspace(*EXTENT[2:], n)
    values = flow(torch.cartesian_prod(x, y))[1].view(n, n)
    shown = ax.imshow(
        values.T.numpy(), origin="lower", extent=EXTENT, cmap="RdBu_r", vmin=-6, vmax=6
    )
    plt.colorbar(shown, ax=ax, fraction=0.035, pad=0.02)
    ax.set(xticks=[], yticks=[])
    course = flow(line())[1]
    return float(course.max() - course.min())


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[float, float, float]]:
    """Train four flows; return held-out nats, share between the modes and range of the log-determinant."""
    parser = options(__doc__, "two_modes")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args(argv)
    if args.quick:
        args.steps = 80
    torch.manual_seed(args.seed)
    train, test = draw(5000), draw(5000)
    kinds: dict[str, tuple[type[flows.Flow], dict[str, Any]]] = {
        "MAF": (flows.MAF, {"transforms": 3, "hidden": (64, 64)}),
        "NSF": (flows.NSF, {"transforms": 3, "hidden": (64, 64), "bound": 5.0}),
    }
    figure, axes = plt.subplots(2, 5, figsize=(15, 5.2))
    axes[0, 0].plot(*train[:1500].T.numpy(), ".", markersize=1)
    axes[0, 0].set(title="data", xlim=EXTENT[:2], ylim=EXTENT[2:], xticks=[], yticks=[])
    axes[1, 0].set(xlabel="x, on the line from mode to mode", title="log |det dz/dx|")
    results: dict[str, tuple[float, float, float]] = {}
    places = iter(axes[:, 1:].T)
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
            above, below = next(places)
            span = volume_picture(below, flow)
            with torch.no_grad():
                nats = float(flow.log_prob(test).mean())
                axes[1, 0].plot(line()[:, 0], flow(line())[1], label=name)
            results[name] = nats, between(flow), span
            title = f"{name}: {nats:.2f} nats, {results[name][1]:.1%} between"
            print(f"{title}, log-determinant ranges over {span:.1f} nats")
            density_picture(above, flow.log_prob, EXTENT, title.replace(": ", "\n"))
            below.set_title(f"log |det dz/dx|, range {span:.1f} nats", fontsize=9)
    axes[1, 0].legend(fontsize=6)
    save(figure, args.out / "two_modes.png")
    return results


if __name__ == "__main__":
    main()
