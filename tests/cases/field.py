"""field_divergence, the velocity alone, and hutchinson_trace."""

import itertools

import torch
from laws import EMPTY, OpCase, Sample, normal

from pyflowkern.ops import (
    field_divergence,
    field_divergence_reference,
    hutchinson_trace,
    hutchinson_trace_reference,
)
from pyflowkern.ops.field import ACTIVATIONS

SHAPES = [(7,), (64, 60, 5), (200, 130)]  # narrow, several layers, sums beyond the caches


def layers(dims, dtype=torch.float64, n=None, gates=False):
    """Weights, biases and gates of a field; parameters of each of ``n`` samples if given."""
    pairs = list(enumerate(itertools.pairwise(dims)))
    own = () if n is None else (n,)
    weights = [normal(b, a, seed=i, dtype=dtype) / max(a, 1) ** 0.5 for i, (a, b) in pairs]
    biases = [normal(*own, b, seed=50 + i, dtype=dtype) for i, (_, b) in pairs]
    found = [normal(*own, b, seed=90 + i, dtype=dtype).sigmoid() for i, (_, b) in pairs]
    return weights, biases, found if gates else []


def sample(n, hidden, dtype=torch.float64, d=5, own=False, gates=False, probe=None, **options):
    """Arguments of a field ``d -> hidden -> d``; ``probe`` is a seed, or how many are given."""
    weights, biases, found = layers((d, *hidden, d), dtype, n if own else None, gates)
    tensors = {
        "x": normal(n, d, dtype=dtype),
        "weights": weights,
        "biases": biases,
        "gates": found or None,
    }
    if isinstance(probe, int):
        shape = (probe, n, d) if probe > 1 else (n, d)
        probe = normal(*shape, seed=3, dtype=dtype)
    if probe is not None:
        options["probe"] = probe
    return Sample(tensors, **options)


def seed(value=3):
    return torch.tensor(value)


def samples(dtype):
    kinds = ((False, False), (True, False), (True, True))
    for activation, hidden, (gates, own) in itertools.product(ACTIVATIONS, SHAPES, kinds):
        options = {"own": own, "gates": gates, "activation": activation}
        yield sample(37, hidden, dtype, probe=2, regularizers=True, **options)
    if dtype.itemsize == 2:
        return
    for activation, hidden in itertools.product(ACTIVATIONS, [(7,), (200,), (64, 60), (200, 130)]):
        for gates in (False, True):
            yield sample(37, hidden, dtype, gates=gates, method="exact", activation=activation)
        yield sample(
            37, hidden, dtype, own=True, gates=True, method="exact", activation=activation
        )
    for n, (d, hidden) in itertools.product(
        (0, 1, 3, 24, 25, 129, 1000), ((1, (3,)), (2, (64, 64, 64)), (43, (150,)))
    ):
        yield sample(n, hidden, dtype, d, probe=1)
    yield sample(5, (), dtype, 4, gates=True, probe=seed(), probes=2)
    for (n, d), hidden in itertools.product(
        ((0, 3), (3, 0), (2, 2)), ((0,), (4,), (0, 0), (4, 4))
    ):
        for options in ({"method": "exact"}, {"probe": seed(7), "probes": 2}):
            yield sample(n, hidden, dtype, d, regularizers=n == 0, **options)
    for hidden in ((600, 65), (1100, 40)):  # more than a panel of sums, than the cache
        yield sample(7, hidden, dtype, method="exact")
        yield sample(3, hidden, dtype, probe=seed())
    for activation, gates in (("tanh", False), ("silu", True)):  # layers beyond the caches
        wide = (7, (1030, 40, 30), dtype, 3)
        yield sample(*wide, gates=gates, probe=seed(4), probes=2, activation=activation)
        yield sample(*wide, gates=gates, probe=1, activation=activation, regularizers=True)
    yield sample(9000, (9, 33), dtype, method="exact")  # of more samples than are packed at once


def small(dtype):
    for i, (gates, hidden) in enumerate(itertools.product((False, True), ((4, 5), (4,)))):
        for activation in ACTIVATIONS[i % 2 :: 2]:
            options = {"gates": gates, "activation": activation}
            yield sample(3, hidden, dtype, 2, probe=1, regularizers=gates, **options)
            yield sample(3, hidden, dtype, 2, method="exact", **options)
    yield sample(3, (140,), dtype, 2, probe=1)  # beside the cache
    for options in ({"probe": 1, "regularizers": True}, {"method": "exact"}):
        yield sample(4, (5, 6), dtype, 2, own=True, gates=True, **options)
    found = sample(3, (4,), dtype, 2, probe=1)
    yield Sample({**found.tensors, "probe": found.fixed["probe"]})  # which wants a gradient


def large():
    yield sample(700, (60, 60), torch.float32, 6, probe=seed(2))
    yield sample(700, (60,), torch.float32, 6, method="exact")
    yield sample(40, (64, 60, 5), torch.float32, 2, own=True, gates=True, probe=1)


def traces(shapes, dtype):
    for shape in shapes:
        probe, product = (normal(*shape, seed=i, dtype=dtype) for i in (0, 1))
        yield Sample({"e": probe, "je": product}, with_norm=True)


CASES = [
    OpCase(
        field_divergence,
        field_divergence_reference,
        samples,
        small,
        floor=32,
        reason="sums of up to a thousand products in another order, through three layers (18 seen)",
        large=large,
        rows={"x": 0, "probe": 0, "biases": 0, "gates": 0},
        shares="products of wide fields are torch's, whose sums depend on the size of a batch",
    ),
    OpCase(
        hutchinson_trace,
        lambda e, je, with_norm: hutchinson_trace_reference(e, je),
        lambda dtype: traces(
            [*EMPTY, (1, 1), (127, 3), (3, 1000), (2, 3, 4, 5), (4, 5000)], dtype
        ),
        lambda dtype: traces([(3, 4), (3, 2, 2, 2)], dtype),
        floor=2,
        reason="a sum by pairs (1 seen)",
        large=lambda: traces([(300, 1000), (4000, 3)], torch.float32),
        rows={"e": 0, "je": 0},
    ),
]
