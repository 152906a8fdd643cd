"""Scale maps: how an affine flow turns an unconstrained parameter into a positive scale."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from pyflowkern.core.activations import softplus
from pyflowkern.core.checks import check_choice, check_flag, check_number
from pyflowkern.core.codes import AffineFlag, ScaleKind, numbered

__all__ = ["ScaleMap", "scale_map"]

_NO_LIMIT = sys.float_info.max

Kind = Literal[
    "exp",
    "tanh",
    "atan",
    "sigmoid",
    "softplus",
    "softclip",
    "additive",
    "softplus_asinh",
    "softplus_tanh",
]
_CODES = numbered(ScaleKind)
KINDS: tuple[Kind, ...] = get_args(Kind)
_WITH_EPS = ("exp", "sigmoid", "softplus", "softplus_asinh", "softplus_tanh")
_UNIT = math.log(math.e - 1)  # softplus of it is 1
_SHIFT_FIRST, _DIVIDE = AffineFlag.SHIFT_FIRST.value, AffineFlag.DIVIDE.value


@dataclass(frozen=True)
class ScaleMap:
    r"""A map from a raw parameter ``u`` to a scale ``s > 0``, with :math:`v = \text{gain}\,u + \text{offset}`.

    ============== ========================================= =============================================
    kind           scale                                     used by
    ============== ========================================= =============================================
    exp            ``exp(v) + eps``                          normflows, survae, memcnn, torchflows
    tanh           ``exp(clamp tanh(v / clamp))``            RealNVP (Dinh et al. 2017), FrEIA (see below)
    atan           ``exp(0.636 clamp atan(v / clamp))``      FrEIA (see below; Ardizzone et al. 2019)
    sigmoid        ``max_scale sigmoid(v) + eps``            Glow (Kingma and Dhariwal 2018), nflows coupling,
                                                             both with offset 2
    softplus       ``min(softplus(v) + eps, max_scale)``     nflows MAF; nflows coupling with its general map
    softclip       ``exp(v / (1 + |v / clamp|))``            zuko
    additive       1                                         NICE (Dinh et al. 2014)
    softplus_asinh ``softplus(asinh(gain u) + offset)``      bayesflow: it grows like a logarithm
    softplus_tanh  ``softplus(clamp tanh(gain u / clamp)     bounded on both sides; s = 1 at u = 0 with
                   + offset)``                               offset ``log(e - 1)``
    ============== ========================================= =============================================

    The last two are held like softplus: ``min(. + eps, max_scale)``.

    FrEIA does not divide by the clamp inside: its couplings with clamp ``c`` are ``gain=c`` here for ATAN and
    TANH, and ``ScaleMap("tanh", clamp=c, gain=c / 2)`` for SIGMOID, because ``2 sigmoid(u) - 1 = tanh(u / 2)``.
    AllInOneBlock multiplies its network's output by 0.1: ``ScaleMap("tanh", clamp=c, gain=0.1 * c, shift_gain=0.1)``.

    Args:
        kind: one of the names above.
        clamp: bound of ``|log s|`` for tanh and softclip, 0.999 times it for atan; bound of the tanh of softplus_tanh.
        gain: factor on the raw parameter.
        offset: added after the gain.
        eps: least scale, added to exp, sigmoid and softplus scales.
        max_scale: upper limit of the softplus scales, with zero gradient beyond; none unless given. Factor of the
            sigmoid, 1 unless given.
        shift_gain: factor on the raw shift: ``y = s x + shift_gain t``.
        shift_first: ``y = s (x + t)`` instead of ``y = s x + t``.
        divide: use ``1 / s`` in place of ``s``.

    Raises:
        TypeError: for a constant that is not a number.
        ValueError: for an unknown kind, a constant that is not finite (max_scale may be inf), a clamp that is not
            positive, a negative eps, or a max_scale that is not above eps (for
            the sigmoid: above 0).

    Example:
        >>> from pyflowkern.ops import ScaleMap
        >>> ScaleMap("sigmoid", offset=2.0, eps=1e-3).kind  # nflows
        'sigmoid'
        >>> ScaleMap("atan", clamp=2.0, gain=2.0).kind  # FrEIA's GLOWCouplingBlock
        'atan'
        >>> ScaleMap("tanh", clamp=2.0, gain=0.2, shift_gain=0.1).kind  # FrEIA's AllInOneBlock
        'tanh'
    """

    kind: Kind
    clamp: float = 2.0
    gain: float = 1.0
    offset: float = 0.0
    eps: float = 0.0
    max_scale: float = math.inf
    shift_first: bool = False
    divide: bool = False
    shift_gain: float = 1.0

    def __post_init__(self) -> None:
        check_choice("scale_map", self.kind, KINDS)
        for name in ("clamp", "gain", "offset", "eps", "max_scale", "shift_gain"):
            value = check_number(name, getattr(self, name))
            object.__setattr__(self, name, value)
            if not (math.isfinite(value) or (name == "max_scale" and value == math.inf)):
                raise ValueError(f"{name} must be finite, got {value}")
        if self.kind == "sigmoid" and self.max_scale == math.inf:
            object.__setattr__(self, "max_scale", 1.0)
        for name in ("shift_first", "divide"):
            object.__setattr__(self, name, check_flag(name, getattr(self, name)))
        if not self.clamp > 0:
            raise ValueError(f"clamp must be positive, got {self.clamp}")
        if not self.max_scale > (0 if self.kind == "sigmoid" else self.eps):
            raise ValueError(f"max_scale must be above eps = {self.eps}, got {self.max_scale}")
        if self.eps < 0 or (self.eps > 0 and self.kind not in _WITH_EPS):
            raise ValueError(f"eps must be >= 0, and 0 for {self.kind!r}, got {self.eps}")
        if self.max_scale != math.inf and self.kind not in _WITH_EPS[1:]:
            raise ValueError(f"max_scale belongs to sigmoid and softplus maps, not {self.kind!r}")

    @property
    def code(self) -> int:
        """The kind as the kernels number it (:class:`~pyflowkern.core.codes.ScaleKind`)."""
        return _CODES[self.kind]

    @property
    def flags(self) -> int:
        """``shift_first`` and ``divide`` as bits of :class:`~pyflowkern.core.codes.AffineFlag`."""
        return _SHIFT_FIRST * self.shift_first + _DIVIDE * self.divide

    @property
    def numbers(self) -> list[float]:
        """The constants as the kernels take them: all finite, as files of compiled graphs hold no inf."""
        top = min(self.max_scale, _NO_LIMIT)
        return [self.clamp, self.gain, self.offset, self.eps, top, self.shift_gain]

    def log_scale(self, raw: Tensor) -> Tensor:
        """Return ``log s`` of the raw parameter, elementwise (before ``divide``)."""
        v = raw * self.gain + self.offset
        if self.kind == "exp":
            return v if self.eps == 0 else torch.log(torch.exp(v) + self.eps)
        if self.kind == "tanh":
            return self.clamp * torch.tanh(v / self.clamp)
        if self.kind == "atan":
            return 0.636 * self.clamp * torch.atan(v / self.clamp)
        if self.kind == "sigmoid":
            if self.eps == 0:
                return torch.nn.functional.logsigmoid(v) + math.log(self.max_scale)
            return torch.log(self.max_scale * torch.sigmoid(v) + self.eps)
        if self.kind == "softplus":
            return self._log_of_softplus(v)
        if self.kind == "softplus_asinh":
            return self._log_of_softplus(torch.asinh(raw * self.gain) + self.offset)
        if self.kind == "softplus_tanh":
            bounded = self.clamp * torch.tanh(raw * self.gain / self.clamp)
            return self._log_of_softplus(bounded + self.offset)
        if self.kind == "softclip":
            return v / (1 + torch.abs(v / self.clamp))
        return torch.zeros_like(raw)

    def identity_raw(self) -> float:
        r"""Return the raw parameter ``u`` with :math:`s(u) = 1`.

        Raises:
            ValueError: for a map that is never 1, such as a sigmoid whose ``max_scale + eps`` is not above 1.

        Example:
            >>> from pyflowkern.ops import ScaleMap
            >>> round(ScaleMap("softplus", eps=1e-3).identity_raw(), 4)
            0.5397
        """
        try:
            return self._raw_of_one()
        except (ValueError, ZeroDivisionError, OverflowError):
            raise ValueError(f"{self} must have a scale of 1 somewhere") from None

    def _raw_of_one(self) -> float:
        rest = 1 - self.eps
        if self.kind == "additive":
            return 0.0
        if self.kind == "exp":
            return (math.log(rest) - self.offset) / self.gain
        if self.kind == "sigmoid":
            share = rest / self.max_scale
            return (math.log(share) - math.log1p(-share) - self.offset) / self.gain
        if not self.kind.startswith("softplus"):
            return -self.offset / self.gain
        if self.max_scale < 1:
            raise ValueError
        v = math.log(math.expm1(rest))
        if self.kind == "softplus_asinh":
            return math.sinh(v - self.offset) / self.gain
        if self.kind == "softplus_tanh":
            return self.clamp * math.atanh((v - self.offset) / self.clamp) / self.gain
        return (v - self.offset) / self.gain

    def shift(self, raw: Tensor) -> Tensor:
        """Return the shift of the raw parameter: ``shift_gain`` times it."""
        return raw if self.shift_gain == 1 else raw * self.shift_gain

    def _log_of_softplus(self, v: Tensor) -> Tensor:
        """Return ``log(min(softplus(v) + eps, max_scale))``."""
        # far left softplus(v) = exp(v), whose logarithm is v even where exp(v) has underflowed
        left = v < -30.0
        positive = softplus(v) + self.eps
        log = torch.log(torch.where(left, 1.0, positive).clamp(max=self.max_scale))
        # either side must stay finite where it is not taken: its gradient is 0 times what it has there
        small = v if self.eps == 0 else torch.log(torch.exp(v.clamp(max=0.0)) + self.eps)
        return torch.where(left, small, log)


def scale_map_of(code: int, numbers: list[float], flags: int) -> ScaleMap:
    """Return the map whose code, numbers and flags these are."""
    clamp, gain, offset, eps, max_scale, shift_gain = numbers
    return ScaleMap(
        KINDS[code],
        clamp=clamp,
        gain=gain,
        offset=offset,
        eps=eps,
        max_scale=math.inf if max_scale == _NO_LIMIT else max_scale,
        shift_first=bool(flags & _SHIFT_FIRST),
        divide=bool(flags & _DIVIDE),
        shift_gain=shift_gain,
    )


PRESETS = {
    "exp": ScaleMap("exp"),
    "tanh": ScaleMap("tanh"),
    "atan": ScaleMap("atan"),
    "sigmoid": ScaleMap("sigmoid", offset=2.0),
    "softplus": ScaleMap("softplus", eps=1e-3),
    "softclip": ScaleMap("softclip", clamp=-math.log(1e-3)),
    "additive": ScaleMap("additive"),
    "softplus_asinh": ScaleMap("softplus_asinh", offset=_UNIT),
    "softplus_tanh": ScaleMap("softplus_tanh", clamp=4.0, offset=_UNIT),
}


def scale_map(spec: str | ScaleMap) -> ScaleMap:
    """Return the :class:`ScaleMap` of a name (with its usual constants) or pass one through.

    Args:
        spec: a kind of :class:`ScaleMap` by its name, or a map.

    Raises:
        ValueError: for another name.

    Example:
        >>> from pyflowkern.ops import scale_map
        >>> scale_map("exp").kind
        'exp'
    """
    if isinstance(spec, ScaleMap):
        return spec
    if not isinstance(spec, str) or spec not in PRESETS:
        raise ValueError(
            f"scale_map must be a ScaleMap or one of {', '.join(PRESETS)}, got {spec!r}"
        )
    return PRESETS[spec]
