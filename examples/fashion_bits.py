"""Bits per dimension of Fashion-MNIST: Glow, RealNVP, a spline flow, and flow matching with a U-Net.

The images (Xiao et al. 2017, 60,000 to train and 10,000 to test, 28x28 grey levels) are in Debian's package
dataset-fashion-mnist, which need not be installed:

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion
    python examples/fashion_bits.py --data fashion/usr/share/datasets/fashion-mnist

Without --data enlarged digits of scikit-learn stand in, whose results mean nothing.  Each flow gets --minutes of
CPU time; --flow takes one alone, and --resume goes on where a run was stopped.  Flow matching is trained by
regression and scored by solving its equation, with Hutchinson's estimate of the trace, on --images test images.
Results are added to those in --out, which also gets a picture of ten samples of each flow.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import batches, fit, options, plt, save
from torch import Tensor

from pyflowkern import flows

SHAPE, PIXELS = (1, 28, 28), 28 * 28
FLOWS = ("Glow", "RealNVP", "flow matching", "NSF")
BATCH, RATE = 32, 1e-3
# of rk4 and of Hutchinson's estimate, where flow matching is scored; 8 steps were 0.04 bits too good
STEPS, PROBES = 32, 2
Scores = tuple[Tensor, dict[str, Any]]


def read(path: Path) -> Tensor:
    """Return the images of a gzipped IDX file, ``[N, 1, 28, 28]`` of uint8."""
    content = gzip.decompress(path.read_bytes())
    magic, count, height, width = struct.unpack(">4i", content[:16])
    if (magic, height, width) != (2051, *SHAPE[1:]) or len(content) != 16 + count * PIXELS:
        raise ValueError(f"{path} must hold images of {SHAPE[1:]} as an IDX file")
    return torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8).view(-1, *SHAPE)


def stand_in() -> tuple[Tensor, Tensor]:
    """Return digits to train with and to test, enlarged to 28x28."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(images, SHAPE[1:], mode="bilinear").to(torch.uint8)
    return large[:1617], large[1617:]


def make(name: str, quick: bool) -> flows.Flow:
    """Return a flow of 28x28 images, with two levels, or of the size of a test."""
    width = 4 if quick else {"Glow": 64, "RealNVP": 24, "NSF": 32, "flow matching": 16}[name]
    shape: dict[str, Any] = {"levels": 2, "hidden": width, "bits": 8}
    if name == "Glow":
        return flows.Glow(SHAPE, steps=1 if quick else 12, **shape)
    if name == "RealNVP":
        return flows.RealNVP(SHAPE, steps=1 if quick else 3, blocks=1, **shape)
    if name == "NSF":
        return flows.NSF(SHAPE, steps=1 if quick else 4, bins=4, **shape)
    widths, solver = (width, 2 * width), {"method": "rk4", "step_size": 1 / STEPS}
    return flows.FlowMatching(SHAPE, widths, conv="unet", bits=8, **solver)


def bits_of(flow: flows.Flow, images: Tensor) -> Scores:
    """Return the bits per dimension of each image, and what is to be said of them."""
    return torch.cat([flow.bits_per_dim(part) for part in images.split(250)]), {}


