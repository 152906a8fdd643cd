"""A flow on a torus: two angles, as the backbone of a protein has them, and what a flow on the plane makes of them.

    python examples/torus.py           # a minute; writes torus.png

Pairs of angles are drawn from a mixture of von Mises distributions placed like the regions of a Ramachandran plot
(phi, psi), one of which lies across the seam at psi = 180 degrees.  Its density is known.  A circular spline flow
(Rezende et al. 2020) has splines on the circle and networks that see cosine and sine of an angle: its density is the
same on both sides of a seam.  The same flow for the plane puts samples beyond +-180 degrees, and its density jumps at
the seam.  The divergence from the truth is the mean of log p - log q over samples of the truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from common import density_picture, fit, options, plt, save
from torch import Tensor

from pyflowkern import flows

EXTENT = (-math.pi, math.pi, -math.pi, math.pi)
#: Weight, mean of phi and psi in degrees, and their concentrations.
REGIONS = torch.tensor(
    [
        [0.40, -63, -43, 25, 25],  # right-handed helix
        [0.25, -120, 135, 6, 8],  # sheet
        [0.20, -68, 150, 20, 12],  # polyproline
        [0.10, -150, 172, 12, 18],  # extended, across the seam
        [0.05, 57, 45, 30, 30],  # left-handed helix
    ]
)
WEIGHTS, MEANS, SHARPNESS = REGIONS[:, 0], REGIONS[:, 1:3].deg2rad(), REGIONS[:, 3:]


def truth() -> torch.distributions.Distribution:
    """Return the mixture: phi and psi are independent within a region."""
    angles = torch.distributions.VonMises(MEANS, SHARPNESS)
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(WEIGHTS), torch.distributions.Independent(angles, 1)
    )


@torch.no_grad()
def seam(log_prob: Callable[[Tensor], Tensor]) -> float:
    """Return the largest difference of the log-density at both sides of psi = 180 degrees, over sheet and extended."""
    phi = torch.linspace(-170, -60, 50).deg2rad()
    ends = [torch.stack((phi, torch.full_like(phi, s * (math.pi - 1e-5))), 1) for s in (-1, 1)]
    return float((log_prob(ends[0]) - log_prob(ends[1])).abs().max())


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Train both flows; return divergence, jump at the seam and share of samples outside for each."""
    args = options(__doc__, "torus").parse_args(argv)
    torch.manual_seed(args.seed)
    target = truth()
    test = target.sample((1000 if args.quick else 20_000,))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.9))
    density_picture(axes[0], target.log_prob, EXTENT, "truth")
    found: dict[str, dict[str, float]] = {}
    for ax, (name, circular) in zip(
        axes[1:], {"on the torus": True, "on the plane": False}.items(), strict=True
    ):
        flow = flows.NSF(2, transforms=6, hidden=(64, 64), bins=12, circular=circular)
        fit(
            lambda flow=flow: -flow.log_prob(target.sample((512,))).mean(),
            flow.parameters(),
            30 if args.quick else 1500,
            3e-3,
            say=name,
        )
        flow.eval()
        with torch.no_grad():
            divergence = float((target.log_prob(test) - flow.log_prob(test)).mean())
            outside = float((flow.sample(20_000).abs() > math.pi).any(1).float().mean())
        found[name] = {"divergence": divergence, "jump": seam(flow.log_prob), "outside": outside}
        print(name, {key: round(value, 4) for key, value in found[name].items()})
        density_picture(ax, flow.log_prob, EXTENT, f"{name}: {divergence:.3f} nats from the truth")
    for ax in axes:
        ticks = [-math.pi, 0, math.pi]
        ax.set(xticks=ticks, yticks=ticks, xticklabels=["-180°", "0", "180°"])
        ax.set(yticklabels=["-180°", "0", "180°"], xlabel="phi", ylabel="psi")
    save(figure, args.out / "torus.png")
    return found


if __name__ == "__main__":
    main()
