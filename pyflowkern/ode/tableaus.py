"""Butcher tableaus of the explicit Runge-Kutta methods, with error weights and dense output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from pyflowkern.ode._dopri8 import DOPRI8_A, DOPRI8_B, DOPRI8_C, DOPRI8_DENSE, DOPRI8_ERROR

__all__ = [
    "TABLEAUS",
    "Coefficients",
    "Tableau",
    "coefficients",
    "dense_weights",
    "end_slope",
    "tableau",
    "torchdiffeq_dense",
]

Row = tuple[float, ...]


@dataclass(frozen=True)
class Tableau:
    r"""An explicit Runge-Kutta method.

    .. math::
        k_i = f(t + c_i h,\; y + h \sum_{j<i} a_{ij} k_j), \qquad y_1 = y + h \sum_i b_i k_i,
        \qquad y(t + \theta h) \approx y + h \sum_i \sum_d \theta^{d+1} p_{id} k_i

    Args:
        name: as ``method`` takes it.
        order: of convergence.
        a: the rows of the matrix below its diagonal, the first one empty.
        b: weights of the step.
        c: nodes.
        error: ``b`` minus the weights of the embedded method; None for a method without step control.
        dense: ``p``, the coefficients of the dense output: for each stage those of theta, theta^2, ...

    Source: Hairer, Norsett and Wanner (1993), II.1 and II.6.

    Example:
        >>> import torch
        >>> from pyflowkern import ode
        >>> ralston = ode.Tableau("ralston", 2, ((), (2 / 3,)), (1 / 4, 3 / 4), (0.0, 2 / 3))
        >>> y = ode.odeint(lambda t, y: -y, torch.ones(1), [0.0, 1.0], method=ralston, step_size=0.01)
        >>> round(y[-1].item(), 4)
        0.3679
    """

    name: str
    order: int
    a: tuple[Row, ...]
    b: Row
    c: Row
    error: Row | None = None
    dense: tuple[Row, ...] | None = None

    def __hash__(self) -> int:
        # of all the numbers it would take as long as a stage, and each look at a cache asks for it
        return hash((self.order, self.b))

    @cached_property
    def stages(self) -> int:
        """Number of stages, including one that only gives the slope at the end."""
        return len(self.b)

    @cached_property
    def fsal(self) -> bool:
        """Whether the last stage is the slope at the end, and so the first stage of the next step."""
        return self.b[-1] == 0 and self.a[-1] == self.b[:-1] and self.c[-1] == 1

    @cached_property
    def needed(self) -> int:
        """Number of stages that the state after the step depends on."""
        return max(i for i, weight in enumerate(self.b) if weight != 0) + 1


@dataclass(frozen=True)
class Coefficients:
    """A tableau as tensors of one dtype on one device."""

    rows: list[Tensor]  # rows[i]: a[i], then b[:needed]
    columns: list[Tensor]  # columns[i]: a[i + 1:needed, i]
    dtype: torch.dtype
    nodes: Tensor  # in float64 where the device has it, as times are
    at_end: Tensor  # which nodes are 1
    error: Tensor | None
    dense: Tensor | None
    host_nodes: Row
    host_rows: list[Tensor]  # in float64, for kernels that take them as arguments
    host_error: Tensor | None


@lru_cache(maxsize=256)
def coefficients(method: Tableau, dtype: torch.dtype, device: torch.device) -> Coefficients:
    """Return the tensors of a method; cached, since making them costs more than a step."""
    with torch.inference_mode(False):  # later calls may need them for autograd
        return _coefficients(method, dtype, device)


def _coefficients(method: Tableau, dtype: torch.dtype, device: torch.device) -> Coefficients:
    def host(row: Sequence[float]) -> Tensor:
        return torch.tensor(row, dtype=torch.float64, device="cpu")

    def put(row: Sequence[float]) -> Tensor:
        return host(row).to(device=device, dtype=dtype)

    n = method.needed
    rows = *method.a, method.b[:n]
    columns = [put([method.a[j][i] for j in range(i + 1, n)]) for i in range(n)]
    dense = None
    if method.dense is not None:
        dense = torch.tensor(method.dense, dtype=torch.float64, device="cpu")
    return Coefficients(
        rows=[put(row) for row in rows],
        columns=columns,
        dtype=dtype,
        nodes=put(method.c) if device.type == "mps" else host(method.c).to(device),
        at_end=put(method.c) == 1,
        error=None if method.error is None else put(method.error),
        dense=None if dense is None else dense.to(device=device, dtype=dtype),
        host_nodes=method.c,
        host_rows=[host(row) for row in rows],
        host_error=None if method.error is None else host(method.error),
    )


def dense_weights(method: Tableau, theta: float) -> list[float]:
    """Return the weights of the slopes at a fraction ``theta`` of a step."""
    assert method.dense is not None
    return [sum(p * theta**d for d, p in enumerate(row, 1)) for row in method.dense]


def hermite(b: Row) -> tuple[Row, ...]:
    """Return the cubic Hermite interpolation, for a method whose last stage is the slope at the end."""
    rows = [[0.0, 3 * w, -2 * w] for w in b]
    rows[0] = [p + q for p, q in zip(rows[0], (1.0, -2.0, 1.0), strict=True)]
    rows[-1] = [p + q for p, q in zip(rows[-1], (0.0, -1.0, 1.0), strict=True)]
    return tuple(tuple(row) for row in rows)


def quartic(b: Row, middle: Row) -> tuple[Row, ...]:
    """Return the quartic with the states and slopes at both ends, and the state ``y + h sum(middle k)`` half way."""
    rows = [
        [0.0, -5 * w + 16 * m, 14 * w - 32 * m, -8 * w + 16 * m]
        for w, m in zip(b, middle, strict=True)
    ]
    rows[0] = [p + q for p, q in zip(rows[0], (1.0, -4.0, 5.0, -2.0), strict=True)]
    rows[-1] = [p + q for p, q in zip(rows[-1], (0.0, 1.0, -3.0, 2.0), strict=True)]
    return tuple(tuple(row) for row in rows)


def linear(b: Row) -> tuple[Row, ...]:
    """Return the linear interpolation between both states."""
    return tuple((w,) for w in b)


def end_slope(method: Tableau) -> Tableau:
    """Return the method with dense output: if it has none, the cubic one, with a stage for the slope at the end."""
    if method.dense is not None:
        return method
    if not method.fsal:
        a, b = (*method.a, method.b), (*method.b, 0.0)
        error = None if method.error is None else (*method.error, 0.0)
        method = replace(method, a=a, b=b, c=(*method.c, 1.0), error=error)
    return replace(method, dense=hermite(method.b))


def _tsit5_dense() -> tuple[Row, ...]:
    """Return the dense output of Tsitouras (2011), section 4.

    The first stage has a formula of its own, the others ``scale theta^2 (theta^2 + u theta + v)``.
    """
    scale, p, q, r = (
        -1.0530884977290216,
        1.3299890189751412,
        1.4364028541716351,
        0.7139816917074209,
    )
    first = (scale * -p * r, scale * (r + p * q), scale * (-q - p), scale)
    others = (
        (0.1017, -2.1966568338249754, 1.2949852507374631),
        (2.490627285651252793, -2.38535645472061657, 1.57803468208092486),
        (
            -16.54810288924490272,
            -1.21712927295533244 - 0.61620406037800089,
            1.21712927295533244 * 0.61620406037800089,
        ),
        (
            47.37952196281928122,
            -1.203071208372362603 - 0.658047292653547382,
            1.203071208372362603 * 0.658047292653547382,
        ),
        (-34.87065786149660974, -1.2 - 2 / 3, 0.8),
        (2.5, -1.6, 0.6),
    )
    return (first, *((0.0, s * v, s * u, s) for s, u, v in others))


_DOPRI5_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
# Shampine's (1986) weights of order 4
_SHAMPINE_EMBEDDED = (
    1951 / 21600,
    0.0,
    22642 / 50085,
    451 / 720,
    -12231 / 42400,
    649 / 6300,
    1 / 60,
)
_DOPRI5_MID = (
    6025192743 / 30085553152 / 2,
    0.0,
    51252292925 / 65400821598 / 2,
    -2691868925 / 45128329728 / 2,
    187940372067 / 1594534317056 / 2,
    -1776094331 / 19743644256 / 2,
    11237099 / 235043384 / 2,
)
_BOSH3_B = (2 / 9, 1 / 3, 4 / 9)
_TSIT5_B = (
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
)


def _difference(b: Row, other: Row) -> Row:
    return tuple(p - q for p, q in zip(b, other, strict=True))


TABLEAUS = {
    method.name: method
    for method in (
        Tableau("euler", 1, ((),), (1.0,), (0.0,)),
        Tableau("midpoint", 2, ((), (0.5,)), (0.0, 1.0), (0.0, 0.5)),
        Tableau("heun", 2, ((), (1.0,)), (0.5, 0.5), (0.0, 1.0)),
        # Heun (1900), of order 3
        Tableau(
            "heun3",
            3,
            ((), (1 / 3,), (0.0, 2 / 3)),
            (1 / 4, 0.0, 3 / 4),
            (0.0, 1 / 3, 2 / 3),
        ),
        # Heun's method with Euler's as its embedded one
        Tableau(
            "adaptive_heun",
            2,
            ((), (1.0,)),
            (0.5, 0.5),
            (0.0, 1.0),
            (-0.5, 0.5),
        ),
        # Fehlberg (1969), the pair of orders 2 and 1
        Tableau(
            "fehlberg2",
            2,
            ((), (1 / 2,), (1 / 256, 255 / 256)),
            (1 / 512, 255 / 256, 1 / 512),
            (0.0, 1 / 2, 1.0),
            (-1 / 512, 0.0, 1 / 512),
        ),
        # Kutta (1901): "the" method and the 3/8 rule
        Tableau(
            "rk4",
            4,
            ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
            (1 / 6, 1 / 3, 1 / 3, 1 / 6),
            (0.0, 0.5, 0.5, 1.0),
        ),
        Tableau(
            "rk4_38",
            4,
            ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
            (1 / 8, 3 / 8, 3 / 8, 1 / 8),
            (0.0, 1 / 3, 2 / 3, 1.0),
        ),
        # Bogacki and Shampine (1989)
        Tableau(
            "bosh3",
            3,
            ((), (1 / 2,), (0.0, 3 / 4), _BOSH3_B),
            (*_BOSH3_B, 0.0),
            (0.0, 1 / 2, 3 / 4, 1.0),
            _difference((*_BOSH3_B, 0.0), (7 / 24, 1 / 4, 1 / 3, 1 / 8)),
            hermite((*_BOSH3_B, 0.0)),
        ),
        # Dormand and Prince (1980), with Shampine's (1986) error weights and value half way
        Tableau(
            "dopri5",
            5,
            (
                (),
                (1 / 5,),
                (3 / 40, 9 / 40),
                (44 / 45, -56 / 15, 32 / 9),
                (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
                (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
                _DOPRI5_B,
            ),
            (*_DOPRI5_B, 0.0),
            (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
            _difference((*_DOPRI5_B, 0.0), _SHAMPINE_EMBEDDED),
            quartic((*_DOPRI5_B, 0.0), _DOPRI5_MID),
        ),
        # Tsitouras (2011)
        Tableau(
            "tsit5",
            5,
            (
                (),
                (0.161,),
                (-0.008480655492356989, 0.335480655492357),
                (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
                (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
                (
                    5.86145544294642,
                    -12.92096931784711,
                    8.159367898576159,
                    -0.071584973281401,
                    -0.028269050394068383,
                ),
                _TSIT5_B,
            ),
            (*_TSIT5_B, 0.0),
            (0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
            (
                -0.00178001105222577714,
                -0.0008164344596567469,
                0.007880878010261995,
                -0.1447110071732629,
                0.5823571654525552,
                -0.45808210592918697,
                1 / 66,
            ),
            _tsit5_dense(),
        ),
        # Prince and Dormand (1981), the pair of orders 8 and 7
        Tableau("dopri8", 8, DOPRI8_A, (*DOPRI8_B, 0.0), DOPRI8_C, DOPRI8_ERROR, DOPRI8_DENSE),
    )
}


#: Other names of methods.
_ALIASES = {"heun2": "heun"}

#: Methods of torchdiffeq that this package does not have: what they are, and the explicit method to use instead, of
#: the same or the nearest order, with step control where they have it.
_NEAREST = {
    "explicit_adams": ("an Adams method", "rk4"),
    "implicit_adams": ("an Adams method", "rk4"),
    "fixed_adams": ("an Adams method", "rk4"),
    "scipy_solver": ("a call of SciPy", "dopri5"),
    "implicit_euler": ("implicit", "euler"),
    "implicit_midpoint": ("implicit", "midpoint"),
    "trapezoid": ("implicit", "heun2"),
    "sdirk2": ("implicit", "heun2"),
    "trbdf2": ("implicit", "heun2"),
    "radauIIA3": ("implicit", "heun3"),
    "gl4": ("implicit", "rk4"),
    "radauIIA5": ("implicit", "dopri5"),
    "gl6": ("implicit", "dopri8"),
}


def torchdiffeq_dense(method: Tableau) -> Tableau:
    """Return the method with torchdiffeq's dense output, which is a quartic through the state half way."""
    if method.name == "bosh3":
        return replace(method, dense=quartic(method.b, (0.0, 0.5, 0.0, 0.0)))
    if method.name == "dopri8":
        half = [sum(p * 0.5**d for d, p in enumerate(row, 1)) for row in DOPRI8_DENSE]
        return replace(method, dense=quartic(method.b, tuple(half)))
    return method


def tableau(method: str | Tableau) -> Tableau:
    """Return the tableau of a method's name; raise ValueError where there is none, TypeError for what is no name."""
    if isinstance(method, Tableau):
        return method
    if not isinstance(method, str):
        raise TypeError(f"method must be a name or a Tableau, got {type(method).__name__}")
    method = _ALIASES.get(method, method)
    if method not in TABLEAUS:
        if method in _NEAREST:
            raise ValueError(
                f"method {method!r} is {_NEAREST[method][0]}, and the methods here are explicit Runge-Kutta "
                f"methods: the nearest is {_NEAREST[method][1]!r}"
            )
        raise ValueError(f"method must be one of {sorted(TABLEAUS)} or a Tableau, got {method!r}")
    return TABLEAUS[method]
