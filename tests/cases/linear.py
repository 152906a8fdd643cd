"""invertible_linear and glow_step."""

import functools
import itertools

import torch
from laws import EMPTY, OpCase, Sample, normal

from pyflowkern.ops import (
    glow_step,
    glow_step_reference,
    invertible_linear,
    invertible_linear_reference,
)

SHAPES = [
    *[(1, 1), (3, 3), (129, 2), (5, 127), (2, 129), (1000, 10), (0, 4)],  # vectors, C > 128 too
    *[(2, 1, 127), (3, 12, 1), (2, 7, 129), (3, 48, 9, 3), (2, 128, 3, 3), (2, 4, 3, 2, 5)],
    *[(0, 6, 4, 4), (2, 6, 0), (3, 17, 6, 7)],
    *EMPTY,
]


@functools.cache
def matrix(c, inverse, device):
    """A matrix (or its inverse) whose singular values lie around one, and its log-determinant."""
    weight = torch.eye(c).double() + 0.4 / max(c, 1) ** 0.5 * normal(c, c, seed=1)
    return torch.linalg.inv(weight) if inverse else weight, torch.linalg.slogdet(weight)[1]


def sample(shape, dtype=torch.float64, inverse=False, bias=True, scale=False):
    """x and its parameters; those of glow_step with ``scale``."""
    c = shape[1]
    weight, log_abs_det = matrix(c, inverse, torch.get_default_device())
    tensors = {
        "x": normal(*shape, dtype=dtype),
        "weight": weight.to(dtype),
        "log_abs_det": log_abs_det.to(dtype),
        "bias": normal(c, dtype=dtype, seed=3) if bias else None,
    }
    if scale:
        tensors["log_scale"] = 0.5 * normal(c, dtype=dtype, seed=2)
    return Sample(tensors, inverse=inverse)


def samples(dtype, **options):
    for shape, inverse in itertools.product(SHAPES, (False, True)):
        found = sample(shape, dtype, inverse, **options)
        yield found
        if len(shape) == 4:
            x = found.tensors["x"].contiguous(memory_format=torch.channels_last)
            yield Sample({**found.tensors, "x": x}, inverse=inverse)


def small(dtype, **options):
    for shape, inverse in itertools.product(((3, 4), (3, 3, 2, 2)), (False, True)):
        yield sample(shape, dtype, inverse, **options)


def large(**options):
    return [
        sample(s, torch.float32, **options) for s in ((3000, 10), (9, 24, 16, 16), (9, 5, 4, 5))
    ]


CASES = [
    OpCase(
        invertible_linear,
        invertible_linear_reference,
        lambda dtype: (s for bias in (False, True) for s in samples(dtype, bias=bias)),
        lambda dtype: (s for bias in (True, False) for s in small(dtype, bias=bias)),
        floor=8,
        reason="gradients are sums over a thousand samples in another order (4 seen)",
        large=large,
        log_det=True,
    ),
    OpCase(
        glow_step,
        glow_step_reference,
        functools.partial(samples, scale=True),
        functools.partial(small, scale=True),
        floor=8,
        reason="as invertible_linear (4 seen)",
        large=functools.partial(large, scale=True),
        log_det=True,
    ),
]
