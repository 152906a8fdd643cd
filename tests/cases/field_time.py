"""at_time: biases and gates of a field's layers at a time."""

import torch
from laws import OpCase, Sample, normal

from pyflowkern.ops.field_time import at_time, at_time_reference


def sample(rows, dtype, sizes=(5, 64, 1, 17, 300), times=()):
    """A time, or one of each sample, and biases and rows of times of every layer."""
    tensors = {
        "time": 0.3 + normal(*times, dtype=dtype) / 4,
        "biases": [normal(n, seed=i, dtype=dtype) for i, n in enumerate(sizes)],
        "rows": [normal(rows, n, seed=50 + i, dtype=dtype) for i, n in enumerate(sizes)],
    }
    return Sample(tensors)


def samples(dtype):
    for rows in (1, 3):  # "concat" and "concatsquash"
        yield sample(rows, dtype)
        # as many layers as one call takes, and more
        for sizes in ((1,), (7,) * 16, (3,) * 17, (0,)):
            yield sample(rows, dtype, sizes)
        for times in ((0,), (6,)):
            yield sample(rows, dtype, (4, 17, 0), times)


CASES = [
    OpCase(
        at_time,
        at_time_reference,
        samples,
        lambda dtype: [sample(r, dtype, (2, 5), times) for r in (1, 3) for times in ((), (3,))],
        floor=4,
        reason="the gradient of the time is a sum over all units in another order (2.2 seen)",
        large=lambda: [sample(3, torch.float32, (4000,) * 5)],
        rows={"time": 0},
        dtypes=(torch.float32, torch.float64),
    ),
]
