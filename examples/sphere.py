"""A flow on a sphere, in cylindrical coordinates: height and longitude, with rotations between the layers.

    python examples/sphere.py           # a minute; writes sphere.png

A point of the unit sphere is (sqrt(1 - h^2) cos phi, sqrt(1 - h^2) sin phi, h).  By Archimedes its element of area is
dh dphi, so that densities over (h, phi) and over the sphere are the same (Rezende et al. 2020).  Couplings give the
height u = (h + 1) / 2 a spline of [0, 1] and the longitude a spline of the circle.  At the poles all longitudes are one
point, which such a layer does not know but must learn.  A rotation after each layer, which changes no area, moves the
poles.  That is tried, too: it mixes the coordinates, but each layer then has poles of its own, where the density is not
smooth.

The target is a mixture of von Mises-Fisher distributions, one of them at the north pole.
Its density is known: the divergence is the mean of log p - log q over its samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from common import fit, options, plt, save
from torch import Tensor

from pyflowkern import flows, nn
from pyflowkern.ops import SplineMap

#: Directions (not normalized) and concentrations of the parts, of equal weight.
PARTS = [((0, 0, 1), 20), ((1, 0, 0.1), 40), ((-0.5, 0.8, 0), 10), ((-0.6, -0.7, -0.4), 60)]
MEANS = torch.nn.functional.normalize(torch.tensor([[*map(float, m)] for m, _ in PARTS]), dim=1)
KAPPA = torch.tensor([float(k) for _, k in PARTS])


def to_cylinder(x: Tensor) -> Tensor:
    """Return ``(u, phi)`` ``[N, 2]`` of points ``[N, 3]``: u in [0, 1], phi in [-pi, pi]."""
    return torch.stack((((x[:, 2] + 1) / 2).clamp(0, 1), torch.atan2(x[:, 1], x[:, 0])), 1)


def to_sphere(c: Tensor) -> Tensor:
    """Return the points ``[N, 3]`` of coordinates ``(u, phi)``."""
    h = 2 * c[:, 0] - 1
    radius = (1 - h.square()).clamp(min=0).sqrt()
    return torch.stack((radius * c[:, 1].cos(), radius * c[:, 1].sin(), h), 1)


class Rotation(nn.Bijection):
    """A fixed rotation of the sphere, in cylindrical coordinates.  It preserves areas: the log-determinant is 0."""

    def __init__(self) -> None:
        super().__init__()
        matrix = torch.linalg.qr(torch.randn(3, 3))[0]
        self.register_buffer("matrix", matrix * torch.linalg.det(matrix).sign())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return to_cylinder(to_sphere(x) @ self.matrix.T), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return to_cylinder(to_sphere(z) @ self.matrix), z.new_zeros(len(z))


def build(transforms: int, *, rotated: bool) -> flows.Flow:
    """Return a flow of ``(u, phi)`` whose base is the uniform distribution of the sphere."""
    splines = [
        SplineMap(bins=12, tails="none"),
        SplineMap(bins=12, bound=math.pi, tails="circular"),
    ]
    network = partial(nn.MLP, hidden=(64, 64))
    layers: list[nn.Bijection] = []
    for _ in range(transforms):
        of_angle = partial(
            nn.PeriodicInput, conditioner=network
        )  # continuous where longitudes wrap
        for moved, conditioner in ((0, of_angle), (1, network)):
            mask = torch.arange(2) == moved
            layers.append(nn.MixedSplineCoupling(2, conditioner, splines, split=mask))
        if rotated:
            layers.append(Rotation())
    low, high = torch.tensor([0.0, -math.pi]), torch.tensor([1.0, math.pi])
    base = torch.distributions.Uniform(low, high, validate_args=False)
    return flows.Flow(nn.Sequential(*layers), (2,), base=torch.distributions.Independent(base, 1))


def draw(n: int) -> Tensor:
    """Draw from the mixture: the cosine to a mean direction has the density exp(kappa w), and can be inverted."""
    part = torch.randint(len(KAPPA), (n,))
    kappa, u = KAPPA[part], torch.rand(n)
    w = 1 + (u + (1 - u) * (-2 * kappa).exp()).log() / kappa
    tangent = torch.randn(n, 3)
    tangent = tangent - (tangent * MEANS[part]).sum(1, keepdim=True) * MEANS[part]
    tangent = torch.nn.functional.normalize(tangent, dim=1)
    return w[:, None] * MEANS[part] + (1 - w.square()).clamp(min=0).sqrt()[:, None] * tangent


def log_density(x: Tensor) -> Tensor:
    """Return the mixture's log-density over area: kappa / (4 pi sinh kappa) exp(kappa m.x) each."""
    log_sinh = KAPPA + torch.log1p(-(-2 * KAPPA).exp()) - math.log(2)
    parts = KAPPA * (x @ MEANS.T) + KAPPA.log() - math.log(4 * math.pi) - log_sinh
    return parts.logsumexp(1) - math.log(len(KAPPA))


def log_prob(flow: flows.Flow, x: Tensor) -> Tensor:
    """Return the flow's log-density over area; dh = 2 du."""
    return flow.log_prob(to_cylinder(x)) - math.log(2)


@torch.no_grad()
def pole_spread(flow: flows.Flow) -> float:
    """Return the spread of the log-density over longitudes near the north pole, where it should be one number."""
    phi = torch.linspace(-math.pi, math.pi, 100)[:-1]
    return float(flow.log_prob(torch.stack((torch.full_like(phi, 1 - 1e-6), phi), 1)).std())


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Train both flows; return divergence and spread at the pole for each."""
    args = options(__doc__, "sphere").parse_args(argv)
    torch.manual_seed(args.seed)
    test = draw(1000 if args.quick else 20_000)
    phi, latitude = torch.meshgrid(
        torch.linspace(-math.pi, math.pi, 181), torch.linspace(-1.56, 1.56, 91), indexing="ij"
    )
    grid = torch.stack(((latitude.sin().flatten() + 1) / 2, phi.flatten()), 1)
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.4), subplot_kw={"projection": "mollweide"})
    panels = {"truth": log_density(to_sphere(grid))}
    drawn: dict[str, Tensor] = {}
    found: dict[str, dict[str, float]] = {}
    for name, rotated in {"rotated between layers": True, "without rotations": False}.items():
        flow = build(2 if args.quick else 5, rotated=rotated)
        fit(
            lambda flow=flow: -log_prob(flow, draw(512)).mean(),
            flow.parameters(),
            20 if args.quick else 700,
            3e-3,
            say=name,
        )
        with torch.no_grad():
            divergence = float((log_density(test) - log_prob(flow, test)).mean())
            panels[f"{name}: {divergence:.3f} nats off"] = flow.log_prob(grid) - math.log(2)
            drawn[name] = flow.sample(2000)
        found[name] = {"divergence": divergence, "spread at the pole": pole_spread(flow)}
        print(name, {key: round(value, 4) for key, value in found[name].items()})
    for ax, (name, values) in zip(axes.flat, panels.items(), strict=False):
        ax.pcolormesh(
            phi, latitude, values.exp().view(phi.shape), vmin=0, vmax=2.0, rasterized=True
        )
        ax.set_title(name, fontsize=9)
    samples = drawn["rotated between layers"]
    axes[1, 1].plot(samples[:, 1], (2 * samples[:, 0] - 1).asin(), ".", markersize=1.5)
    axes[1, 1].set_title("samples, rotated between layers", fontsize=9)
    for ax in axes.flat:
        ax.set(xticklabels=[], yticklabels=[])
    save(figure, args.out / "sphere.png")
    return found


if __name__ == "__main__":
    main()
