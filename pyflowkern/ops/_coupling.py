"""How a coupling splits its input and its parameters (masks, layouts, checks), and its plain formula."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflowkern.core.checks import check_count, check_flag, check_shape, check_sizes
from pyflowkern.core.dtypes import accumulation_dtype
from pyflowkern.core.structure import structure_device
from pyflowkern.ops.scale_map import ScaleMap

__all__ = [
    "LAYOUTS",
    "affine_elements",
    "channel_split_sizes",
    "check_params",
    "checkerboard_mask",
    "coupling_reference",
    "mask_of",
    "parse_layout",
    "split_params",
]

LAYOUTS = ("blocked", "interleaved", "feature_major")


def channel_split_sizes(channels: int, swap: bool = False) -> tuple[int, int]:
    """Return how many channels pass and how many are transformed by a ``"channel"`` split.

    These are ``C - C // 2`` and ``C // 2`` of ``C`` channels.

    Args:
        channels: ``C``.
        swap: exchange the two numbers.

    Raises:
        TypeError: for channels that are no int, and ``swap`` that is no bool.
        ValueError: for a negative number of channels.

    Example:
        >>> from pyflowkern.ops import channel_split_sizes
        >>> channel_split_sizes(5), channel_split_sizes(5, swap=True)
        ((3, 2), (2, 3))
    """
    if type(channels) is not int or channels < 0:
        channels = check_count("channels", channels, 0)
    first, last = channels - channels // 2, channels // 2
    return (last, first) if check_flag("swap", swap) else (first, last)


def checkerboard_mask(event_shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Return a boolean ``[C, *space]``: True where the spatial coordinates sum to an odd number.

    Args:
        event_shape: ``(C, *space)``.
        device: of the result; None for the default.

    Raises:
        TypeError: for a shape that is no sequence of ints.
        ValueError: for a shape without space, and for negative sizes.

    Example:
        >>> from pyflowkern.ops import checkerboard_mask
        >>> checkerboard_mask((1, 2, 2)).int().tolist()
        [[[0, 1], [1, 0]]]
    """
    event_shape = check_sizes("event_shape", event_shape)
    if len(event_shape) < 2:
        raise ValueError(f"a checkerboard needs [C, *space], got event_shape {event_shape}")
    device = structure_device() if device is None else device
    space = event_shape[1:]
    parity = torch.zeros(space, dtype=torch.int64, device=device)
    for axis, size in enumerate(space):
        shape = [1] * len(space)
        shape[axis] = size
        parity = parity + torch.arange(size, device=device).view(shape)
    return (parity % 2 == 1).expand(event_shape).contiguous()


def parse_layout(name: str) -> tuple[str, bool]:
    """Return the layout, and whether raw scales come before shifts."""
    base = name.removesuffix("_raw_first") if isinstance(name, str) else name
    if base not in LAYOUTS:
        raise ValueError(
            f"params_layout must be one of {', '.join(LAYOUTS)}, optionally with '_raw_first', got {name!r}"
        )
    return base, base != name


def mask_of(split: str | Tensor, x: Tensor) -> Tensor | None:
    """Return the boolean mask ``[C, *space]`` of a split, None for the channel split."""
    event = tuple(x.shape[1:])
    if isinstance(split, str):
        if split == "channel":
            if x.shape[1] < 2:
                raise ValueError(
                    f"split='channel' needs at least 2 channels, got x of shape {tuple(x.shape)}"
                )
            return None
        if split == "checkerboard":
            return checkerboard_mask(event, x.device)
        raise ValueError(
            f"split must be 'channel', 'checkerboard' or a boolean mask, got {split!r}"
        )
    if not isinstance(split, Tensor) or split.dtype != torch.bool:
        given = getattr(split, "dtype", type(split).__name__)
        raise TypeError(f"split must be a name or a boolean tensor, got {given}")
    if tuple(split.shape) == event:
        return split
    check_shape("split", split, event[:1])
    return split.view(-1, *[1] * (len(event) - 1)).expand(event)


