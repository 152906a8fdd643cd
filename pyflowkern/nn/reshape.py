"""Layers that only move elements: squeezing and permutations.  Their log-determinants are 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyflowkern.core.checks import (
    check_batched,
    check_channels,
    check_count,
    check_list,
    is_integer,
)
from pyflowkern.core.structure import HasPermutations, structure_device
from pyflowkern.nn._base import Bijection, zero_log_det
from pyflowkern.nn.links import Link
from pyflowkern.ops.chain_steps import PermuteStep

__all__ = ["Permutation", "Reverse", "Squeeze"]


class Squeeze(Bijection):
    """Space to depth: ``[N, C, H, W] -> [N, 4 C, H / 2, W / 2]``, for any number of spatial axes.

    The new channels are ordered by their place in the block first, then by the old channel, so
    that a channel split separates neighbouring pixels and not colours.

    Args:
        factor: side of the block.

    Raises:
        TypeError: for a factor that is not an int.
        ValueError: for a factor below 1, or an input whose space the factor does not divide.

    Source: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (2017).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> z, _ = nn.Squeeze()(torch.arange(4.0).view(1, 1, 2, 2))
        >>> z.flatten().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        factor = check_count("factor", factor)
        self.factor = factor

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Move blocks of space to channels."""
        check_batched("x", x, min_dim=3)
        f, rank = self.factor, x.dim() - 2
        n, c, *_ = x.shape
        channels, *space = self.output_shape(tuple(x.shape[1:]))
        # [N, C, h, f, w, f] -> [N, f, f, C, h, w]
        blocks = x.reshape(n, c, *(size for s in space for size in (s, f)))
        places, pixels = range(3, 3 + 2 * rank, 2), range(2, 2 + 2 * rank, 2)
        z = _gather(blocks, (*places, 1), (*pixels,), (n, channels, *space), _channels_last(x))
        return z, zero_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Move channels back to blocks of space."""
        check_batched("z", z, min_dim=3)
        f, rank = self.factor, z.dim() - 2
        n, _, *small = z.shape
        channels, *space = self.input_shape(tuple(z.shape[1:]))
        # [N, f, f, C, h, w] -> [N, C, h, f, w, f]
        blocks = z.reshape(n, *[f] * rank, channels, *small)
        pixels = tuple(axis for i in range(rank) for axis in (2 + rank + i, 1 + i))
        x = _gather(blocks, (1 + rank,), pixels, (n, channels, *space), _channels_last(z))
        return x, zero_log_det(z)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``(C f^rank, *space / f)``."""
        channels, *space = shape
        if not space or any(size % self.factor for size in space):
            raise ValueError(
                f"x must have events [C, *space] with space divisible by {self.factor} for Squeeze, "
                f"got {shape}"
            )
        return (channels * self.factor ** len(space), *(size // self.factor for size in space))

    def input_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``(C / f^rank, *space f)``."""
        channels, *space = shape
        block = self.factor ** len(space)
        if not space or channels % block:
            raise ValueError(
                f"z must have events [C, *space] with C divisible by {block} for the inverse of Squeeze, "
                f"got {shape}"
            )
        return (channels // block, *(size * self.factor for size in space))


class Permutation(HasPermutations, Bijection):
    r"""Reorder the channels: :math:`z_i = x_{p(i)}`.

    Args:
        permutation: the order ``p``, or a number of channels for a random one.

    Raises:
        ValueError: for an order that is not a permutation of ``0 ... C - 1``, or no channels; when called, for another
            number of channels.

    Source: between couplings Dinh, Krueger and Bengio, "NICE: Non-linear independent components estimation" (2015).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> nn.Permutation([2, 0, 1])(torch.tensor([[10.0, 11.0, 12.0]]))[0]
        tensor([[12., 10., 11.]])
    """

    permutation: Tensor
    inverse_permutation: Tensor

    def __init__(self, permutation: int | Sequence[int] | Tensor) -> None:
        super().__init__()
        if is_integer(permutation):
            permutation = check_count("permutation", permutation)
            order = torch.randperm(permutation, device=structure_device())
        else:
            if not isinstance(permutation, Tensor):
                check_list("permutation", permutation)
            elif permutation.is_meta or permutation.layout != torch.strided:
                raise ValueError("permutation must be a dense tensor that holds numbers")
            order = torch.as_tensor(permutation, device=structure_device())
        if (
            order.is_floating_point()
            or order.dim() != 1
            or sorted(order.tolist()) != list(range(order.numel()))
            or not order.numel()
        ):
            raise ValueError(f"permutation must order 0 ... C - 1, got {order.tolist()}")
        self.channels = order.numel()
        if (
            structure_device() is not None
        ):  # the layer is made on meta, and order came from the host
            order = order.to("meta")
        self.register_permutation("permutation", order)
        self.register_permutation("inverse_permutation", order.argsort())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reorder the channels of ``x``."""
        check_channels("x", x, self.channels)
        return x.index_select(1, self.permutation_of("permutation")), zero_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo :meth:`forward`."""
        check_channels("z", z, self.channels)
        return z.index_select(1, self.permutation_of("inverse_permutation")), zero_log_det(z)

    def _chain_link(self) -> Link | None:
        saved = self._buffers["permutation"]
        # elsewhere looking at it would wait for the device
        if type(self) not in (Permutation, Reverse) or saved is None or not saved.is_cpu:
            return None
        order = self.permutation_of("permutation")
        if sorted(order.tolist()) != list(range(self.channels)):
            return None
        link = Link([PermuteStep(order.tolist())])
        link.watch(self, "channels")
        link.holds.append(lambda: self._orders_as(order))
        return link

    def _orders_as(self, order: Tensor) -> bool:
        saved = self._buffers["permutation"]
        if saved is None or not saved.is_cpu:
            return False
        now = self.permutation_of("permutation")
        return now is order or torch.equal(now, order)


class Reverse(Permutation):
    r"""Reverse the order of the channels: :math:`z_i = x_{C - 1 - i}`.

    Args:
        channels: number ``C`` of channels.

    Raises:
        TypeError: for channels that are not an int.
        ValueError: for less than one channel.

    Source: between autoregressive layers Papamakarios, Pavlakou and Murray, "Masked autoregressive flow" (2017).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> nn.Reverse(3)(torch.tensor([[10.0, 11.0, 12.0]]))[0]
        tensor([[12., 11., 10.]])
    """

    def __init__(self, channels: int) -> None:
        super().__init__(range(check_count("channels", channels) - 1, -1, -1))


def _channels_last(t: Tensor) -> bool:
    """Whether channels are innermost, also in a slice of a channels_last tensor."""
    return t.stride(1) == 1 and not t.is_contiguous()


def _gather(
    blocks: Tensor,
    channel_axes: tuple[int, ...],
    pixel_axes: tuple[int, ...],
    shape: tuple[int, ...],
    channels_last: bool,
) -> Tensor:
    """Merge the axes to ``shape`` ``[N, C, *space]`` in one copy."""
    if channels_last:
        n, channels, *space = shape
        merged = blocks.permute(0, *pixel_axes, *channel_axes).reshape(n, *space, channels)
        return merged.movedim(-1, 1)
    return blocks.permute(0, *channel_axes, *pixel_axes).reshape(shape)
