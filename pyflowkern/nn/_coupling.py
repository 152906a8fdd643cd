"""What all couplings share: which channels pass, which are transformed, and how the conditioner is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyflowkern.core.checks import check_count, check_flag, takes_two
from pyflowkern.core.structure import Structure, structure_device
from pyflowkern.nn._base import Bijection
from pyflowkern.ops import channel_split_sizes, checkerboard_mask
from pyflowkern.ops.chain_network import ChainNetwork
from pyflowkern.ops.chain_steps import ElementsStep
from pyflowkern.ops.elements import ElementMap

__all__ = [
    "Conditioner",
    "Coupling",
    "build_conditioner",
    "channel_mask",
    "check_split",
    "condition",
]

#: A module, called as ``g(h)`` or ``g(h, context)``, or a factory ``(in, out) -> module``.
Conditioner = torch.nn.Module | Callable[[int, int], torch.nn.Module]


def channel_mask(channels: int, *, interleaved: bool = False) -> Tensor:
    """Return a boolean mask ``[C]``, True where a coupling transforms.

    Args:
        channels: number of channels.
        interleaved: take channels 1, 3, 5, ... in place of the last half.

    Raises:
        TypeError: for channels that are not an int, or ``interleaved`` that is no bool.
        ValueError: for less than one channel.

    Example:
        >>> from pyflowkern.nn import channel_mask
        >>> channel_mask(5).tolist()
        [False, False, False, True, True]
    """
    channels = check_count("channels", channels)
    index = torch.arange(channels, device=structure_device())
    return (
        index % 2 == 1
        if check_flag("interleaved", interleaved)
        else index >= channel_split_sizes(channels)[0]
    )


class Coupling(Bijection):
    """The split of a coupling layer: what the conditioner reads, and which mask the op gets.

    A channel split gives the conditioner only the channels that pass, and takes parameters of only
    those that are transformed.  ``compact`` does the same for a channel mask; without it, the
    conditioner of a mask reads all of ``x``, zero where transformed, and returns parameters of all
    channels.  A channel split of one channel transforms it, and the conditioner reads the context alone.

    Args:
        channels: channels ``C`` of the input ``[N, C, *space]``.
        split: ``"channel"``, ``"checkerboard"`` or a boolean mask, True where transformed.
        swap: exchange the two parts.
        compact: see above.

    Raises:
        TypeError: for channels that are not an int, a mask that is not boolean, or a swap that is no bool.
        ValueError: for a split that does not fit the channels.
    """

    def __init__(self, channels: int, split: str | Tensor, swap: bool, compact: bool) -> None:
        super().__init__()
        self.swap = swap = check_flag("swap", swap)
        channels = check_count("channels", channels)
        alone = channels == 1 and isinstance(split, str) and split == "channel"
        if alone:  # the channel is transformed, whatever `swap` is
            split = torch.tensor([not swap], device="cpu")
        self.channels = channels = check_split(split, channels)
        self.split = "mask" if isinstance(split, Tensor) else split
        # True where transformed, after the swap
        mask = split ^ swap if isinstance(split, Tensor) else None
        self._mask = None if mask is None else Structure(mask)
        self._slice: slice | None = None
        index = None
        if alone:
            self._slice, self.sizes = slice(0), (0, 1)
        elif self.split == "channel":
            first = channel_split_sizes(channels)[0]
            self._slice = slice(first, None) if swap else slice(first)
            self.sizes = channel_split_sizes(channels, swap)
        elif compact and mask is not None and mask.dim() == 1:
            index = (~mask).nonzero().flatten()
            self.sizes = (index.numel(), channels - index.numel())
            if min(self.sizes) < 1:
                raise ValueError(
                    "split must let a channel pass and transform one, "
                    f"got a mask with {self.sizes[1]} of {channels} channels True"
                )
            self._slice = _as_slice(index.tolist())
        else:
            self.sizes = (channels, channels)
        # a slice costs less than an index: it is a view, where an index gathers, and scatters its gradient
        self._passing_index = None if self._slice or index is None else Structure(index)

    #: The attributes that say which channels pass.
    _facts = ("channels", "swap", "split", "sizes", "_slice", "_mask", "_passing_index")

    def _vector_parts(self) -> tuple[list[int], list[int]] | None:
        """Return the channels that pass, and those that are transformed; None where the network reads all of them."""
        channels = list(range(self.channels))
        if self._slice is not None:
            passing = channels[self._slice]
        elif self._passing_index is not None:
            passing = self._passing_index.host.tolist()
        else:
            return None
        return passing, [c for c in channels if c not in passing]

    def _elements(
        self,
        transform: ElementMap | Sequence[ElementMap],
        net: ChainNetwork,
        parts: tuple[list[int], list[int]],
        layout: str = "feature_major",
        centred: bool = False,
    ) -> ElementsStep | None:
        """Return this layer as a step of a chain; None for a network of other sizes, which only calls can refuse."""
        passing, moved = parts
        try:
            return ElementsStep(transform, moved, passing, net, layout, centred)
        except ValueError:
            return None

    @property
    def mask(self) -> Tensor | None:
        """True where the layer transforms, on the host; None for a channel split or a checkerboard."""
        return None if self._mask is None else self._mask.host

    conditioner: torch.nn.Module

    def _move(
        self, x: Tensor, params: Tensor, mask: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """Transform the part of ``x`` that does not pass, with the parameters that the network made of the other."""
        raise NotImplementedError

    def _made_again(
        self,
        y: Tensor,
        context: Tensor | None,
        inverse: bool,
        found: Callable[[Tensor], Tensor],
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]] | None:
        """Find the input of a call from its output, and run the call again, with one evaluation of the network.

        What passes is the same in both, so that the network reads the output.

        Args:
            y: the output.
            context: of the call.
            inverse: whether the call was one of :meth:`inverse`.
            found: is given the input, and returns the leaf to use.

        Returns:
            Tensors the sum of whose gradients is that of the input, and what the call returns; None where a subclass
            does something else.
        """
        known = self.__dict__
        if not type(self).__module__.startswith("pyflowkern.nn.") or "forward" in known:
            return None
        leaf = y.detach().requires_grad_()
        mask = self._mask_for(y)
        params = condition(self.conditioner, self._passing(leaf, mask), context)
        with torch.no_grad():
            x = self._move(y, params, mask, not inverse)[0]
        x = found(x)
        return (x, leaf), self._move(x, params, mask, inverse)

    def _mask_for(self, x: Tensor) -> Tensor | None:
        if self.split == "checkerboard":
            return checkerboard_mask(tuple(x.shape[1:]), x.device) ^ self.swap
        return None if self._mask is None else self._mask.on(x.device)

    def _passing(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the part of ``x`` that the conditioner reads."""
        if self._slice is not None:
            return x[:, self._slice]
        if self._passing_index is not None:
            return x.index_select(1, self._passing_index.on(x.device))
        if mask is None:  # unreachable: without a mask the split is by channels
            return x
        if mask.dim() == 1:
            mask = mask.view(-1, *[1] * (x.dim() - 2))
        # select, not multiply: NaN where transformed must not reach the parameters
        return x.masked_fill(mask, 0.0)


