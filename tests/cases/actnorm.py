"""actnorm and channel_moments."""

import itertools

import torch
from laws import EMPTY, OpCase, Sample, normal

from pyflowkern.ops import actnorm, actnorm_reference, channel_moments, channel_moments_reference

SHAPES = [
    *[(3, 1), (64, 10), (127, 3), (2, 129), (1, 1000), (2, 3, 7), (7, 6, 8, 8), (3, 5, 3, 3)],
    *[(65, 63), (65, 65)],  # the last that repeat their constants, and those that do not
    *[(70, 331), (2, 97, 3, 3), (0, 4, 2, 2)],
    *EMPTY,
]


def sample(shape, dtype, **options):
    work = torch.promote_types(dtype, torch.float32)
    scale, bias = (0.5 * normal(shape[1], seed=s, dtype=work) for s in (1, 2))
    return Sample({"x": normal(*shape, dtype=dtype), "log_scale": scale, "bias": bias}, **options)


def samples(dtype):
    for shape, inverse in itertools.product(SHAPES, (False, True)):
        yield sample(shape, dtype, inverse=inverse)
        if len(shape) == 4:
            x = sample(shape, dtype, inverse=inverse)
            x.tensors["x"] = x.tensors["x"].contiguous(memory_format=torch.channels_last)
            yield x


def small(dtype):
    for shape, inverse in itertools.product(((3, 4), (3, 2, 2, 3)), (False, True)):
        yield sample(shape, dtype, inverse=inverse)


def moments(dtype):
    for shape in SHAPES:
        yield Sample({}, x=normal(*shape, dtype=dtype) + 3)


CASES = [
    OpCase(
        actnorm,
        actnorm_reference,
        samples,
        small,
        floor=4,
        reason="a sum, an exponential and a product; sums over channels in another order (2 seen)",
        large=lambda: [sample(s, torch.float32) for s in ((64, 8, 32, 32), (20_000, 10))],
        log_det=True,
    ),
    OpCase(
        channel_moments,
        channel_moments_reference,
        moments,
        lambda dtype: [Sample({}, x=normal(*s, dtype=dtype)) for s in ((5, 3), (3, 2, 2, 3))],
        floor=4,
        reason="merged sums round the mean and the variance a few times (2 seen)",
        large=lambda: [Sample({}, x=normal(*s).float()) for s in ((64, 8, 32, 32), (20_000, 10))],
        rows={},
        whole="moments are those of the whole batch",
    ),
]
