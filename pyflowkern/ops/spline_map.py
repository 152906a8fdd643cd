"""Spline maps: which monotonic spline a flow uses, and how raw parameters become one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor

from pyflowkern.core.checks import check_choice, check_number
from pyflowkern.core.codes import (
    MOST_BINS,
    SplineKind,
    SplineParameterization,
    SplineTails,
    numbered,
)

__all__ = ["SplineMap"]

Kind = Literal["rational_quadratic", "linear", "quadratic", "cubic"]
Tails = Literal["linear", "circular", "none", "affine"]
Parameterization = Literal["softmax", "softclip", "domain"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TAILS: tuple[Tails, ...] = get_args(Tails)
PARAMETERIZATIONS: tuple[Parameterization, ...] = get_args(Parameterization)
_KIND_CODES, _TAIL_CODES = numbered(SplineKind), numbered(SplineTails)
_PARAMETERIZATION_CODES = numbered(SplineParameterization)
_NUMBERS = ("bound", "min_bin_width", "min_bin_height", "min_derivative", "scale", "edge")


@dataclass(frozen=True)
class SplineMap:
    r"""A monotonic spline of ``K`` bins over :math:`[-B, B]`, and its raw parameters.

    ================== ============================== ============ =====================================
    kind               raw numbers of an element      derivatives  source
    ================== ============================== ============ =====================================
    rational_quadratic K widths, K heights, knots' d  raw          Durkan et al. 2019
    linear             K heights                      of the bins  Müller et al. 2019
    quadratic          K widths, densities at knots   the same     Müller et al. 2019
    cubic              K widths, K heights, two ends  Steffen's    Durkan et al. 2019; Steffen 1990
    ================== ============================== ============ =====================================

    Outside of the interval, ``tails`` says what happens: ``linear`` is the identity, with derivative 1 at the ends
    (K - 1 raw derivatives); ``circular`` wraps the input into :math:`[-B, B)`, the two ends sharing one derivative (K);
    ``affine`` goes on straight with the derivatives of the ends (K + 1); ``none`` maps [0, 1] onto itself and gives
    NaN elsewhere (K + 1).

    With :math:`p = \text{softmax}(\text{scale}\,u)`, ``parameterization`` is

    - ``softmax`` (nflows, normflows): a bin takes ``min + (1 - K min) p`` of the interval, a derivative is
      ``min_derivative + softplus(u)``. There the raw sizes are divided by the root of the hidden width: ``scale``.
    - ``softclip`` (zuko): first ``u / (1 + |2 u / log(min_derivative)|)``, then a bin takes ``p``; a derivative is
      ``exp(u / (1 + |u / log(min_derivative)|))``. No least width or height.
    - ``domain`` (FrEIA): the interval is learned, and derivatives are ``min_derivative + softplus(u + c)``, 1 for
      ``u = 0`` (FrEIA has no least derivative). Affine tails: a bin is ``min + softplus(u + c)`` wide, ``2 B / K`` for
      ``u = 0``; lowest output and leftmost input are ``u - B``, and the tails have the slope of the whole. Linear
      tails: half the interval is ``B softplus(u + log(e - 1))``, of which a bin takes ``p``; as there is no least
      width, raw numbers of some tens make bins so small that log-dets and gradients overflow.

    Without a least width and height (0, or ``domain``) float32 cannot tell the edges of such bins apart: at raw numbers
    of about 20 values and log-derivatives stay finite and splines monotone (log-slopes end at 85), but the inverse
    need not come back to where it was, and many gradients are NaN or far off, by kernel and by reference alike. Keep
    the least sizes, or use float64.

    On the last axis of packed parameters lie the widths, the heights, then the derivatives, each from the left; under
    ``domain`` the numbers of the interval come before the derivatives: lowest output and leftmost input (affine tails),
    or the raw interval (linear tails).

    Args:
        kind: one of the names above.
        bins: ``K``, from 2 to 64.
        bound: ``B``.
        tails: linear, circular, none or affine.
        min_bin_width: least share of the interval that a bin is wide (``domain``: least width).
        min_bin_height: likewise of a height. For quadratic splines the least density.
        min_derivative: least derivative; for ``softclip`` the number in its logarithms.
        parameterization: softmax, softclip or domain; the last two for rational-quadratic splines alone.
        scale: factor on raw widths and heights.
        edge: weight of the two outer bins where quadratic splines with linear tails find the density of the ends;
            0.5 makes it 1, so that the tails go on smoothly, and 0.25 is what nflows 0.14 has.

    Raises:
        TypeError: for bins that are not an int, and numbers that are none.
        ValueError: for unknown names, numbers out of their range and combinations that do not exist.

    Example:
        >>> from pyflowkern.ops import SplineMap
        >>> SplineMap(bins=8).params  # 8 widths, 8 heights, 7 derivatives
        23
        >>> zuko = SplineMap(bins=8, bound=5.0, parameterization="softclip")
        >>> [part.shape[-1] for part in zuko.split(zuko.identity_raw())]
        [8, 8, 7]
    """

    kind: Kind = "rational_quadratic"
    bins: int = 8
    bound: float = 3.0
    tails: Tails = "linear"
    min_bin_width: float = 1e-3
    min_bin_height: float = 1e-3
    min_derivative: float = 1e-3
    parameterization: Parameterization = "softmax"
    scale: float = 1.0
    edge: float = 0.5
    #: Made once: each call of an op asks for them.
    _sizes: tuple[int, int, int] = field(init=False, repr=False, compare=False)
    _params: int = field(init=False, repr=False, compare=False)
    _form: tuple[int, int, int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_choice("tails", self.tails, TAILS)
        check_choice("parameterization", self.parameterization, PARAMETERIZATIONS)
        if isinstance(self.bins, bool) or not isinstance(self.bins, (Integral, torch.SymInt)):
            raise TypeError(f"bins must be an int, got {type(self.bins).__name__}")
        if not isinstance(self.bins, (int, torch.SymInt)):
            object.__setattr__(self, "bins", int(self.bins))
        for name in _NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, (float, torch.SymFloat)):
                object.__setattr__(self, name, check_number(name, value))
        if not 2 <= self.bins <= MOST_BINS:
            raise ValueError(f"bins must be from 2 to {MOST_BINS}, got {self.bins}")
        for name, value in (("bound", self.bound), ("scale", self.scale)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not 0 <= self.min_derivative < 1:
            raise ValueError(
                f"min_derivative must be at least 0 and below 1, got {self.min_derivative}"
            )
        if not 0 <= self.edge <= 0.5:
            raise ValueError(f"edge must be from 0 to 0.5, got {self.edge}")
        self._check_combination()
        self._check_least_sizes()
        sizes = self._count()
        form = (
            _KIND_CODES[self.kind],
            _TAIL_CODES[self.tails],
            _PARAMETERIZATION_CODES[self.parameterization],
            self.bins,
        )
        for name, value in (("_sizes", sizes), ("_params", sum(sizes)), ("_form", form)):
            object.__setattr__(self, name, value)

    def _check_combination(self) -> None:
        what = self.parameterization
        if self.kind != "rational_quadratic" and what != "softmax":
            raise ValueError(
                f"parameterization {what!r} belongs to rational_quadratic, not {self.kind!r}"
            )
        if what == "domain" and self.tails not in ("linear", "affine"):
            raise ValueError(
                f"parameterization 'domain' has linear or affine tails, not {self.tails!r}"
            )
        if what == "softclip" and self.min_derivative == 0:
            raise ValueError("min_derivative must be positive for parameterization 'softclip'")
        if self.kind == "cubic" and self.tails == "circular":
            raise ValueError("cubic splines have no circular tails")

    def _check_least_sizes(self) -> None:
        whole = 2 * self.bound if self.parameterization == "domain" else 1.0
        bins = 1 if self.kind == "quadratic" else self.bins
        for name, value, count in (
            ("min_bin_width", self.min_bin_width, self.bins),
            ("min_bin_height", self.min_bin_height, bins),
        ):
            if not 0 <= value * count < whole:
                raise ValueError(
                    f"{name} must be at least 0 and below {whole / count:.4g} for {self.bins} bins, got {value}"
                )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many raw widths, heights and derivatives an element has."""
        return self._sizes

    def _count(self) -> tuple[int, int, int]:
        k = self.bins
        knots = {"linear": k - 1, "circular": k, "none": k + 1, "affine": k + 1}[self.tails]
        if self.kind == "linear":
            return 0, k, 0
        if self.kind == "quadratic":
            return k, knots, 0
        if self.kind == "cubic":
            return k, k, 2
        if self.parameterization == "domain":  # the interval's numbers, and the inner knots
            return k, k, k - 1 + self.domain_numbers
        return k, k, knots

    @property
    def domain_numbers(self) -> int:
        """How many raw numbers say where the interval lies; they precede the derivatives."""
        if self.parameterization != "domain":
            return 0
        return 2 if self.tails == "affine" else 1

    @property
    def params(self) -> int:
        """How many raw numbers an element has."""
        return self._params

    @property
    def derivatives(self) -> int:
        """How many of them are derivatives (and numbers of the interval)."""
        return self.sizes[2]

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the interval, where it is not learned."""
        return (0.0, 1.0) if self.tails == "none" else (-self.bound, self.bound)

    @property
    def form(self) -> tuple[int, int, int, int]:
        """Kind, tails and parameterization as the kernels number them (see ``core.codes``), and bins."""
        return self._form

    @property
    def numbers(self) -> list[float]:
        """The constants as the kernels take them."""
        least = self.min_bin_width, self.min_bin_height, self.min_derivative
        return [self.bound, *least, self.scale, self.edge]

    def split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return widths, heights and derivatives as views of packed parameters.

        Raises:
            ValueError: if the last axis is not ``params`` long.
        """
        if params.shape[-1] != self.params:
            raise ValueError(
                f"params must have {self.params} numbers on the last axis, got shape {tuple(params.shape)}"
            )
        widths, heights, derivatives = torch.split(params, list(self.sizes), -1)
        return widths, heights, derivatives

    def identity_raw(self) -> Tensor:
        """Return raw parameters, ``[params]``, for which the spline is the identity."""
        raw = torch.zeros(self.params)
        if self.kind == "cubic":
            raw[-2:] = -math.log(2.0)  # three times the sigmoid is 1
        elif self.kind == "rational_quadratic" and self.parameterization == "softmax":
            raw[2 * self.bins :] = math.log(math.expm1(1 - self.min_derivative))
        return raw


def spline_map_of(form: Sequence[int], numbers: Sequence[float]) -> SplineMap:
    """Return the map whose form and numbers these are."""
    kind, tails, parameterization, bins = form
    bound, width, height, derivative, scale, edge = numbers
    return SplineMap(
        KINDS[kind],
        bins,
        bound,
        TAILS[tails],
        width,
        height,
        derivative,
        PARAMETERIZATIONS[parameterization],
        scale,
        edge,
    )
