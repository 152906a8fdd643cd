"""rk_combine and rk_error, alone and in the ops of a stage, which put a slope into its row first."""

import functools

import torch
from laws import OpCase, Sample, normal
from laws.ops import STATES

from pyflowkern._library import kernel_serves
from pyflowkern.ops import rk_combine, rk_combine_reference, rk_error, rk_error_reference

SHAPES = [(1,), (7,), (3, 5), (512, 2), (2, 3, 129), (1030,), (70_000,), (5, 2000)]
EMPTY = [(0,), (0, 3), (3, 0), (0, 0)]
WEIGHTS = (0.2, 0.0, -1.5, 0.75, 0.0)  # one stage more is there, and not to be read
ALLOWED = {"rtol": 1e-3, "atol": 1e-4}


def make(shape, dtype=torch.float64, stages=6):
    """A state, the state after it and slopes."""
    y, slopes = normal(*shape, seed=1), normal(stages, *shape, seed=2)
    return y.to(dtype), (y + 0.1 * normal(*shape, seed=3)).to(dtype), slopes.to(dtype)


def steps(y, seed=4):
    return 0.1 + normal(y.shape[0], seed=seed).abs()


def combined(shape, dtype, step=None):
    y, _, slopes = make(shape, dtype)
    step = steps(y) if step is None else step
    tensors = {"y": y, "slopes": slopes}
    if isinstance(step, float):
        return Sample(tensors, weights=WEIGHTS, step=step)
    return Sample({**tensors, "step": step}, weights=WEIGHTS)


def errors(shape, dtype, step=None, **options):
    y, y1, slopes = make(shape, dtype)
    step = steps(y) if step is None else step
    tensors = {"y": y, "y1": y1, "slopes": slopes}
    return Sample({}, **tensors, weights=WEIGHTS, step=step, **ALLOWED, **options)


def every(make_sample, shapes, dtype):
    for shape in shapes:
        for step in (None, 0.3, torch.tensor(0.3, dtype=torch.float64)):
            yield make_sample(shape, dtype, step)


def staged(make_sample, shapes, dtype, row=2):
    """With a slope for a row, of its own dtype."""
    for shape in shapes:
        for step in (None, 0.3):
            sample = make_sample(shape, dtype, step)
            sample.tensors["slope"] = normal(*shape, seed=7)
            yield Sample(sample.tensors, **sample.fixed, row=row)


def stage(y, slopes, slope, weights, step, row):
    """The next argument by one op, which writes the slope into its row."""
    if not kernel_serves("rk_stage", y):
        return stage_reference(y, slopes, slope, weights, step, row)
    kept = slopes.detach().clone(memory_format=torch.contiguous_format)  # the solver's own
    value = torch.ops.pyflowkern.rk_stage.default(
        kept, slope.detach(), row, y.detach(), *_rest(weights, step)
    )
    return value, kept.movedim(1, 0)  # samples first


def last(y, y1, slopes, slope, weights, step, row, rtol, atol):
    """The norm of the error by one op, likewise."""
    if not kernel_serves("rk_last", y):
        return last_reference(y, y1, slopes, slope, weights, step, row, rtol, atol)
    kept = slopes.detach().clone(memory_format=torch.contiguous_format)  # the solver's own
    value = torch.ops.pyflowkern.rk_last.default(
        kept, slope.detach(), row, y, y1, *_rest(weights, step), rtol, atol, []
    )
    return value, kept.movedim(1, 0)


def _rest(weights, step):
    number, rows = (step, None) if isinstance(step, float) else (0.0, step.detach())
    return torch.tensor(weights, dtype=torch.float64, device="cpu"), number, rows


def _with_row(slopes, slope, row):
    parts = list(slopes.unbind())
    parts[row] = slope.to(slopes.dtype)
    return torch.stack(parts).detach()


def stage_reference(y, slopes, slope, weights, step, row):
    kept = _with_row(slopes, slope, row)
    step = step if isinstance(step, float) else step.detach()
    return rk_combine_reference(y.detach(), kept, weights, step), kept.movedim(1, 0)


def last_reference(y, y1, slopes, slope, weights, step, row, rtol, atol):
    kept = _with_row(slopes, slope, row)
    norm = rk_error_reference(y, y1, kept, weights, step, rtol=rtol, atol=atol)
    return norm, kept.movedim(1, 0)


COMMON = {"floor": 4}
REASON = "five terms, the step and the sum are rounded, and terms may cancel (1.5 seen)"
SMALL = [(3, 2), (3, 2, 2)]
CASES = [
    OpCase(
        rk_combine,
        rk_combine_reference,
        functools.partial(every, combined, SHAPES + EMPTY),
        functools.partial(every, combined, SMALL),
        reason=REASON,
        rows={"y": 0, "slopes": 1, "step": 0},
        large=lambda: [
            combined((150_001,), torch.float32, 0.3),
            combined((40, 5001), torch.float32),
        ],
        **COMMON,
    ),
    OpCase(
        rk_error,
        rk_error_reference,
        functools.partial(every, errors, SHAPES + EMPTY),
        functools.partial(every, errors, SMALL),
        reason=REASON,
        rows={"step": 0, "y": 0, "y1": 0, "slopes": 1},
        large=lambda: [errors((150_001,), torch.float32, 0.3), errors((40, 5001), torch.float32)],
        **COMMON,
    ),
    OpCase(
        stage,
        stage_reference,
        functools.partial(staged, combined, SHAPES),
        functools.partial(staged, combined, SMALL),
        reason=REASON,
        rows={"y": 0, "slopes": 1, "slope": 0, "step": 0},
        large=lambda: staged(combined, [(40, 5001)], torch.float32),
        dtypes=STATES,
        **COMMON,
    ),
    OpCase(
        last,
        last_reference,
        functools.partial(staged, errors, SHAPES),
        functools.partial(staged, errors, SMALL),
        reason=REASON,
        rows={"step": 0, "y": 0, "y1": 0, "slopes": 1, "slope": 0},
        large=lambda: staged(errors, [(40, 5001)], torch.float32),
        dtypes=STATES,
        **COMMON,
    ),
]
