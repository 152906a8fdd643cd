"""Maps from pixels and the unit interval to the real line, with their log-determinants."""

from __future__ import annotations

from torch import Tensor

from pyflowkern import ops
from pyflowkern.core.checks import check_batched, check_count, check_number
from pyflowkern.nn._base import Bijection

__all__ = ["Dequantize", "Logit"]


class Logit(Bijection):
    r"""Map the unit interval to the real line: :math:`z = \text{logit}(p)`, :math:`p = \alpha + (1 - 2\alpha) x`.

    The log-determinant is :math:`\sum \log(1 - 2\alpha) - \log p - \log(1 - p)`.

    Args:
        alpha: keeps 0 and 1 away from the ends, ``0 <= alpha < 0.5``.

    Raises:
        ValueError: for alpha out of range.

    Source: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (2017).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> layer = nn.Logit(alpha=0.05)
        >>> x = torch.tensor([[0.0, 0.5, 1.0]])
        >>> z, log_det = layer(x)
        >>> bool(torch.allclose(layer.inverse(z)[0], x, atol=1e-6))
        True
    """

    def __init__(self, alpha: float = 0.0) -> None:
        super().__init__()
        alpha = check_number("alpha", alpha)
        if not 0 <= alpha < 0.5:
            raise ValueError(f"alpha must be in [0, 0.5), got {alpha}")
        self.alpha = alpha

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``x`` in ``[0, 1]`` to the real line."""
        check_batched("x", x, min_dim=1)
        return ops.logit(x, alpha=self.alpha)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map the real line to the unit interval (a little beyond it by alpha)."""
        check_batched("z", z, min_dim=1)
        return ops.logit(z, alpha=self.alpha, inverse=True)


class Dequantize(Logit):
    r"""Map integer pixels to the real line: uniform noise, then :class:`Logit`, in one pass.

    .. math:: z = \text{logit}(\alpha + (1 - 2\alpha)\,(x + u) / 2^b), \qquad u \sim U[0, 1).

    For uint8 ``x`` the log-determinant is that of the pixel levels, so that a flow's log-density
    is, in expectation, a lower bound of the log-probability of the discrete data.  A floating
    ``x`` is taken as a point of ``[0, 1]``, without noise, and its log-determinant belongs to that
    interval.  :meth:`inverse` returns such points; :meth:`quantize` turns them into pixels.

    Args:
        bits: bits a pixel, 1 to 8; pixels are ``0 ... 2^bits - 1``.
        alpha: keeps black and white away from the ends, ``0 <= alpha < 0.5``.

    Raises:
        ValueError: for bits or alpha out of range.
        TypeError: for integers other than uint8.

    Source: Theis, van den Oord and Bethge, "A note on the evaluation of generative models" (2016).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> layer = nn.Dequantize(bits=8)
        >>> x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
        >>> z, log_det = layer(x)
        >>> bool((layer.quantize(layer.inverse(z)[0]) == x).all())
        True
    """

    def __init__(self, bits: int = 8, alpha: float = 0.05) -> None:
        super().__init__(alpha)
        bits = check_count("bits", bits)
        if bits > 8:
            raise ValueError(f"bits must be 1 to 8, got {bits}")
        self.bits = bits

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map uint8 pixels, or points of ``[0, 1]``, to the real line."""
        if not isinstance(x, Tensor) or x.is_floating_point():
            return super().forward(x, context)
        return ops.dequantize(x, bits=self.bits, alpha=self.alpha)

    def quantize(self, x: Tensor) -> Tensor:
        """Return the uint8 pixels of points of ``[0, 1]``."""
        return ops.quantize(x, bits=self.bits)
