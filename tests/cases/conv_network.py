"""conv_network."""

import itertools

import torch
from laws import OpCase, Sample, normal

from pyflowkern.ops import conv_network, conv_network_reference

#: (inputs, channels of the layers, sides of the filters, residual, activate_last, with a context)
FORMS = {
    "Glow": (3, (7, 6, 4), (3, 1, 3), False, True, True),
    "two layers": (5, (13, 20), (3, 3), False, True, False),
    "pixel by pixel": (4, (6, 3), (1, 1), False, True, True),
    "residual": (2, (6, 6, 6, 6, 6, 5), (3, 3, 3, 3, 3, 1), True, True, True),
    "not activated": (2, (17, 17, 17, 33), (3, 3, 1, 1), True, False, False),
    "no blocks": (3, (8, 4), (1, 3), True, False, True),
}
#: Images of which several make a group, one does, and one is cut into bands; and how many.
SPACES = {(4, 4): 19, (5, 7): 7, (1, 1): 19, (2, 70): 3, (17, 16): 3}


def sample(form, n, space, dtype=torch.float64, channels_last=False):
    size, channels, sides, residual, activate_last, with_context = FORMS[form]
    layers = list(zip(itertools.pairwise((size, *channels)), sides, strict=True))
    x = normal(n, size, *space, dtype=dtype, seed=99)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    tensors = {
        "x": x,
        "weights": [
            normal(b, a, k, k, dtype=dtype, seed=i) * (2 / (a * k * k)) ** 0.5
            for i, ((a, b), k) in enumerate(layers)
        ],
        "biases": [0.3 * normal(b, dtype=dtype, seed=50 + i) for i, b in enumerate(channels)],
        "context": normal(n, channels[0], dtype=dtype, seed=98) if with_context else None,
    }
    return Sample(tensors, residual=residual, activate_last=activate_last)


CASES = [
    OpCase(
        conv_network,
        conv_network_reference,
        lambda dtype: (
            sample(f, n, s, dtype)
            for f in FORMS
            for s, most in SPACES.items()
            for n in (0, 1, most)
        ),
        lambda dtype: (sample(f, 3, (3, 4), dtype, last) for f in FORMS for last in (False, True)),
        floor=8,
        reason="sums over 800 pixels in another order, and a ReLU near its edge may go either way",
        large=lambda: [sample(f, 40, (8, 8), torch.float32) for f in FORMS],
        rows={"x": 0, "context": 0},
    ),
]
