"""Whether a layer is the bijection that it claims to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern.core.checks import check_flag, check_number
from pyflowkern.testing._directions import directions
from pyflowkern.testing._laws import CHECKS, Case

__all__ = ["LAWS", "BijectionError", "check_bijection"]

#: The names of all laws.
LAWS: tuple[str, ...] = tuple(CHECKS)


class BijectionError(AssertionError):
    """A bijection breaks laws of :func:`check_bijection`; the message names each with the number that breaks it.

    Example:
        >>> import torch
        >>> from pyflowkern.testing import BijectionError, check_bijection
        >>> x = torch.ones(2, 3, dtype=torch.float64)
        >>> double = lambda x, context: (2 * x, x.new_full((len(x),), 2.0794415416798357))
        >>> try:
        ...     check_bijection((double, double), x, laws=["inverse"])
        ... except BijectionError as error:
        ...     print(error)
        the pair of functions breaks 1 of 1 laws
          inverse: f^-1(f(x)) is not x: 4 in place of 1 (sample 0)
    """


def check_bijection(
    bijection: Any,
    x: Tensor,
    context: Tensor | None = None,
    *,
    atol: float = 1e-8,
    rtol: float = 1e-6,
    laws: Sequence[str] | None = None,
    raise_exception: bool = True,
) -> bool:
    r"""Check that a layer is the bijection that it claims to be; works on layers of any library.

    The laws, by their names in ``laws`` and in messages, each in both directions
    :math:`z = f(x)` and :math:`x = f^{-1}(z)`:

    - ``"shapes"``: a direction returns a pair; events keep their number of elements; ``log_det`` is ``[N]``; both have
      the dtype of ``x``, which is not written to. Where this law is broken, the others are not looked at.
    - ``"inverse"``: :math:`f^{-1}(f(x)) = x`, and the two log-determinants are each other's negative.
    - ``"log_det"``: it is :math:`\log |\det \partial f(x) / \partial x|`, by autograd and an LU decomposition.
    - ``"gradients"``: those of ``x``, ``context`` and every parameter are the central differences along a random
      direction, within :func:`torch.autograd.gradcheck`'s tolerances.
    - ``"single"``: a sample alone has the values that it has among others.
    - ``"empty"``: no sample is a batch, too.
    - ``"isolation"``: NaN or inf in one sample changes no bit of another, nor of its gradient, and NaN does not become
      a number.
    - ``"determinism"``: the same bits each time.
    - ``"dtypes"``: of modules: a copy in float32 returns float32 and the values of float64, to a thousandth of the
      largest.

    Args:
        bijection: one of

            - a module with ``forward(x, context) -> (z, log_det)`` and ``inverse(z, context)``; ``context`` is left
              out if None (pyflowkern, nflows, normflows);
            - a :class:`torch.distributions.Transform` (zuko's among them);
            - a module of FrEIA, called with ``rev=`` and ``jac=True``;
            - two functions ``(forward, inverse)`` of ``(x, context)``, each of which returns ``(value, log_det)``.
        x: data ``[N, ...]``, float64, at least two samples that differ; a handful of samples of few features is enough.
            The log-determinant takes as many backward passes as there are features.
        context: float64 ``[N, ...]``, or None.
        atol: absolute tolerance of values and log-determinants.
        rtol: relative tolerance, likewise.
        laws: names of those to check; all if None.
        raise_exception: False returns False in place of raising an error.

    Returns:
        True if every law holds; False if one does not and ``raise_exception`` is False.

    The bijection is checked in the mode it is in: call ``.eval()`` first where layers draw random numbers in training.
    Parameters are moved by 1e-6 and put back bit by bit.

    Raises:
        BijectionError: an AssertionError, if a law does not hold.
        ValueError, TypeError: arguments of a wrong kind, shape or value.

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> from pyflowkern.testing import check_bijection
        >>> x = torch.randn(4, 3, dtype=torch.float64)
        >>> check_bijection(nn.AffineCoupling(3, lambda i, o: nn.MLP(i, o, hidden=8)).double(), x)
        True
        >>> wrong = lambda x, context: (2 * x, x.new_zeros(len(x)))  # of which log_det is 3 log 2
        >>> right = lambda z, context: (z / 2, z.new_full((len(z),), -2.0794415416798357))
        >>> check_bijection((wrong, right), x, laws=["shapes", "log_det"])
        Traceback (most recent call last):
        ...
        pyflowkern.testing.bijections.BijectionError: the pair of functions breaks 1 of 2 laws
          log_det: forward: not that of the Jacobian: 0 in place of 2.079 (sample 0)
    """
    chosen, raises = _check_laws(laws), check_flag("raise_exception", raise_exception)
    _check_inputs(x, context)
    tolerances = [check_number(name, value) for name, value in (("atol", atol), ("rtol", rtol))]
    case = Case(bijection, directions(bijection), x.detach(), context, *tolerances)
    broken: list[str] = []
    cause: Exception | None = None
    for name in chosen:
        try:
            with torch.enable_grad():
                found = next(CHECKS[name](case), None)
        except Exception as error:
            found, cause = f"raised {type(error).__name__}: {error}", error
        if found is not None:
            broken.append(f"  {name}: {found}")
        if broken and name == "shapes":  # what the other laws would say follows from this
            break
    if broken and raises:
        rest = "" if name == chosen[-1] else ", the others were not looked at"
        head = f"{_name(bijection)} breaks {len(broken)} of {len(chosen)} laws{rest}"
        raise BijectionError("\n".join([head, *broken])) from cause
    return not broken


def _check_laws(laws: Sequence[str] | None) -> list[str]:
    if laws is None:
        return list(LAWS)
    chosen = [laws] if isinstance(laws, str) else list(laws)
    if isinstance(laws, str) or not chosen or not all(name in LAWS for name in chosen):
        raise ValueError(f"laws must be some of {', '.join(LAWS)}, got {chosen}")
    return [name for name in LAWS if name in chosen]


def _check_inputs(x: Tensor, context: Tensor | None) -> None:
    for name, value in (("x", x), ("context", context)):
        if value is None and name == "context":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dtype != torch.float64:
            raise ValueError(
                f"{name} must be float64, got {value.dtype}: rounding of float32 hides small faults; "
                "check layer.double()"
            )
        if not value.isfinite().all():
            raise ValueError(f"{name} must be finite")
    if x.dim() < 2 or len(x) < 2 or not x[0].numel():
        raise ValueError(
            f"x must have at least two samples, [N, ...] with N >= 2, got {tuple(x.shape)}"
        )
    if context is not None and len(context) != len(x):
        raise ValueError(f"context must have {len(x)} rows, as x, got {tuple(context.shape)}")


def _name(bijection: Any) -> str:
    return "the pair of functions" if isinstance(bijection, tuple) else type(bijection).__name__
