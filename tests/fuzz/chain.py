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


def network(draw, reads, outputs, context, prefixes=None):
    """Return a network, masked where it is told how many numbers each output may see; some of these are angles."""
    frequencies = [draw.choice((0.0, 1.0, 0.5)) for _ in range(reads)] if draw.flag() else None
    owners = [i for i, w in enumerate(frequencies or [0.0] * reads) for _ in range(1 + (w != 0))]
    inputs = len(owners)
    uses = ("none", "add", "gate") if context else ("none",)
    first = draw.choice(("none", "add", "joined", "activated")) if context else "none"
    residual, masked = draw.flag(), prefixes is not None
    widths = [draw.size(1, 33)] * (2 * draw.choice((0, 1, 2)) + 1)
    if not residual:
        widths = [draw.size(1, 33) for _ in range(draw.choice((1, 2, 3)))]
    # a unit of degree m sees the first m inputs
    degrees = [sorted(draw.choice(range(reads)) for _ in range(w)) for w in widths]
    if residual:
        degrees = degrees[:1] * len(widths)
    seen = [sum(owner < d for owner in owners) for d in degrees[0]] if masked else None
    layers = [layer(draw, widths[0], inputs, seen)]
    for low, high in itertools.pairwise(degrees):
        seen = [sum(d <= e for d in low) for e in high] if masked else None
        layers.append(layer(draw, len(high), len(low), seen, draw.choice(uses)))
    seen = [sum(d <= e for d in degrees[-1]) for e in prefixes] if masked else None
    layers.append(layer(draw, outputs, widths[-1], seen))
    last = draw.flag() if residual else True
    activated = draw.flag() if residual else True
    form = residual, last, first, activated, frequencies
    return ops.ChainNetwork(layers, draw.choice(ACTIVATIONS), *form)


def element_map(draw):
    """Return the map of a feature."""
    transform = spline_map(draw) if draw.flag() else ops.scale_map(scale_map(draw))
    if (
        getattr(transform, "tails", "") == "none"
    ):  # which data meet or miss by a rounding of an earlier step
        transform = dataclasses.replace(transform, tails="linear")
    if (
        draw.mode == "edges" and getattr(transform, "kind", "") == "linear"
    ):  # its slopes jump at knots
        transform = dataclasses.replace(transform, kind="rational_quadratic")
    return transform


def elements(draw, d, context):
    kind = draw.choice(
        ("coupling", "autoregressive", "own") if d > 1 else ("autoregressive", "own")
    )
    moves = order(draw, d)
    cut = (
        0
        if kind == "autoregressive"
        else draw.size(1, d)
        if kind == "own"
        else draw.size(1, d - 1)
    )
    moved = {"own": moves[:cut], "coupling": moves[cut:]}.get(kind, moves)
    transform = element_map(draw)
    layout = draw.choice(("feature_major", "blocked"))
    if draw.flag() and draw.flag():
        transform, layout = [element_map(draw) for _ in moved], "feature_major"
    alone = not isinstance(transform, list)
    scales = alone and getattr(transform, "kind", "") in (
        "exp",
        "tanh",
        "atan",
        "sigmoid",
        "softclip",
    )
    flags = {"centred": scales and kind != "autoregressive" and draw.flag()}
    # at the jump of a circle the rounding of one step decides
    line = alone and getattr(transform, "tails", "") == "linear" and draw.mode != "edges"
    flags["turned"] = line and transform.parameterization != "domain" and draw.flag()
    step = ops.ElementsStep(transform, moved, layout=layout, **flags)
    if kind == "own":
        return step
    if kind == "autoregressive":
        seen = [
            g.begin + j
            for g in step.groups
            for j in range(g.features)
            for _ in range(g.parameters)
        ]
        net = network(draw, d, step.outputs, context, seen)
        return ops.ElementsStep(transform, moves, moves, net, **flags)
    net = network(draw, cut, step.outputs, context)
    return ops.ElementsStep(transform, moved, moves[:cut], net, layout, **flags)


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
