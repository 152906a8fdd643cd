"""autoregressive_inverse, and networks of masked layers to test it with."""

import dataclasses
import itertools

import torch
from laws import OpCase, Sample, normal

from pyflowkern.core.activations import ACTIVATIONS
from pyflowkern.ops import (
    MaskedLayer,
    MaskedPlan,
    ScaleMap,
    SplineMap,
    autoregressive_inverse,
    autoregressive_inverse_reference,
)
from pyflowkern.ops.elements import element_map, element_parameters

MAPS = [
    "affine",
    "exp",
    "tanh",
    "atan",
    "sigmoid",
    "softplus",
    "additive",
    ScaleMap("sigmoid", offset=2.0, shift_first=True),
    ScaleMap("softplus", eps=1e-3, divide=True),
    ScaleMap("softplus_asinh", offset=0.5, shift_gain=0.1),
    ScaleMap("softplus_tanh", clamp=4.0, eps=1e-3, shift_first=True, shift_gain=0.5),
    ScaleMap("sigmoid", max_scale=3.0, shift_gain=2.0, divide=True),
    SplineMap(bins=8),
    SplineMap(bins=5, tails="circular", scale=0.5),
    SplineMap(bins=4, tails="affine", parameterization="softclip"),
    SplineMap(bins=4, tails="affine", parameterization="domain"),
    SplineMap("linear", bins=6),
    SplineMap("quadratic", bins=4),
    SplineMap("cubic", bins=5),
]


def made(features, hidden, outputs, *, order=None, activation="relu", residual=0, seed=0, n=0):
    """Return a plan, weights and biases of order one; the first bias ``[n, units]`` if there is ``n``."""
    rank = torch.argsort(torch.tensor(order or range(features)))
    degrees = [1 + torch.randperm(h) % max(1, features - 1) for h in hidden]
    layers = [MaskedLayer(degrees[0][:, None] > rank)]
    for low, high in itertools.pairwise(degrees):
        layers.append(MaskedLayer(high[:, None] >= low, activation=activation))
    for _ in range(residual):
        square, at = degrees[-1][:, None] >= degrees[-1], len(layers) - 1
        layers.append(MaskedLayer(square, activation=activation))
        layers.append(MaskedLayer(square, activation=activation, residual=at))
    last = (rank[:, None] >= degrees[-1]).repeat_interleave(outputs, 0)
    layers.append(MaskedLayer(last, activation=activation))
    weights = [
        normal(*s.mask.shape, seed=seed + i) / s.mask.shape[1] ** 0.5 for i, s in enumerate(layers)
    ]
    biases = [normal(s.mask.shape[0], seed=seed + 50 + i) / 4 for i, s in enumerate(layers)]
    if n:
        biases[0] = normal(n, hidden[0], seed=seed + 99)
    return MaskedPlan(layers, features), weights, biases


def gated(plan, n=0, seed=70):
    """Return the plan with gates on the second layer of each residual block and on the last, and gates in (0, 1)."""
    last = len(plan.layers) - 1
    layers = [
        dataclasses.replace(s, gated=s.residual is not None or i == last)
        for i, s in enumerate(plan.layers)
    ]
    gates = [
        normal(*([n] if n else []), s.mask.shape[0], seed=seed + i).sigmoid()
        for i, s in enumerate(layers)
        if s.gated
    ]
    return MaskedPlan(layers, plan.features), gates


def sample(n, features, hidden, dtype, transform="affine", gates=None, own=False, **options):
    """Arguments of a network; a first bias of each sample, gates of "all samples" or of "each sample"."""
    torch.manual_seed(0)  # of the degrees
    plan, weights, biases = made(
        features, hidden, element_parameters(element_map(transform)), n=n if own else 0, **options
    )
    found = []
    if gates:
        plan, found = gated(plan, n if gates == "each sample" else 0)
    z = normal(n, features, seed=3)
    tensors = {"z": z, "weights": weights, "biases": biases, "gates": found}
    return Sample(tensors, plan=plan, transform=transform).map(
        lambda t: t.to(dtype) if t.is_floating_point() else t
    )


def samples(dtype):
    half = dtype.itemsize == 2  # which only the arguments are: the kernel computes in float32
    for transform in MAPS[:: 4 if half else 1]:
        yield sample(7, 5, (13, 9), dtype, transform)
    for activation in ACTIVATIONS:
        yield sample(5, 6, (17, 17), dtype, activation=activation, residual=1)
    sizes = (1, (3,)), (3, (0,)), (2, (5, 1)), (7, (70, 33)), (19, (8, 150))
    for n, (features, hidden), residual in itertools.product(
        (65,) if half else (0, 1, 65), sizes, (0, 2)
    ):
        order = list(range(features))[::-1]
        yield sample(n, features, hidden, dtype, order=order, residual=residual, own=True)
    for n, gates in itertools.product(
        (65,) if half else (0, 65, 300), ("each sample", "all samples")
    ):
        yield sample(n, 1, (3,), dtype, "affine", gates, residual=2, own=True)
        yield sample(n, 7, (70, 33), dtype, "softplus", gates, residual=2, own=True)
    for transform in ("additive", SplineMap(bins=3)):
        yield sample(7, 5, (13, 9), dtype, transform, "each sample", residual=1)


def small(dtype):
    yield sample(4, 3, (5,), dtype, "exp", activation="tanh", residual=1)
    yield sample(4, 3, (5,), dtype, "exp", "all samples", activation="silu", residual=1)
    yield sample(4, 3, (5, 5), dtype, SplineMap(bins=2), activation="tanh")
    yield sample(4, 3, (5,), dtype, "exp", "each sample", own=True, activation="tanh", residual=1)


CASES = [
    OpCase(
        autoregressive_inverse,
        autoregressive_inverse_reference,
        samples,
        small,
        floor=16,
        reason="a rounding of one feature goes through the network of all later ones (5 seen)",
        conditioned=4,  # as of splines alone: bins may be narrow
        large=lambda: [sample(300, 9, (30, 30), torch.float32)],
        rows={"z": 0, "biases": 0, "gates": 0},
        torch_sums=("z", "weights", "biases"),
        log_det=True,
    ),
]
