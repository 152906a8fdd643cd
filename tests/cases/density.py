"""normal_log_prob and bits_per_dim."""

import itertools

import torch
from laws import EMPTY, OpCase, Sample, normal

from pyflowkern.ops import (
    bits_per_dim,
    bits_per_dim_reference,
    normal_log_prob,
    normal_log_prob_reference,
)

KINDS = [None, "event", "element"]
SHAPES = [
    (4, 1),
    (70, 3),
    (3, 127),
    (3, 129),
    (2, 1000),
    (31, 1030),
    (5, 3, 9, 7),
    (2, 4100),
    (6,),
    *EMPTY,
]


def sample(shape, mean, log_std, dtype, log_det=True):
    """A latent with a mean and a log-deviation: none, of the event, or of each element."""

    def parameter(kind, seed):
        if kind is None:
            return None
        return 0.5 * normal(*(shape if kind == "element" else shape[1:]), seed=seed, dtype=dtype)

    tensors = {
        "z": normal(*shape, dtype=dtype),
        "mean": parameter(mean, 1),
        "log_std": parameter(log_std, 2),
        "log_det": normal(shape[0], seed=3, dtype=dtype) if log_det else None,
    }
    return Sample(tensors)


def samples(dtype):
    for shape, mean, log_std in itertools.product(SHAPES, KINDS, KINDS):
        yield sample(shape, mean, log_std, dtype)


def small(dtype):
    for mean, log_std in itertools.product(KINDS, KINDS):
        yield sample((3, 2, 2), mean, log_std, dtype, log_det=mean != log_std)


def image(mean, log_std):
    return sample((67, 3, 33, 31), mean, log_std, torch.float32)


CASES = [
    OpCase(
        normal_log_prob,
        normal_log_prob_reference,
        samples,
        small,
        floor=4,
        reason="terms are summed in another order (2 seen)",
        large=lambda: [
            image("event", "event"),
            *(sample((40, n), "event", None, torch.float32) for n in (3, 700, 40_000)),
        ],
        rows={"z": 0, "mean": 0, "log_std": 0, "log_det": 0},
    ),
    OpCase(
        bits_per_dim,
        bits_per_dim_reference,
        lambda dtype: [Sample({"log_prob": normal(70, dtype=dtype)}, dims=3072)],
        lambda dtype: [Sample({"log_prob": normal(5, dtype=dtype)}, dims=3)],
        floor=1,
        reason="one product, the same as the reference's",
        large=lambda: [Sample({"log_prob": normal(300_000, dtype=torch.float32)}, dims=3072)],
        rows={"log_prob": 0},
    ),
]
