"""slogdet_inverse, plu_matrix and householder_matrix."""

import math

import torch
from laws import OpCase, Sample, normal

from pyflowkern.ops import (
    householder_matrix,
    householder_matrix_reference,
    plu_matrix,
    plu_matrix_reference,
    slogdet_inverse,
    slogdet_inverse_reference,
)

SIZES = [0, 1, 2, 3, 7, 10, 48, 127, 128, 129]  # the last is the reference's


def rotations(*shape, seed=0):
    return torch.linalg.qr(normal(*shape, seed=seed))[0]


def conditioned(batch, c, condition, seed=0):
    """Matrices with singular values from 1 down to 1 / condition."""
    values = torch.logspace(0, -math.log10(condition), c, dtype=torch.float64)
    shape = (*batch, c, c)
    return rotations(*shape, seed=seed) * values @ rotations(*shape, seed=seed + 1)


def weights(dtype):
    for c in SIZES:
        for batch in ((), (0,), (5,), (2, 3), (2, 0)) if c < 10 else ((3,),):
            for condition in (10.0, 1e3)[
                : 1 if dtype == torch.float16 else 2
            ]:  # its gradient: 1e6
                yield Sample({"weight": conditioned(batch, c, condition, seed=c).to(dtype)})


def factors(c, dtype=torch.float64, seed=0, **options):
    """Arguments of plu_matrix; what the unread triangles hold must not matter."""
    scale = 0.7 / max(c, 1) ** 0.5
    lower, upper = (scale * normal(c, c, seed=seed + i) for i in (1, 2))
    tensors = {
        "lower": lower.tril(-1) + 1e6 * torch.ones(c, c).triu(),
        "upper": upper.triu(1) + 1e6 * torch.ones(c, c).tril(),
        "log_diag": 0.5 * normal(c, seed=seed + 3),
    }
    order = torch.randperm(c, generator=torch.Generator().manual_seed(seed), device="cpu")
    return Sample(
        {k: t.to(dtype) for k, t in tensors.items()},
        permutation=order.to(torch.get_default_device()),
        sign=normal(c, seed=seed + 4).sign().to(dtype),
        **options,
    )


def plu(sizes, dtype):
    return (factors(c, dtype, inverse=inverse) for c in sizes for inverse in (False, True))


def reflections(dtype):
    for k, c in ((1, 1), (0, 3), (2, 0), (2, 5), (7, 3), (48, 48), (129, 129)):
        vectors = normal(k, c, dtype=dtype, seed=k)
        if k > 1:
            vectors[1] = 0.0
        yield Sample({"vectors": vectors})


CASES = [
    OpCase(
        slogdet_inverse,
        slogdet_inverse_reference,
        weights,
        lambda dtype: [
            Sample({"weight": conditioned(b, 3, 10.0).to(dtype)}) for b in ((4,), (2, 2))
        ],
        floor=4,
        reason="the logarithms of 128 pivots are summed (2 seen)",
        conditioned=2,
        large=lambda: [Sample({"weight": normal(64, 48, 48).float()})],
        rows={"weight": 0},
    ),
    OpCase(
        plu_matrix,
        plu_matrix_reference,
        lambda dtype: plu(SIZES, dtype),
        lambda dtype: plu((4, 5), dtype),
        floor=4,
        reason="sums of 128 products in another order (2 seen)",
        large=lambda: [factors(128, torch.float32, inverse=i) for i in (False, True)],
        rows={},
        whole="one matrix",
        spreads=False,  # of its triangles one is read
    ),
    OpCase(
        householder_matrix,
        householder_matrix_reference,
        reflections,
        lambda dtype: [Sample({"vectors": normal(3, 4, dtype=dtype)})],
        floor=2,
        reason="the reference itself, against its own run in float64 (1 seen)",
        large=lambda: [Sample({"vectors": normal(200, 200).float()})],
        rows={},
        whole="one matrix",
    ),
]
