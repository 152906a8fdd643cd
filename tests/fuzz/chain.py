"""A random chain of transforms."""

import dataclasses
import itertools

import torch

from fuzz.call import Call
from fuzz.maps import scale_map, spline_map
from pyflowkern import ops
from pyflowkern.core.activations import ACTIVATIONS


def order(draw, size):
    return torch.randperm(size, generator=draw.generator).tolist()


def layer(draw, outputs, inputs, prefixes, use="none"):
    """Return a layer, whose weight may have its rows and columns in another order."""
    columns, rows = (order(draw, n) if draw.flag() else None for n in (inputs, outputs))
    biased = use == "add" and draw.flag()
    return ops.ChainLayer(outputs, inputs, draw.flag(), prefixes, columns, rows, use, biased)


def network(draw, inputs, outputs, context, prefixes=None):
    """Return a network, masked where it is told how many inputs each output may see."""
    uses = ("none", "add", "gate") if context else ("none",)
    first = draw.choice(("none", "add", "joined", "activated")) if context else "none"
    residual, masked = draw.flag(), prefixes is not None
    widths = [draw.size(1, 33)] * (2 * draw.choice((0, 1, 2)) + 1)
    if not residual:
        widths = [draw.size(1, 33) for _ in range(draw.choice((1, 2, 3)))]
    # a unit of degree m sees the first m inputs
    degrees = [sorted(draw.choice(range(inputs)) for _ in range(w)) for w in widths]
    if residual:
        degrees = degrees[:1] * len(widths)
    layers = [layer(draw, widths[0], inputs, degrees[0] if masked else None)]
    for low, high in itertools.pairwise(degrees):
        seen = [sum(d <= e for d in low) for e in high] if masked else None
        layers.append(layer(draw, len(high), len(low), seen, draw.choice(uses)))
    seen = [sum(d <= e for d in degrees[-1]) for e in prefixes] if masked else None
    layers.append(layer(draw, outputs, widths[-1], seen))
    last = draw.flag() if residual else True
    return ops.ChainNetwork(layers, draw.choice(ACTIVATIONS), residual, last, first)


def elements(draw, d, context):
    transform = spline_map(draw) if draw.flag() else ops.scale_map(scale_map(draw))
    if (
        getattr(transform, "tails", "") == "none"
    ):  # which data meet or miss by a rounding of an earlier step
        transform = dataclasses.replace(transform, tails="linear")
    if (
        draw.mode == "edges" and getattr(transform, "kind", "") == "linear"
    ):  # its slopes jump at knots
        transform = dataclasses.replace(transform, kind="rational_quadratic")
    layout = draw.choice(("feature_major", "blocked"))
    kind = draw.choice(
        ("coupling", "autoregressive", "own") if d > 1 else ("autoregressive", "own")
    )
    moves = order(draw, d)
    if kind == "own":
        return ops.ElementsStep(transform, moves[: draw.size(1, d)], layout=layout)
    per = ops.ElementsStep(transform, [0]).parameters
    if kind == "autoregressive":
        seen = [j for j in range(d) for _ in range(per)]
        net = network(draw, d, per * d, context, seen)
        return ops.ElementsStep(transform, moves, moves, net)
    cut = draw.size(1, d - 1)
    net = network(draw, cut, per * (d - cut), context)
    return ops.ElementsStep(transform, moves[cut:], moves[:cut], net, layout)


def chain(draw):
    n, d, k = draw.size(), draw.size(1, 17), draw.choice((0, 2))
    kinds = (
        lambda: ops.PermuteStep(order(draw, d)),
        ops.ActNormStep,
        ops.LinearStep,
        ops.PLUStep,
        lambda: ops.LUStep(draw.choice((1e-3, 0.5))),
        lambda: ops.ShiftStep(draw.choice((1.0, 3.0))),
        *[lambda: elements(draw, d, k > 0 and draw.flag())] * 3,
    )
    # at an edge the rounding of one step decides what the next one does
    counts = (0, 1, 2, 3) if draw.mode in ("plain", "wide") else (0, 1, 1)
    steps = [draw.choice(kinds)() for _ in range(draw.choice(counts))]
    inverse = draw.flag()
    program = ops.ChainProgram(d, steps, k, "none" if inverse else draw.choice(("none", "normal")))
    dtype = torch.float64 if draw.dtype == torch.float64 else torch.float32
    tensors = [
        torch.tensor(order(draw, d))
        if wanted.integers
        # products of products of 10^12 are raw numbers of no map: kernel and reference then overflow at other places
        else draw.tensor(*wanted.shape, scale=max(1, *wanted.shape, 1) ** -0.5)
        .to(dtype)
        .clamp(-10, 10)
        for wanted in program.tensors
    ]
    x = draw.tensor(n, d).to(dtype).clamp(-1e4, 1e4)
    given = {"x": x, "program": program, "tensors": tensors, "inverse": inverse}
    given["context"] = draw.tensor(n, k).to(dtype) if k else None
    return Call(ops.chain, given, ("x", "context") if k else ("x",))
