"""What to expect of accelerated transforms: ratios of times that committed benches show."""

from __future__ import annotations

__all__ = ["expected_gain"]

#: The beginning of a transform's name in reports, what it contains, and how many times faster flows of such transforms
#: were on two cores (``python -m bench.clients.table``): a training step with its optimizer, and samples.
_GAINS = (
    ("nflows.Piecewise", "RationalQuadratic", "5-6.2x a step, 8-10x samples"),
    ("nflows.Masked", "Affine", "2.1-2.4x a step, 17-45x samples"),
    ("nflows.AffineCoupling", "", "1.6x a step, 2.1x samples"),
    ("zuko.MaskedAutoregressive", "", "2.3-6.7x a step, 12-209x samples"),
    ("zuko.GeneralCoupling", "", "3.1-8.3x a step, 3.7-21x samples"),
    ("normflows.", "Autoregressive", "4.5-14x a step, 2.1-12x samples"),
    ("normflows.", "Spline", "7.3x a step, 14x samples"),
    ("normflows.AffineCoupling", "", "3.3x a step, 2.7x samples"),
    ("normflows.GlowBlock", "", "1.6x a step, 1.8x samples"),
    ("FrEIA.GLOWCoupling", "", "1.8x a step, 1.8x samples"),
    ("FrEIA.AllInOne", "", "1.6-2x a step, 1.4-2x samples"),
)


def expected_gain(kind: str) -> str:
    """Return what to expect of transforms of a kind, as reports call it; empty where nothing was measured."""
    return next(
        (gain for start, part, gain in _GAINS if kind.startswith(start) and part in kind), ""
    )
