"""Philox4x32-7 in plain PyTorch: the same bits as the kernels draw, on any device, in any order.

Counter-based noise (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): block ``b`` of a stream is a function of the key and of ``b`` alone, so nothing has to be
stored for a backward pass and nothing depends on how the work was split.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["draw_seed", "philox_blocks", "philox_normals", "philox_uint16"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7  # the fewest that pass every test of BigCrush, by the paper


def draw_seed(
    seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Return a seed as an int64 scalar on ``device``, where a kernel reads it without a sync.

    Without ``seed`` it is drawn from ``generator``, or from the default generator of ``device``,
    and so follows
    :func:`torch.manual_seed`.  What this function returned is a seed, too.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}"
        )
    if seed is None:
        source = device if generator is None else generator.device
        drawn = torch.randint(
            0, 2**63 - 1, (), dtype=torch.int64, device=source, generator=generator
        )
        if generator is None:
            return drawn
        # to the host it must have arrived, as kernels read it at once
        return drawn.to(device, non_blocking=device.type != "cpu")
    if generator is not None:
        raise ValueError("give seed or generator, not both")
    if isinstance(seed, Tensor):
        return _checked(seed, device)
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed must be an int or None, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit into int64, got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=device)


def _checked(seed: Tensor, device: torch.device) -> Tensor:
    if seed.dtype != torch.int64 or seed.layout != torch.strided:
        raise TypeError(f"seed must be an int or a dense int64 tensor, got {seed.dtype}")
    if seed.dim():
        raise ValueError(f"seed must have no axes, got shape {tuple(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"seed must be on the device of x, {device}, got {seed.device}")
    return seed


def philox_blocks(seed: Tensor, counters: Tensor) -> Tensor:
    """Return four 32-bit words, held as int64, for each 128-bit counter.

    Args:
        seed: int64 scalar; its low and high word are the key.
        counters: int64 ``[..., 4]`` of 32-bit words, lowest first.
    """
    c0, c1, c2, c3 = counters.unbind(-1)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        # an int64 product of 32-bit words wraps, which leaves its 64 bits right
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), -1)


def philox_uint16(seed: Tensor, count: int) -> Tensor:
    """Return ``count`` 16-bit words, held as int64: each eight are the halves of a block."""
    block = torch.arange((count + 7) // 8, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(block)
    words = philox_blocks(seed, torch.stack((block & _MASK, block >> 32, zero, zero), -1))
    return torch.stack((words & 0xFFFF, words >> 16), -1).flatten()[:count]


def philox_normals(seed: Tensor, stream: int, count: int, dtype: torch.dtype) -> Tensor:
    r"""Return ``count`` standard normal numbers: each two are of two words of a block (Box and Muller 1958).

    They are :math:`\sqrt{-2 \log u}` times the cosine and the sine of an angle: :math:`u` are the upper 31 bits of one
    word, and the angle is the other word's part of :math:`2^{32}` of a turn.
    """
    block = torch.arange((count + 3) // 4, dtype=torch.int64, device=seed.device)
    of_stream = [torch.full_like(block, word) for word in (stream & _MASK, stream >> 32)]
    words = philox_blocks(seed, torch.stack((block & _MASK, block >> 32, *of_stream), -1))
    u = ((words[:, ::2] >> 1).to(dtype) + 0.5) * 2.0**-31
    quarter = (words[:, 1::2] + 2**29) >> 30  # of a turn, rounded
    rest = (words[:, 1::2] - (quarter << 30)).to(dtype) * (math.pi / 2**31)
    cos, sin, odd = rest.cos(), rest.sin(), quarter % 2 == 1
    turned = (
        torch.where(odd, sin, cos) * (1 - ((quarter + 1) & 2)),
        torch.where(odd, cos, sin) * (1 - (quarter & 2)),
    )
    return ((-2 * u.log()).sqrt() * torch.stack(turned)).movedim(0, -1).flatten()[:count]
