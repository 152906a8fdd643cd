"""Glow on scikit-learn's digits: samples, ways between digits in latent space, and what the temperature does.

    python examples/glow_digits.py           # about a minute; writes glow_digits.png

Latents are drawn from a normal whose deviation is the temperature T (Kingma and Dhariwal 2018).  At T = 0 all samples
are one image.  With T their variety grows: "variety" is the mean distance of two samples, in units of that of two
real digits.  So does their distance from what is real: "error" is that of a sample from the nearest training digit, in
units of that of a held-out one.  The straight line between the latents of two digits passes images that stay
strokes; the mean of the two digits themselves would show both at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import batches, fit, options, plt, save
from sklearn.datasets import load_digits
from torch import Tensor

from pyflowkern import flows

TEMPERATURES = (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)


def split_digits() -> tuple[Tensor, Tensor]:
    """Return training and held-out digits ``[N, 1, 8, 8]``, 17 grey levels as 5-bit integers."""
    images = torch.tensor(load_digits().images, dtype=torch.uint8)[:, None]
    images = images[torch.randperm(len(images))]
    return images[:-200], images[-200:]


def as_points(images: Tensor) -> Tensor:
    return images.flatten(1).float()


def variety(images: Tensor) -> float:
    """Return the mean distance of two different images."""
    x = as_points(images)
    return float(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)))


def nearest(images: Tensor, train: Tensor) -> float:
    """Return the mean distance of an image from the nearest training image."""
    return float(torch.cdist(as_points(images), as_points(train)).amin(1).mean())


def tiles(rows: Sequence[Tensor]) -> Tensor:
    """Return rows of images as one image, with a line of grey between them."""
    padded = [torch.nn.functional.pad(row[:, 0].float(), (0, 1, 0, 1), value=5.0) for row in rows]
    return torch.cat([torch.cat([*row], 1) for row in padded])


def picture(flow: flows.Flow, test: Tensor) -> plt.Figure:
    """Draw a grid of samples, four interpolations, and samples of each temperature from the same noise."""
    # ends on the grid of the pixels would need noise to become densities: the middle of a level has none
    ends = (test[:8].float() + 0.5) / 2**5
    noisy = [torch.Generator().manual_seed(1) for _ in TEMPERATURES]
    panels = {
        "samples, T = 0.7": [flow.sample(14, temperature=0.7, quantized=True) for _ in range(3)],
        "between two real digits, left and right": [
            *(flow.interpolate(ends[:4], ends[4:], 14).transpose(0, 1) * 2**5)
        ],
        "one row each for T = " + ", ".join(map(str, TEMPERATURES)): [
            flow.sample(14, temperature=temperature, generator=noise, quantized=True)
            for temperature, noise in zip(TEMPERATURES, noisy, strict=True)
        ],
    }
    heights = [len(rows) for rows in panels.values()]
    figure, axes = plt.subplots(3, 1, figsize=(6, 6.6), height_ratios=heights)
    for ax, (name, rows) in zip(axes, panels.items(), strict=True):
        ax.imshow(tiles(rows).numpy(), cmap="gray_r", vmin=0, vmax=16)
        ax.set_title(name, fontsize=9, loc="left", pad=3)
        ax.set_axis_off()
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, draw, and return held-out bits per dimension, variety and error of samples by temperature."""
    parser = options(__doc__, "glow_digits")
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    train, test = split_digits()
    levels, steps, hidden = (2, 2, 16) if args.quick else (2, 4, 32)
    flow = flows.Glow((1, 8, 8), levels=levels, steps=steps, hidden=hidden, bits=5)
    draw = batches(train, 64)
    count = 30 if args.quick else args.steps
    fit(lambda: flow.bits_per_dim(draw()).mean(), flow.parameters(), count, 2e-3, say="Glow")
    flow.eval()
    found: dict[str, float] = {}
    with torch.no_grad():
        found["bits per dimension"] = float(
            torch.stack([flow.bits_per_dim(test).mean() for _ in range(5)]).mean()
        )
        real = variety(test), nearest(test, train)
        for temperature in TEMPERATURES:
            drawn = flow.sample(50 if args.quick else 500, temperature=temperature, quantized=True)
            found[f"variety, T = {temperature}"] = variety(drawn) / real[0]
            found[f"error, T = {temperature}"] = nearest(drawn, train) / real[1]
        figure = picture(flow, test)
    print("\n".join(f"{name}: {value:.3f}" for name, value in found.items()))
    save(figure, args.out / "glow_digits.png")
    return found


if __name__ == "__main__":
    main()