def check_params(
    x: Tensor, params: Tensor, split: str | Tensor, swap: bool, smap: ScaleMap, layout: str
) -> Tensor:
    """Check the shape of ``params``; where they are of the transformed channels only, insert those of the others.

    What is inserted is not read: a copy of the neighbour's.
    """
    n, c, *space = x.shape
    per = 1 if smap.kind == "additive" else 2

    def shape(size: int) -> tuple[int, ...]:
        return (n, size, *space, per) if layout == "feature_major" else (n, per * size, *space)

    full = shape(
        channel_split_sizes(c, swap)[1] if isinstance(split, str) and split == "channel" else c
    )
    if tuple(params.shape) == full:
        return params
    if isinstance(split, Tensor) and split.dim() == 1 and params.dim() == len(full):
        by_channel = split ^ swap
        size = params.shape[1] if layout == "feature_major" else params.shape[1] // per
        # counting True on a GPU would wait for it: there the caller's word is taken
        known = split.device.type == "cpu" and not torch.compiler.is_compiling()
        if (
            0 < size < c
            and tuple(params.shape) == shape(size)
            and (not known or size == int(by_channel.sum()))
        ):
            index = (by_channel.cumsum(0) - 1).clamp(0, size - 1)
            if layout == "blocked":
                index = torch.cat([index + i * size for i in range(per)])
            elif layout == "interleaved":
                index = torch.stack([per * index + i for i in range(per)], 1).flatten()
            return params.index_select(1, index)
    raise ValueError(
        f"params must have shape {full} for x of shape {tuple(x.shape)}, layout {layout!r} and map "
        f"{smap.kind!r}, got {tuple(params.shape)}"
    )


def split_params(
    params: Tensor, layout: str, raw_first: bool, smap: ScaleMap
) -> tuple[Tensor, Tensor | None]:
    """Return shift and raw scale as views of ``params``, each shaped like the part they belong to."""
    if smap.kind == "additive":
        return (params.squeeze(-1) if layout == "feature_major" else params), None
    if layout == "blocked":
        a, b = params.chunk(2, 1)
    elif layout == "interleaved":
        a, b = params[:, 0::2], params[:, 1::2]
    else:
        a, b = params.unbind(-1)
    return (b, a) if raw_first else (a, b)


def affine_elements(
    x: Tensor, raw: Tensor | None, shift: Tensor, smap: ScaleMap, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Return the transformed elements (dtype of x) and the log-derivative of each (accumulation dtype)."""
    work = torch.promote_types(x.dtype, shift.dtype)
    work = accumulation_dtype(work if raw is None else torch.promote_types(work, raw.dtype))
    v, t = x.to(work), smap.shift(shift.to(work))
    log_scale = torch.zeros_like(t) if raw is None else smap.log_scale(raw.to(work))
    if inverse != smap.divide:
        log_scale = -log_scale
    scale = torch.exp(log_scale)
    if smap.shift_first:
        y = v * scale - t if inverse else (v + t) * scale
    else:
        y = (v - t) * scale if inverse else v * scale + t
    return y.to(x.dtype), log_scale


def coupling_reference(
    x: Tensor,
    params: Tensor,
    mask: Tensor | None,
    layout: str,
    raw_first: bool,
    smap: ScaleMap,
    swap: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Compute an affine coupling in plain PyTorch, from arguments that have been checked."""
    shift, raw = split_params(params, layout, raw_first, smap)
    if mask is not None:
        # elements that pass get zeros for parameters: whatever they hold must reach neither y nor a gradient
        shift = torch.where(mask, shift, 0.0)
        raw = None if raw is None else torch.where(mask, raw, 0.0)
        y, log_scale = affine_elements(torch.where(mask, x, 0.0), raw, shift, smap, inverse)
        return torch.where(mask, y, x), torch.where(mask, log_scale, 0.0).flatten(1).sum(1)
    first = x.shape[1] - x.shape[1] // 2
    parts = [x[:, :first], x[:, first:]]
    which = 0 if swap else 1
    parts[which], log_scale = affine_elements(parts[which], raw, shift, smap, inverse)
    return torch.cat(parts, 1), log_scale.flatten(1).sum(1)