def build_conditioner(conditioner: Conditioner, inputs: int, outputs: int) -> torch.nn.Module:
    """Return the module, or what the factory makes of ``(inputs, outputs)``."""
    if isinstance(conditioner, torch.nn.Module):
        return conditioner
    if not callable(conditioner):
        raise TypeError(
            "conditioner must be a torch.nn.Module or a factory (in, out) -> module, "
            f"got {type(conditioner).__name__}"
        )
    module = conditioner(inputs, outputs)
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"a conditioner factory must return a torch.nn.Module, got {type(module).__name__}"
        )
    return module


def condition(conditioner: torch.nn.Module, h: Tensor, context: Tensor | None) -> Tensor:
    """Return ``conditioner(h, context)``, or ``conditioner(h)`` without a context.

    Raises:
        TypeError: for a context given to a conditioner that takes none.
    """
    out: Tensor
    if context is None:
        out = conditioner(h)
        return out
    try:
        out = conditioner(h, context)
    except TypeError as error:
        if takes_two(conditioner.forward):
            raise
        raise TypeError(
            f"context was given, but the conditioner, a {type(conditioner).__name__}, takes only x: "
            "give it a forward(x, context), or use one that is made with context_features, such as nn.MLP"
        ) from error
    return out


def check_split(split: str | Tensor, channels: int) -> int:
    """Return the number of channels as an int; raise unless ``split`` splits so many."""
    channels = check_count("channels", channels)
    if isinstance(split, Tensor):
        if split.dtype != torch.bool:
            raise TypeError(f"split must be a boolean mask, got {split.dtype}")
        if split.is_meta:
            raise ValueError("split must be a mask with values, got one on the device meta")
        if split.dim() == 0 or split.shape[0] != channels:
            raise ValueError(
                f"split must be a mask [{channels}] or [{channels}, *space], "
                f"got shape {tuple(split.shape)}"
            )
    elif split not in ("channel", "checkerboard"):
        raise ValueError(
            f"split must be 'channel', 'checkerboard' or a boolean mask, got {split!r}"
        )
    elif channels < (2 if split == "channel" else 1):
        raise ValueError(
            f"channels must be at least 2 for a channel split, got {channels}; "
            "one channel has no second part"
        )
    return channels


def _as_slice(index: list[int]) -> slice | None:
    """Return the slice that takes these positions, if there is one."""
    step = index[1] - index[0] if len(index) > 1 else 1
    regular = slice(index[0], index[-1] + 1, step)
    return regular if list(range(regular.start, regular.stop, step)) == index else None
