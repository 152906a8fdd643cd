"""relu_network."""

import itertools

import torch
from laws import OpCase, Sample, normal

from pyflowkern.ops import relu_network, relu_network_reference

#: (inputs, widths of the layers, residual, activate_last, with a context)
FORMS = {
    "plain": (3, (6, 5, 4), False, True, True),
    "one hidden layer": (3, (127, 1), False, True, False),
    "residual": (4, (17, 17, 17, 17, 17, 9), True, True, True),
    "not activated": (2, (64, 64, 64, 33), True, False, False),
    "no blocks": (3, (8, 4), True, False, True),
    "wide": (130, (300, 257, 129), False, True, False),
}
WITHOUT = {
    "inputs": (0, (4, 2), False, True, False),
    "units": (3, (0, 0, 2), False, True, True),
}


def sample(form, n, dtype=torch.float64):
    size, widths, residual, activate_last, with_context = (FORMS | WITHOUT)[form]
    pairs = list(enumerate(itertools.pairwise((size, *widths))))
    tensors = {
        "x": normal(n, size, dtype=dtype, seed=99),
        "weights": [
            normal(b, a, dtype=dtype, seed=i) * (2 / max(a, 1)) ** 0.5 for i, (a, b) in pairs
        ],
        "biases": [0.3 * normal(b, dtype=dtype, seed=50 + i) for i, (_, b) in pairs],
        "context": normal(n, widths[0], dtype=dtype, seed=98) if with_context else None,
    }
    return Sample(tensors, residual=residual, activate_last=activate_last)


CASES = [
    OpCase(
        relu_network,
        relu_network_reference,
        lambda dtype: (sample(f, n, dtype) for f in FORMS | WITHOUT for n in (0, 1, 97, 1000)),
        lambda dtype: (sample(f, 4, dtype) for f in FORMS if f != "wide"),
        floor=8,
        reason="sums of 300 products in another order, and a ReLU near its edge may go either way (2 seen)",
        large=lambda: [sample(f, 1000, torch.float32) for f in FORMS],
        rows={"x": 0, "context": 0},
    ),
]
