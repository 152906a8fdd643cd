"""field_loss: the squared error of a field, with its gradients from the same pass."""

import itertools

import torch
from laws import OpCase, Sample, normal

from pyflowkern.core.activations import ACTIVATIONS
from pyflowkern.ops.field_loss import field_loss, field_loss_reference

#: (states, widths of the layers, inputs of every layer)
FORMS = {
    "narrow": (3, (7, 3), 1),
    "whole vectors": (2, (64, 64, 64, 2), 1),
    "context": (5, (20, 33, 5), 4),
    "nothing joined": (17, (16, 48, 9), 0),
    "one layer": (3, (3,), 1),
    "wide": (130, (200, 129), 2),
    "beyond the kernel": (3, (600, 3), 1),
    "no units": (3, (0, 4), 1),
    "no outputs": (3, (4, 0), 1),
}


def sample(form, n, dtype=torch.float64, activation="tanh", factors=False, inputs=False):
    """Arguments; with ``inputs`` states, targets and what is joined are differentiated, too."""
    size, widths, joined = FORMS[form]
    pairs = list(enumerate(itertools.pairwise((size, *widths))))
    given = {"x": normal(n, size, dtype=dtype), "target": normal(n, widths[-1], dtype=dtype)}
    given["joined"] = normal(n, joined, seed=98, dtype=dtype) if joined else None
    tensors = {
        "weights": [normal(b, a, seed=i, dtype=dtype) / max(a, 1) ** 0.5 for i, (a, b) in pairs],
        "biases": [normal(b, seed=50 + i, dtype=dtype) for i, (_, b) in pairs],
        "rows": [normal(joined, b, seed=90 + i, dtype=dtype) for i, (_, b) in pairs],
    }
    if not joined:
        tensors["rows"] = []
    fixed = {"activation": activation}
    if factors:
        fixed["scale"] = normal(n, seed=20, dtype=dtype)
        fixed["weight"] = normal(n, seed=21, dtype=dtype).exp()
    return Sample(tensors | given, **fixed) if inputs else Sample(tensors, **given, **fixed)


def samples(dtype):
    for form, (n, factors) in itertools.product(FORMS, ((0, False), (1, True), (37, False))):
        yield sample(form, n, dtype, factors=factors)
    for n in (129, 1000, 2000):  # several tasks, several tiles of a task
        yield sample("whole vectors", n, dtype, factors=True)
        yield sample("context", n, dtype, inputs=True)
    for activation in ACTIVATIONS:
        yield sample("narrow", 40, dtype, activation, inputs=True)


def small(dtype):
    for form, inputs in (("narrow", False), ("context", True), ("nothing joined", True)):
        yield sample(form, 3, dtype, "silu", factors=True, inputs=inputs)


CASES = [
    OpCase(
        field_loss,
        field_loss_reference,
        samples,
        small,
        floor=8,
        reason="sums of 200 products and 2000 samples in another order (4 seen)",
        large=lambda: [
            sample(form, 2000, torch.float32, inputs=inputs)
            for form, inputs in (("whole vectors", False), ("context", True))
        ],
        rows={},
        whole="a mean over the whole batch",
        dtypes=(torch.float32, torch.float64),
    ),
]
