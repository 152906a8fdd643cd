"""Four densities of the plane, each learned by four flows after as many steps, and how far each is from the truth.

Three densities are a curve with noise: a point of the curve, uniform in its parameter, plus a normal of standard
deviation 0.1.  Their log-densities are those of a fine mixture along the curve.  The fourth is uniform on the dark
fields of a board, with jumps that no continuous density can follow.  So the distance of a flow is known,

    KL(p | q) = E_p[log p(x) - log q(x)],

and is estimated from 20,000 points that no flow has seen.

    python examples/density_panels.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from common import density_picture, fit, options, plt, save
from torch import Tensor

from pyflowkern import flows

EXTENT = (-3.6, 3.6, -3.6, 3.6)
NOISE = 0.1


def moons(t: Tensor) -> Tensor:
    """Return points of two half circles that reach into each other, for ``t`` in [0, 1)."""
    side = torch.where(t < 0.5, 1.0, -1.0)
    angle = 2 * math.pi * t  # above for the first half of t, below for the second
    return 1.6 * torch.stack((angle.cos() - 0.5 * side, angle.sin() - 0.25 * side), -1)


def rings(t: Tensor) -> Tensor:
    """Return points of two circles, half of them on each."""
    radius = torch.where(t < 0.5, 1.2, 2.8)
    angle = 4 * math.pi * t
    return radius[..., None] * torch.stack((angle.cos(), angle.sin()), -1)


def spirals(t: Tensor) -> Tensor:
    """Return points of two arms that wind around each other."""
    arm = torch.where(t < 0.5, 1.0, -1.0)
    along = (2 * t).frac().sqrt()  # as many points for each length of an arm, nearly
    angle = 3 * math.pi * along
    return (3.0 * arm * along)[..., None] * torch.stack((angle.cos(), angle.sin()), -1)


CURVES = {"moons": moons, "rings": rings, "spirals": spirals}


def draw(name: str, n: int) -> Tensor:
    """Draw ``[n, 2]`` points."""
    if name == "board":
        column, row = torch.randint(0, 4, (n,)), 2 * torch.randint(0, 2, (n,))
        field = torch.stack((column, row + column % 2), 1)
        return 1.5 * (field - 2 + torch.rand(n, 2))
    return CURVES[name](torch.rand(n)) + NOISE * torch.randn(n, 2)


def true_log_prob(name: str, x: Tensor, parts: int = 1500) -> Tensor:
    """Return the log-density ``[N]`` of ``x`` ``[N, 2]`` in nats."""
    if name == "board":
        field = (x / 1.5 + 2).floor()
        inside = ((field >= 0) & (field < 4)).all(1) & (field.sum(1) % 2 == 0)
        return torch.where(inside, -math.log(8 * 1.5**2), -math.inf)
    centres = CURVES[name]((torch.arange(parts) + 0.5) / parts)
    # differences, not |x|^2 - 2 x c + |c|^2, which would cancel
    squares = (x[:, None] - centres).square().sum(-1)
    normal = -math.log(2 * math.pi * NOISE**2 * parts)
    return (-0.5 / NOISE**2 * squares).logsumexp(1) + normal


def make(kind: str) -> flows.Flow:
    """Return a flow of the plane: of eight transforms, or a field."""
    if kind == "FFJORD":
        return flows.FFJORD(2, (64, 64, 64), method="rk4", step_size=0.2, divergence="exact")
    if kind == "RealNVP":
        return flows.RealNVP(2, steps=8, hidden=64)
    return getattr(flows, kind)(2, transforms=8, hidden=(64, 64))


def objective(flow: flows.Flow, x: Tensor) -> Tensor:
    """Return the mean negative log-density; of continuous flows also what keeps a field easy to integrate."""
    if not isinstance(flow, flows.FFJORD):
        return -flow.log_prob(x).mean()
    terms = flow.terms(x)
    return (0.01 * (terms.kinetic + terms.jacobian) - terms.log_prob).mean()


def refine(flow: flows.Flow) -> None:
    """Give a continuous flow many small steps: with few it may learn to profit from their error."""
    if isinstance(flow, flows.FFJORD):
        for block in flow.blocks():
            block.solver["step_size"] = 0.025


KINDS = ("RealNVP", "MAF", "NSF", "FFJORD")


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Train each flow on each density; return their distances from the truth in nats."""
    parser = options(__doc__, "density_panels")
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args(argv)
    batch, points = 512, 150
    if args.quick:
        args.steps, batch, points = 40, 128, 30
    torch.manual_seed(args.seed)
    names = ["moons", "board"] if args.quick else [*CURVES, "board"]
    figure, axes = plt.subplots(len(names), 1 + len(KINDS), figsize=(12, 10))
    found: dict[str, dict[str, float]] = {}
    for name, (left, *places) in zip(names, axes, strict=True):
        density_picture(left, lambda x, name=name: true_log_prob(name, x), EXTENT, name, points)
        held_out = draw(name, 2000 if args.quick else 20_000)
        truth = torch.cat([true_log_prob(name, part) for part in held_out.split(2000)]).mean()
        found[name] = {}
        for kind, place in zip(KINDS, places, strict=True):
            flow = make(kind)
            loss = lambda flow=flow, name=name: objective(flow, draw(name, batch))  # noqa: E731
            fit(loss, flow.parameters(), args.steps, 3e-3)
            refine(flow.eval())
            with torch.no_grad():
                distance = float(truth - flow.log_prob(held_out).mean())
            found[name][kind] = distance
            print(f"{name}, {kind}: {distance:.3f} nats from the truth", flush=True)
            density_picture(place, flow.log_prob, EXTENT, f"{kind}: {distance:.3f} nats", points)
    save(figure, args.out / "density_panels.png")
    return found


if __name__ == "__main__":
    main()
