"""Random maps of elements."""

import math

from pyflowkern import ops
from pyflowkern.ops.scale_map import KINDS


def scale_map(draw):
    kind = draw.choice(KINDS)
    if draw.flag():
        return kind
    options = {"clamp": draw.number(0.1, 4), "gain": draw.number(0.1, 2)}
    if kind == "sigmoid" or kind.startswith("softplus"):
        options |= {"offset": draw.number(-2, 3), "eps": draw.choice((0.0, 1e-3))}
        options["max_scale"] = draw.choice((math.inf, 3.0))
    elif kind in ("exp", "additive", "softclip"):
        options = {}
    flags = {"shift_first": draw.flag(), "divide": draw.flag()}
    return ops.ScaleMap(kind, shift_gain=draw.choice((1.0, 0.1, -2.0)), **flags, **options)


def spline_map(draw):
    kind = draw.choice(("rational_quadratic",) * 3 + ("linear", "quadratic", "cubic"))
    rational = kind == "rational_quadratic"
    tails = draw.choice(("linear", "none", *(("circular",) if rational else ())))
    bins, bound = draw.choice((2, 3, 5, 8, 10, 17)), draw.choice((1.0, 3.0, 5.0))
    return ops.SplineMap(kind, bins, bound, tails)
