"""Known defects of libraries, as reports say them: what differs now, and what stays as it is there."""

from __future__ import annotations

__all__ = ["DEFECTS", "known_defect"]

_ROOTS = (
    "in float32 the library's inverse may be NaN or stop at an assertion, and a value on a bound of 32"
    " or more has no bin: here both have values"
)
_FIRST_BATCH = "as in the library, a first batch starts it in evaluation mode, too"
_UNBOUNDED = "as in the library, no scale has a bound, so that values may overflow; log-determinants do so there alone"
_DTYPE = "as in the library, log-dets are in torch's default dtype, except those within log_prob"

#: The beginning of a class's name in reports, what it contains, and what is to be said of it.
DEFECTS = (
    ("nflows.", "RationalQuadratic", _ROOTS),
    (
        "nflows.",
        "PiecewiseCubic",
        "the inverse is exact to rounding; the library's solves its cubic equations to 1e-6",
    ),
    (
        "nflows.",
        "PiecewiseLinear",
        "the inverse is exact to rounding; the library's is off in the last bin, by 1e-4",
    ),
    (
        "nflows.NaiveLinear",
        "",
        "nflows 0.14 inverts it by a function that torch no longer has: alone it raises, in one op it does not",
    ),
    ("normflows.", "RationalQuadratic", _ROOTS),
    (
        "normflows.MaskedAffineFlow",
        "",
        "where a scale of a feature that passes overflows, the library makes NaN of the feature: here it passes",
    ),
    ("normflows.AffineCouplingBlock", "", _UNBOUNDED),
    ("normflows.GlowBlock", "", f"{_FIRST_BATCH}; {_UNBOUNDED}"),
    ("normflows.ActNorm", "", _FIRST_BATCH),
    ("normflows.NormalizingFlow", "", _DTYPE),
    ("normflows.ConditionalNormalizingFlow", "", _DTYPE),
    ("zuko.FFJTransform", "", "as in zuko, there are no second derivatives"),
    (
        "FrEIA.",
        "RationalQuadraticSpline",
        "where the library raises for a negative discriminant, values come out",
    ),
    (
        "FrEIA.ActNorm",
        "",
        f"{_FIRST_BATCH}, and features without variance make NaN",
    ),
    ("glow.Flow", "", "as in the script, a first batch starts it in evaluation mode, too"),
)


def known_defect(kind: str) -> str:
    """Return what is to be said of a class, as reports call it; empty where nothing is known."""
    return next(
        (text for start, part, text in DEFECTS if kind.startswith(start) and part in kind), ""
    )
