"""field_layer, on a product that it may not change and on one of its own."""

import itertools

import torch
from laws import OpCase, Sample, normal

from pyflowkern.ops import field_layer, field_layer_reference
from pyflowkern.ops.field import ACTIVATIONS
from pyflowkern.ops.field_layer import activate_layer

#: [N, C, *space] with tails of every kind; planes and channels beyond a block of sums.
SHAPES = [(5, 3), (3, 17, 1, 1), (3, 5, 7), (2, 32, 8, 8), (2, 3, 4, 5), (1, 2, 3, 2, 4)]
LARGE = [(70, 1030), (2, 3, 40, 41), (2, 70, 9, 12), (129, 2, 3)]
EMPTY = [(0, 3), (2, 0), (0, 3, 4, 4), (2, 3, 0)]


def kinds(shape):
    """Shapes of a parameter: of channels or maps, of all samples or of each."""
    n, c, *space = shape
    return (c,), (n, c), (1, c, *space), (n, c, *space)


def sample(shape, bias, gate, tangents, dtype, channels_last=False, activation="tanh"):
    p = normal((1 + tangents) * shape[0], *shape[1:], dtype=dtype)
    if channels_last:
        p = p.contiguous(memory_format=torch.channels_last)
    tensors = {
        "p": p,
        "bias": normal(*bias, seed=1, dtype=dtype),
        "gate": None if gate is None else normal(*gate, seed=2, dtype=dtype).sigmoid(),
    }
    return Sample(tensors, tangents=tangents, activation=activation)


def samples(dtype):
    for i, shape in enumerate(SHAPES + LARGE + EMPTY):
        for j, (bias, gate) in enumerate(itertools.product(kinds(shape), (None, *kinds(shape)))):
            if dtype != torch.float32 and j % 4:
                continue
            tangents, activation = (i + j) % 3, ACTIVATIONS[(i + j // 3) % 4]
            for channels_last in (False, True) if len(shape) == 4 else (False,):
                yield sample(shape, bias, gate, tangents, dtype, channels_last, activation)
    shape = (3, 6, 5, 4)
    for activation, gate, last, tangents in itertools.product(
        ACTIVATIONS, (None, (6,), shape), (False, True), (0, 1, 4)
    ):
        yield sample(shape, (6,), gate, tangents, dtype, last, activation)


def small(dtype):
    for activation, tangents in itertools.product(ACTIVATIONS, (0, 2)):
        gate = (2,) if activation in ("tanh", "gelu") else None
        yield sample((3, 2, 2, 1), (2,), gate, tangents, dtype, activation=activation)
    yield sample((3, 2, 2, 2), (3, 2), (1, 2, 2, 2), 1, dtype, activation="silu")
    yield sample((3, 2, 2, 2), (1, 2, 2, 2), (3, 2), 1, dtype, True)


def of_its_own(p, bias, gate, *, tangents, activation):
    """field_layer of a product that nobody else reads."""
    p = p.clone(memory_format=torch.preserve_format)  # of a leaf, which stays what it is
    return activate_layer(p, bias, gate, tangents, activation, in_place=True)


def own_samples(dtype):
    for activation, last, (bias, gate) in itertools.product(
        ACTIVATIONS, (False, True), (((4,), (3, 4)), ((4,), None), ((1, 4, 5, 5), None))
    ):
        yield sample((3, 4, 5, 5), bias, gate, 2, dtype, last, activation)


COMMON = {
    "floor": 4,
    "reason": "gradients of parameters are sums over samples and pixels in another order (2 seen)",
    "rows": {"p": 0, "bias": 0, "gate": 0},
    "copies": lambda sample: 1 + sample.fixed["tangents"],
    "large": lambda: [
        sample((40, 16, 12, 12), (16,), (16,), 1, torch.float32, last) for last in (False, True)
    ],
}
CASES = [
    OpCase(field_layer, field_layer_reference, samples, small, **COMMON),
    OpCase(of_its_own, field_layer_reference, own_samples, small, reentrant=False, **COMMON),
]
