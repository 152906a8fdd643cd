"""dequantize, quantize and logit."""

import itertools

import torch
from laws import EMPTY, OpCase, Sample, unit

from pyflowkern.ops import (
    dequantize,
    dequantize_reference,
    logit,
    logit_reference,
    quantize,
    quantize_reference,
)

SIZES = [1, 3, 127, 129, 1000]


def bytes_like(*shape, bits=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 2**bits, shape, generator=g, device="cpu").to(torch.uint8)
    return x.to(torch.get_default_device())


def logits(shape, dtype, inverse, alpha=0.05):
    x = 0.05 + 0.9 * unit(*shape, seed=shape[-1])
    return Sample({"x": (8 * x - 4 if inverse else x).to(dtype)}, inverse=inverse, alpha=alpha)


def logit_samples(dtype):
    for size, inverse, alpha in itertools.product(SIZES, (False, True), (0.0, 0.05)):
        yield logits((4, size), dtype, inverse, alpha)
    for shape, inverse in itertools.product(EMPTY, (False, True)):
        yield logits(shape, dtype, inverse)
    for inverse in (False, True):
        sample = logits((4, 3, 11, 5), dtype, inverse)
        yield sample
        yield sample.map(lambda t: t.contiguous(memory_format=torch.channels_last))


def logit_small(dtype):
    for shape, inverse in itertools.product(((3, 4), (3, 2, 2, 3)), (False, True)):
        yield logits(shape, dtype, inverse)


def dequantized(shapes, alphas=(None, 0.05)):
    for shape, alpha, bits in itertools.product(shapes, alphas, (8, 5, 1)):
        yield Sample({}, x=bytes_like(*shape, bits=bits), bits=bits, alpha=alpha, seed=7)


CASES = [
    OpCase(
        logit,
        logit_reference,
        logit_samples,
        logit_small,
        floor=4,
        reason="logarithms that differ by a rounding, summed in another order (2 seen)",
        large=lambda: [
            logits((40, n), torch.float32, i) for n in (3, 129, 700, 40_000) for i in (False, True)
        ],
        log_det=True,
    ),
    OpCase(
        dequantize,
        dequantize_reference,
        lambda dtype: dequantized([*((5, n) for n in SIZES), *EMPTY]),
        lambda dtype: dequantized([(3, 4), (3, 2, 2, 3)]),
        floor=4,
        reason="as logit: the noise is exact (2 seen)",
        large=lambda: dequantized([(7, 3, 45, 41)]),
        placed="the noise of a sample is that of its place",
        dtypes=(torch.float32,),
    ),
    OpCase(
        quantize,
        quantize_reference,
        lambda dtype: [
            Sample({}, y=logits(shape, dtype, a is not None).tensors["x"], alpha=a)
            for shape in (*((5, n) for n in SIZES), *EMPTY)
            for a in (None, 0.05)
        ],
        lambda dtype: [Sample({}, y=unit(3, 4, dtype=dtype), alpha=a) for a in (None, 0.05)],
        floor=0,
        reason="integers",
        large=lambda: [Sample({}, y=unit(5, 40_000, dtype=torch.float32))],
        rows={"y": 0},
    ),
]
