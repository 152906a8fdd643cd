"""euler_maruyama and add_noise."""

import torch
from laws import OpCase, Sample, normal

from pyflowkern.ops import (
    add_noise,
    add_noise_reference,
    euler_maruyama,
    euler_maruyama_reference,
)

SHAPES = [(1,), (7,), (3, 5), (512, 2), (2, 3, 129), (1030,), (70_000,), (5, 2000)]
EMPTY = [(0,), (0, 3), (3, 0)]


def stepped(shapes, dtype):
    for i, shape in enumerate(shapes):
        x, u, v = (normal(*shape, seed=s).to(dtype) for s in (1, 2, 3))
        fixed = {"step": (-1) ** i * 0.3, "sigma": 0.7, "index": 5 * i, "seed": 11 + i}
        yield Sample({"x": x, "drift": u}, **fixed)
        yield Sample({"x": x, "drift": u, "other": v}, **fixed)


def noised(shapes, dtype):
    for i, shape in enumerate(shapes):
        yield Sample({"x": normal(*shape, seed=1).to(dtype)}, scale=-1.5, index=i, seed=11 + i)


COMMON = {
    "floor": 4,
    "reason": "the logarithm, sine and cosine of the noise, and the sum of three terms (1.6 seen)",
    "placed": "the noise of a sample is that of its place",
}
CASES = [
    OpCase(
        euler_maruyama,
        euler_maruyama_reference,
        lambda dtype: stepped(SHAPES + EMPTY, dtype),
        lambda dtype: stepped([(3, 2), (3, 2, 2)], dtype),
        large=lambda: stepped([(150_001,), (40, 5001)], torch.float32),
        rows={"x": 0, "drift": 0, "other": 0},
        **COMMON,
    ),
    OpCase(
        add_noise,
        add_noise_reference,
        lambda dtype: noised(SHAPES + EMPTY, dtype),
        lambda dtype: noised([(3, 2), (3, 2, 2)], dtype),
        large=lambda: noised([(150_001,), (40, 5001)], torch.float32),
        **COMMON,
    ),
]
