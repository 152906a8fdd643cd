"""Invertible linear maps of the channels: on vectors, or as a 1x1 convolution on images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyflowkern import ops
from pyflowkern.core.checks import check_channels, check_choice, check_count, check_flag
from pyflowkern.core.dtypes import accumulation_dtype, autocasts
from pyflowkern.core.kept import Kept
from pyflowkern.core.structure import HasPermutations
from pyflowkern.nn._base import Bijection
from pyflowkern.nn.links import Link
from pyflowkern.ops.chain_steps import LinearStep, PLUStep

__all__ = ["InvertibleConv1x1", "InvertibleLinear"]

_Matrix = tuple[Tensor, Tensor]
#: Features up to which a chain multiplies the factors itself, at every call; beyond, a matrix that is kept is cheaper.
_MOST_FACTORS = 64


class InvertibleLinear(HasPermutations, Bijection):
    r"""Multiply the channels of every pixel by an invertible matrix: :math:`z = W x`.

    The log-determinant is :math:`|\text{space}| \log|\det W|`, with the number of pixels :math:`|\text{space}|`.

    Parameterizations:

    ============ ========================================= ==================================
    plu          ``W = P L (U + diag(sign e^log_diag))``   never singular, ``log|W|`` is a sum
    dense        ``W`` itself                              any matrix, costs an LU per step
    householder  a product of ``C`` reflections            rotations only, ``log|W| = 0``
    ============ ========================================= ==================================

    On the CPU, in eval mode and without gradients, the matrix and its inverse are kept and used
    again while the parameters hold the values that they were made from: the values are compared at
    each call, so that no change goes unseen.  Elsewhere they are computed at each call.

    Args:
        channels: channels ``C`` of the input ``[N, C, *space]``.
        parameterization: ``"plu"``, ``"dense"`` or ``"householder"``.
        init: the first matrix: a random ``"rotation"`` or ``"permutation"``, or the
            ``"identity"``; a Householder product starts as a rotation.

    Raises:
        ValueError: for less than one channel, an unknown parameterization or first matrix.
        RuntimeError: by the inverse of a singular dense matrix; its forward gives
            ``log_det = -inf``.

    Source: Kingma and Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions" (2018);
    Tomczak and Welling, "Improving variational auto-encoders using Householder flow" (2016).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> layer = nn.InvertibleLinear(4)
        >>> x = torch.randn(8, 4)
        >>> z, log_det = layer(x)
        >>> bool(torch.allclose(layer.inverse(z)[0], x, atol=1e-5))
        True
    """

    permutation: Tensor
    sign: Tensor

    def __init__(
        self, channels: int, *, parameterization: str = "plu", init: str = "rotation"
    ) -> None:
        super().__init__()
        channels = check_count("channels", channels)
        if parameterization not in ("plu", "dense", "householder"):
            raise ValueError(
                "parameterization must be 'plu', 'dense' or 'householder', "
                f"got {parameterization!r}"
            )
        self.channels, self.parameterization = channels, parameterization
        self._kept: tuple[Kept[_Matrix], Kept[_Matrix]] = Kept(), Kept()
        check_choice("init", init, ("rotation", "permutation", "identity"))
        if parameterization == "householder" and init != "rotation":
            raise ValueError(f"init must be 'rotation' for 'householder', got {init!r}")
        if init == "rotation":
            rotation = torch.linalg.qr(torch.randn(channels, channels))[0].contiguous()
        else:
            rotation = torch.eye(channels)
            rotation = rotation[torch.randperm(channels)] if init == "permutation" else rotation
        if parameterization == "plu":
            p, lower, upper = torch.linalg.lu(rotation)
            diag = upper.diagonal()
            self.register_permutation("permutation", p.argmax(1))
            self.register_buffer("sign", diag.sign())
            self.lower = torch.nn.Parameter(lower.tril(-1))
            self.upper = torch.nn.Parameter(upper.triu(1))
            self.log_diag = torch.nn.Parameter(diag.abs().log())
        elif parameterization == "dense":
            self.weight = torch.nn.Parameter(rotation)
        else:
            self.vectors = torch.nn.Parameter(torch.randn(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Multiply every pixel of ``x`` ``[N, C, *space]``; return ``(z, log_det[N])``."""
        check_channels("x", x, self.channels)
        weight, log_abs_det = self.kept_matrix()
        if _is_product(x, weight):
            return F.linear(x, weight), log_abs_det.expand(x.shape[0]).contiguous()
        return ops.invertible_linear(x, weight, log_abs_det)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo :meth:`forward`."""
        check_channels("z", z, self.channels)
        weight, log_abs_det = self.kept_matrix(inverse=True)
        if _is_product(z, weight):
            return F.linear(z, weight), (-log_abs_det).expand(z.shape[0]).contiguous()
        return ops.invertible_linear(z, weight, log_abs_det, inverse=True)

    def _chain_link(self) -> Link | None:
        if type(self) not in (InvertibleLinear, InvertibleConv1x1):
            return None
        plu = self.parameterization == "plu"
        if plu and self.channels <= _MOST_FACTORS:
            link = Link([PLUStep()])
            link.read(self, "permutation", "lower", "upper", "log_diag", "sign")
        else:
            link = Link([LinearStep()])
            name = {"plu": "lower", "dense": "weight"}.get(self.parameterization, "vectors")
            link.make(self, (name, name), lambda inverse: self.kept_matrix(inverse=inverse))
        link.watch(self, "channels", "parameterization")
        return link

    def matrix(self, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Return ``W``, or its inverse, and ``log |det W|`` (of ``W`` in both cases)."""
        return self._compute(check_flag("inverse", inverse))

    def kept_matrix(self, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Return the results of :meth:`matrix`, perhaps kept from an earlier call: do not write to them."""
        if self.training or self._modules:  # a parametrization may depend on anything
            return self._compute(inverse)
        state = (*self._parameters.values(), *self._buffers.values())
        made_from = [t for t in state if t is not None]
        return self._kept[inverse].get(made_from, self._compute, inverse)

    def _compute(self, inverse: bool) -> _Matrix:
        if self.parameterization == "plu":
            permutation = self.permutation_of("permutation")
            factors = (permutation, self.lower, self.upper, self.log_diag, self.sign)
            log_abs_det = self.log_diag.sum(dtype=accumulation_dtype(self.log_diag.dtype))
            return ops.plu_matrix(*factors, inverse=inverse), log_abs_det
        if self.parameterization == "householder":
            rotation = ops.householder_matrix(self.vectors)
            return (rotation.mT if inverse else rotation), rotation.new_zeros(())
        sign, log_abs_det, inverse_weight = ops.slogdet_inverse(self.weight)
        if not inverse:
            return self.weight, log_abs_det
        # the only place that waits for the device
        if not torch.compiler.is_compiling() and bool(sign == 0):
            raise RuntimeError(
                f"{type(self).__name__} has no inverse: its dense weight [{self.channels}, "
                f"{self.channels}] is singular; parameterization='plu' cannot become so"
            )
        return inverse_weight, log_abs_det


class InvertibleConv1x1(InvertibleLinear):
    """An invertible 1x1 convolution: :class:`InvertibleLinear` by the name it has on images.

    Args:
        channels: channels ``C`` of the input ``[N, C, H, W]``.
        parameterization: ``"plu"``, ``"dense"`` or ``"householder"``.
        init: the first matrix, as for :class:`InvertibleLinear`.

    Raises:
        ValueError: as :class:`InvertibleLinear`.
        RuntimeError: as :class:`InvertibleLinear`.

    Source: Kingma and Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions" (2018).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> z, log_det = nn.InvertibleConv1x1(4)(torch.randn(2, 4, 8, 8))
        >>> tuple(z.shape)
        (2, 4, 8, 8)
    """


def _is_product(x: Tensor, weight: Tensor) -> bool:
    """Whether to use torch's own product: for vectors it is as fast as our op, and cheaper to call."""
    full = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    return x.dim() == 2 and full and not autocasts(x)
