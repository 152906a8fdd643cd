"""Probes of Hutchinson's estimator: signs regenerated from a seed, or any tensor of unit covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflowkern.core.checks import check_count, check_dense, check_floating, check_sizes
from pyflowkern.core.draws import normal_like
from pyflowkern.core.dtypes import accumulation_dtype, cast
from pyflowkern.ops.philox import draw_seed, philox_blocks

__all__ = ["as_probe", "draw_probe", "expand_probe", "probe_of", "rademacher"]

_MASK = 0xFFFFFFFF
KINDS = ("rademacher", "gaussian")


def draw_probe(
    x: Tensor,
    *,
    probes: int = 1,
    kind: str = "rademacher",
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw probes with :math:`E\,e e^T = I` for states like ``x`` ``[N, D]``.

    Args:
        x: the states, of which shape, dtype and device count.
        probes: ``K``, the number of Gaussian probes; signs take it where they are used.
        kind: "rademacher" (signs, the least variance of independent entries) or "gaussian".
        seed: of the signs, instead of a generator.
        generator: source of randomness.

    Returns:
        For "rademacher" the seed of the signs, an int64 scalar that stands for any number of
        them: they are regenerated where they are needed and never stored.  For "gaussian"
        ``[K, N, D]``.

    Raises:
        TypeError: for states that are no floating-point tensor, or a seed that is no int.
        ValueError: for another kind, probes below 1, or a seed of Gaussian probes.

    Source: Hutchinson 1990, *A stochastic estimator of the trace of the influence matrix*.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import draw_probe, rademacher
        >>> x = torch.zeros(5, 2)
        >>> rademacher(draw_probe(x, seed=1), (1, 5, 2)).abs().sum().item()
        10.0
        >>> tuple(draw_probe(x, probes=3, kind="gaussian").shape)
        (3, 5, 2)
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be 'rademacher' or 'gaussian', got {kind!r}")
    check_floating("x", x)
    check_count("probes", probes)
    if kind == "rademacher":
        return draw_seed(seed, generator, x.device)
    if seed is not None:
        raise ValueError("seed is for kind='rademacher'; give a generator for 'gaussian'")
    return normal_like(x, (probes, *x.shape), generator, accumulation_dtype(x.dtype))


def rademacher(seed: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the signs of a seed: element i is bit ``i % 128`` of Philox block ``i // 128``.

    Args:
        seed: int64 scalar, as :func:`draw_probe` returns it.
        shape: of the result.
        dtype: of the result, a floating-point one.

    Raises:
        TypeError: for a seed that is no int64 tensor, a shape that is none, and a dtype of integers.
        ValueError: for a seed with axes, and negative sizes.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import rademacher
        >>> rademacher(torch.tensor(3), (4,)).tolist()
        [-1.0, -1.0, 1.0, 1.0]
    """
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int64 tensor, got {getattr(seed, 'dtype', type(seed))}")
    if seed.dim():
        raise ValueError(f"seed must have no axes, got shape {tuple(seed.shape)}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    count = 1
    for size in check_sizes("shape", shape):
        count *= size
    block = torch.arange((count + 127) // 128, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(block)
    words = philox_blocks(seed, torch.stack((block & _MASK, block >> 32, zero, zero), -1))
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=seed.device)) & 1
    return (1 - 2 * bits).flatten()[:count].to(dtype).reshape(shape)


def as_probe(probe: Tensor, probes: int, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return a probe as the op takes it, a seed or ``[K, N or 1, D]``, and ``K``."""
    if not isinstance(probe, Tensor):
        raise TypeError(f"probe must be a torch.Tensor, got {type(probe).__name__}")
    check_dense("probe", probe)
    check_count("probes", probes)
    if probe.dtype == torch.int64:
        if probe.dim():
            raise ValueError(
                f"a probe of int64 is a seed and must have no axes, got shape {tuple(probe.shape)}"
            )
        return probe, probes
    if not probe.is_floating_point():
        raise TypeError(f"probe must be floating-point, or an int64 seed, got {probe.dtype}")
    e = probe.unsqueeze(0) if probe.dim() == 2 else probe
    if (
        e.dim() != 3
        or e.shape[0] < 1
        or e.shape[1] not in (1, x.shape[0])
        or e.shape[2] != x.shape[1]
    ):
        raise ValueError(
            f"probe must have shape [N, D] or [K, N, D] for x of shape {tuple(x.shape)}, "
            f"got {tuple(probe.shape)}"
        )
    return cast(e, dtype), e.shape[0]


def probe_of(
    method: str, probe: Tensor | None, probes: int, x: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, int]:
    """Return a probe as :func:`as_probe` does, None for "exact", and how many there are."""
    if method == "exact":
        if probe is not None:
            raise ValueError("method='exact' takes no probe")
        return None, x.shape[1]
    if method != "hutchinson":
        raise ValueError(f"method must be 'hutchinson' or 'exact', got {method!r}")
    if probe is None:
        raise ValueError("method='hutchinson' needs a probe; ops.draw_probe(x) draws one")
    return as_probe(probe, probes, x, dtype)


def expand_probe(probe: Tensor, probes: int, x: Tensor) -> Tensor:
    """Return the probes as ``[K, N, D]``."""
    shape = (probes, *x.shape)
    return rademacher(probe, shape, x.dtype) if probe.dtype == torch.int64 else probe.expand(shape)
