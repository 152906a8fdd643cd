"""What to expect of accelerated transforms: ratios of times that committed benches show."""

from __future__ import annotations

__all__ = ["expected_gain"]

#: The beginning of a transform's name in reports, what it contains, and how many times faster flows of such transforms
#: were on two cores (``python -m bench.clients.table``): a training step with its optimizer, and samples.
_GAINS = (
    ("nflows.Piecewise", "RationalQuadratic", "5.7-6.2x a step, 8-12x samples"),
    ("nflows.Masked", "Affine", "2.6x a step, 16-45x samples"),
    ("nflows.AffineCoupling", "", "2x a step, 2.4x samples"),
    ("zuko.MaskedAutoregressive", "", "2.7-7x a step, 12-200x samples"),
    ("zuko.GeneralCoupling", "", "3.6x a step, 4x samples"),
    ("normflows.", "Autoregressive", "4.7-10x a step, 2-11x samples"),
    ("normflows.", "Spline", "7x a step, 14x samples"),
    ("normflows.AffineCoupling", "", "2.7x a step, 2.7x samples"),
    ("normflows.GlowBlock", "", "1.6x a step, 1.7x samples"),
    ("FrEIA.GLOWCoupling", "", "1.8x a step, 1.8x samples"),
    ("FrEIA.AllInOne", "", "1.6-2.2x a step, 1.5-1.9x samples"),
)


def expected_gain(kind: str) -> str:
    """Return what to expect of transforms of a kind, as reports call it; empty where nothing was measured."""
    return next(
        (gain for start, part, gain in _GAINS if kind.startswith(start) and part in kind), ""
    )
