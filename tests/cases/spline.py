"""spline, rational_quadratic_spline and spline_coupling."""

import itertools

import torch
from laws import EMPTY, OpCase, Sample, few_elements, normal
from laws.ops import FLOATS

from pyflowkern.ops import (
    SplineMap,
    channel_split_sizes,
    rational_quadratic_spline,
    rational_quadratic_spline_reference,
    spline,
    spline_coupling,
    spline_coupling_reference,
    spline_reference,
)
from pyflowkern.ops.spline_map import KINDS, PARAMETERIZATIONS, TAILS

SPLITS = ["channel", "checkerboard", "mask", "channels"]


def every_map(bins=5, **options):
    """All combinations that exist."""
    found = []
    for kind, tails, parameterization in itertools.product(KINDS, TAILS, PARAMETERIZATIONS):
        try:
            found.append(
                SplineMap(kind, bins, tails=tails, parameterization=parameterization, **options)
            )
        except ValueError:
            continue
    return found


def inputs(smap, *shape, dtype=torch.float64):
    """Elements inside of the interval and, where there are tails, outside; parameters."""
    x = normal(*shape, seed=3).to(dtype)
    x = torch.sigmoid(x) if smap.tails == "none" else 2 * x
    return x, 0.5 * normal(*shape, smap.params, seed=1, dtype=dtype)


def sample(smap, *shape, dtype=torch.float64, **options):
    x, params = inputs(smap, *shape, dtype=dtype)
    return Sample({"x": x, "params": params}, spline_map=smap, **options)


def many_bins(bins):
    return [
        SplineMap(bins=bins),
        SplineMap(bins=bins, tails="circular", scale=0.3),
        SplineMap(bins=bins, tails="affine", parameterization="softclip", bound=5.0),
        SplineMap("quadratic", bins=max(bins, 3)),  # of two bins it is the identity
        SplineMap("cubic", bins=bins, tails="affine"),
    ]


SHAPES = [(1,), (5,), (3, 129), (127, 3), (2, 1000), (1, 2100), (2, 3, 4, 5)]


def samples(dtype):
    turn = FLOATS.index(dtype)
    for (i, smap), inverse in itertools.product(enumerate(every_map()), (False, True)):
        if (i + inverse + turn) % 2:  # the other one in the next dtype
            yield sample(smap, 7, 5, dtype=dtype, inverse=inverse)
        else:
            yield sample(smap, 3, 4, 2, dtype=dtype, inverse=inverse, elementwise=True)
    for shape in SHAPES:
        yield sample(SplineMap(bins=8), *shape, dtype=dtype)
    for shape, kind, inverse in itertools.product(EMPTY, KINDS, (False, True)):
        yield sample(SplineMap(kind, bins=3), *shape, dtype=dtype, inverse=inverse)
        if inverse:
            yield sample(SplineMap(kind, bins=3), *shape, dtype=dtype, elementwise=True)
    if dtype in (torch.float32, torch.float64):
        for bins, inverse in itertools.product((2, 3, 8, 16, 64), (False, True)):
            for smap in many_bins(bins):
                yield sample(smap, 9, 4, dtype=dtype, inverse=inverse)


def small(dtype):
    for i, smap in enumerate(every_map(3)):
        yield sample(smap, 3, 2, dtype=dtype, inverse=i % 2 == 1, elementwise=i == 0)


def of_parts(smap, *shape, dtype=torch.float64, **options):
    x, params = inputs(smap, *shape, dtype=dtype)
    names = ("widths", "heights", "derivatives")
    parts = dict(zip(names, (t.clone() for t in smap.split(params)), strict=True))
    return Sample({"x": x, **parts}, tails=smap.tails, **options)


def parts_samples(dtype):
    for shape, inverse in itertools.product(SHAPES + EMPTY, (False, True)):
        yield of_parts(SplineMap(bins=8), *shape, dtype=dtype, inverse=inverse)


def parts_small(dtype):
    for tails, inverse in itertools.product(("linear", "circular"), (False, True)):
        yield of_parts(SplineMap(bins=3, tails=tails), 3, 2, dtype=dtype, inverse=inverse)
    yield of_parts(SplineMap(bins=3), 3, 2, dtype=dtype, elementwise=True)


def coupling(split, shape, swap, dtype=torch.float64, smap=None, **options):
    smap = smap or SplineMap(bins=4)
    n, c, *space = shape
    moved, where = c, split
    if split == "channel":
        moved = channel_split_sizes(c, swap)[1]
    elif split == "mask":
        where = normal(c, *space, seed=3) > 0
    elif split == "channels":
        where = normal(c, seed=4) > 0
        where[0], where[1] = True, False
        moved = int((where ^ swap).sum())
    tensors = {
        "x": 2 * normal(*shape, dtype=dtype),
        "params": 0.5 * normal(n, moved * smap.params, *space, seed=1, dtype=dtype),
    }
    return Sample(tensors, spline_map=smap, split=where, swap=swap, **options)


def coupling_samples(dtype):
    turn = FLOATS.index(dtype)
    for (i, split), swap, (j, shape) in itertools.product(
        enumerate(SPLITS), (False, True), enumerate(((2, 6, 4, 5), (3, 5, 3, 3)))
    ):
        inverse = (i + swap + j + turn) % 2 == 1  # the other direction in the next dtype
        found = coupling(split, shape, swap, dtype, inverse=inverse)
        yield found
        yield found.map(
            lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        )
    for shape in ((0, 4), (1, 2), (129, 3), (64, 10), (2, 7, 11), (2, 3, 40, 40)):
        for split, swap in itertools.product(("channel", "channels"), (False, True)):
            yield coupling(split, shape, swap, dtype)
    for (shape, mask, swap), inverse in itertools.product(few_elements(), (False, True)):
        yield coupling(mask, shape, swap, dtype, SplineMap(bins=3), inverse=inverse)
    for kind in KINDS:
        yield coupling("channel", (3, 4, 3, 5), False, dtype, SplineMap(kind, bins=5))


def coupling_small(dtype):
    for split, inverse in itertools.product(SPLITS, (False, True)):
        shape = (3, 3, 2, 1) if split != "channels" else (3, 3)
        yield coupling(split, shape, inverse, dtype, SplineMap(bins=2), inverse=inverse)


REASON = "a bin of a fiftieth of the interval makes 50 of one rounding of x, and another element is hit (82 seen)"
CASES = [
    OpCase(
        spline,
        spline_reference,
        samples,
        small,
        floor=128,
        reason=REASON,
        conditioned=4,
        large=lambda: [sample(SplineMap(bins=8), 400, 33, dtype=torch.float32)],
        rows={"x": 0, "params": 0},
        log_det=True,
    ),
    OpCase(
        rational_quadratic_spline,
        rational_quadratic_spline_reference,
        parts_samples,
        parts_small,
        floor=128,
        reason=REASON,
        conditioned=2,
        large=lambda: [of_parts(SplineMap(bins=8), 400, 33, dtype=torch.float32)],
        rows={"x": 0, "widths": 0, "heights": 0, "derivatives": 0},
        log_det=True,
    ),
    OpCase(
        spline_coupling,
        spline_coupling_reference,
        coupling_samples,
        coupling_small,
        floor=128,
        reason=REASON,
        conditioned=2,
        large=lambda: [
            coupling("channel", (2000, 10), False, torch.float32),
            coupling("checkerboard", (9, 3, 16, 16), False, torch.float32),
        ],
        rows={"x": 0, "params": 0},
        log_det=True,
    ),
]