def bits_by_solves(flow: flows.FlowMatching, images: Tensor) -> Scores:
    """Return the same by solves, with the standard error that probes have, and the change by a solve twice as fine."""

    def solved(images: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)  # the same noise and probes for the same images
        parts = [flow.terms(part, probes=PROBES) for part in images.split(250)]
        to_bits = 1 / (PIXELS * math.log(2))
        log_prob, error = (torch.cat(values) for values in list(zip(*parts, strict=True))[:2])
        return -to_bits * log_prob, to_bits * error

    bits, error = solved(images)
    some = images[: max(1, len(images) // 10)]
    coarse, (block,) = solved(some)[0], flow.blocks()
    block.solver["step_size"] = 0.5 / STEPS
    change = float((solved(some)[0] - coarse).mean())
    block.solver["step_size"] = 1 / STEPS
    of_probes = float(error.square().sum().sqrt() / len(error))
    return bits, {"probes": PROBES, "error_of_probes": of_probes, "twice_as_fine": change}


def run(name: str, train: Tensor, test: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Train a flow and score it; keep ten samples, and return a row of the table."""
    torch.manual_seed(args.seed)
    size = 8 if args.quick else BATCH  # of a batch
    flow, draw = make(name, args.quick), batches(train, size)
    if not isinstance(flow, flows.FlowMatching):
        flow.log_prob(train[:256])  # starts ActNorm
    checkpoint = args.out / f"{name}.checkpoint.pt"
    if not args.resume:
        checkpoint.unlink(missing_ok=True)

    def matched() -> Tensor:
        return flow.loss(draw())  # type: ignore[union-attr, operator]

    def likelihood() -> Tensor:
        return flow.bits_per_dim(draw()).mean()

    def look(step: int, minutes: float) -> None:
        said = f"{name}: step {step}, {minutes:.1f} min, loss"
        print(said, f"{float(loss().detach()):.3f}", flush=True)

    loss: Callable[[], Tensor] = matched if isinstance(flow, flows.FlowMatching) else likelihood
    settings: dict[str, Any] = {"minutes": args.minutes, "look": look}
    settings |= {"module": flow, "checkpoint": checkpoint}
    fit(loss, flow.parameters(), args.steps, RATE, **settings)
    ended = torch.load(checkpoint, weights_only=True)
    flow.eval()
    torch.manual_seed(args.seed)  # of the noise below the last bit
    with torch.no_grad():
        if isinstance(flow, flows.FlowMatching):
            bits, facts = bits_by_solves(flow, test[: args.images])
        else:
            bits, facts = bits_of(flow, test)
        torch.save(flow.sample(10, quantized=True), args.out / f"{name}.samples.pt")
    return {
        "flow": name,
        "bits": float(bits.mean()),
        "standard_error": float(bits.std() / len(bits) ** 0.5),
        "images": len(bits),
        "parameters": sum(p.numel() for p in flow.parameters()),
        "batch": size,
        "steps": ended["step"],
        "epochs": ended["step"] * size / len(train),
        "minutes": ended["minutes"],
        **facts,
    }


def report(entry: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Add a result to those in a folder, as JSON and as a table; return all of them."""
    path = folder / "fashion_bits.json"
    found = json.loads(path.read_text()) if path.exists() else []
    found = [e for e in found if e["flow"] != entry["flow"]] + [entry]
    found.sort(key=lambda e: FLOWS.index(e["flow"]))
    path.write_text(json.dumps(found, indent=1) + "\n")
    head = ("flow", "bits/dim", "test images", "parameters", "steps", "epochs", "CPU minutes")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for e in found:
        score = f"{e['bits']:.3f} ± {e['standard_error']:.3f}"
        course = (e["steps"], f"{e['epochs']:.1f}", f"{e['minutes']:.1f}")
        cells = (e["flow"], score, e["images"], e["parameters"], *course)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    (folder / "fashion_bits.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    return found


def picture(names: list[str], test: Tensor, folder: Path) -> None:
    """Draw ten test images, and ten samples of each flow below them."""
    rows = {"test images": test[:10]}
    rows |= {name: torch.load(folder / f"{name}.samples.pt") for name in names}
    figure, axes = plt.subplots(len(rows), 1, figsize=(6, 0.7 * len(rows)), squeeze=False)
    for ax, (name, images) in zip(axes[:, 0], rows.items(), strict=True):
        strip = torch.cat([*images[:, 0]], 1).numpy()
        ax.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    save(figure, folder / "fashion_bits.png")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = options(__doc__, "fashion_bits")
    parser.add_argument("--data", type=Path, help="folder of train- and t10k-images-idx3-ubyte.gz")
    parser.add_argument("--flow", choices=FLOWS, help="one of the flows alone")
    parser.add_argument("--minutes", type=float, default=12.0, help="CPU time for each flow")
    parser.add_argument("--steps", type=int, default=1_000_000, help="at most")
    parser.add_argument("--images", type=int, default=1000, help="to score flow matching by")
    parser.add_argument("--resume", action="store_true", help="go on where runs in --out stopped")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data:
        train, test = (read(args.data / f"{n}-images-idx3-ubyte.gz") for n in ("train", "t10k"))
    else:
        train, test = stand_in()
    if args.quick:
        args.steps, args.images, test = 20, 10, test[:50]
    for name in [args.flow] if args.flow else FLOWS:
        found = report(run(name, train, test, args), args.out)
    picture([e["flow"] for e in found], test, args.out)
    return {e["flow"]: e["bits"] for e in found}


if __name__ == "__main__":
    main()
