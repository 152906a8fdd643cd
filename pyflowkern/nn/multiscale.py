"""The multi-scale architecture: after each level half of the channels leave as latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern.core.checks import check_count, check_floating
from pyflowkern.nn._base import Bijection, BijectionTransform, Sequential, zero_log_det
from pyflowkern.nn.coupling import Split

__all__ = ["MultiScale", "run_through"]

#: Called as ``run(layer, x)`` in place of ``layer(x)``.
Run = Callable[[Bijection, Tensor], tuple[Tensor, Tensor]]


class MultiScale(Bijection):
    r"""Levels with a :class:`Split` between them: ``[N, C, *space] -> [N, D]``, the latents of all levels concatenated.

    Each split standardises half of its channels, which become latents, and the next level continues with the others.
    The log-determinant is the sum of those of all levels and splits.

    Args:
        event_shape: shape of one input, ``(C, *space)``.
        levels: the levels, data side first.
        splits: one split fewer than levels.

    Raises:
        ValueError: when there is not one split fewer than levels.

    Source: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (2017).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> levels = [nn.Squeeze(), nn.Squeeze()]
        >>> flow = nn.MultiScale((1, 8, 8), levels, [nn.Split(4)])
        >>> z, log_det = flow(torch.randn(2, 1, 8, 8))
        >>> [tuple(part.shape) for part in flow.split_latents(z)]
        [(2, 2, 4, 4), (2, 8, 2, 2)]
    """

    def __init__(
        self, event_shape: Sequence[int], levels: Sequence[Bijection], splits: Sequence[Split]
    ) -> None:
        super().__init__()
        if len(splits) != len(levels) - 1:
            raise ValueError(
                f"splits must be one fewer than levels, got {len(splits)} and {len(levels)}"
            )
        self.event_shape = tuple(check_count("event_shape", size) for size in event_shape)
        self.levels, self.splits = torch.nn.ModuleList(levels), torch.nn.ModuleList(splits)
        self.latent_shapes: list[tuple[int, ...]] = []
        shape = self.event_shape
        for level, split in zip(levels, [*splits, None], strict=True):
            shape = level.output_shape(shape)
            if split is not None:
                self.latent_shapes.append((split.factored, *shape[1:]))
                shape = (split.kept, *shape[1:])
        self.latent_shapes.append(shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the latents ``[N, D]`` and ``log_det[N]``."""
        return self.run(x, lambda layer, y: layer(y, context))

    def run(self, x: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Compute :meth:`forward`, calling ``run(layer, x)`` in place of each level and split."""
        latents: list[Tensor] = []
        x, total = run(self.levels[0], x)  # type: ignore[arg-type]
        for split, level in zip(self.splits, self.levels[1:], strict=True):
            y, log_det = run(split, x)  # type: ignore[arg-type]
            kept, latent = split.partition(y)  # type: ignore[operator]
            latents.append(latent.flatten(1))
            x, level_log_det = run(level, kept)  # type: ignore[arg-type]
            total = total + log_det + level_log_det
        return torch.cat([*latents, x.flatten(1)], 1), total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo :meth:`forward`."""
        *latents, last = self.split_latents(z)
        x, total = self.levels[-1].inverse(last, context)  # type: ignore[operator]
        pairs = zip(
            reversed(list(self.splits)),
            reversed(list(self.levels[:-1])),
            reversed(latents),
            strict=True,
        )
        for split, level, latent in pairs:
            y, log_det = split.inverse(split.join(x, latent), context)  # type: ignore[operator]
            x, level_log_det = level.inverse(y, context)  # type: ignore[operator]
            total = total + log_det + level_log_det
        return x, total

    def _way_back(self, inverse: bool) -> str:
        return "call"  # its levels have a way each

    def split_latents(self, z: Tensor) -> list[Tensor]:
        """Return the latents ``[N, C, *space]`` of each level, finest first."""
        check_floating("z", z)
        sizes = [math.prod(shape) for shape in self.latent_shapes]
        if z.dim() != 2 or z.shape[1] != sum(sizes):
            raise ValueError(f"z must have shape [N, {sum(sizes)}], got {tuple(z.shape)}")
        parts = torch.split(z, sizes, 1)
        return [p.reshape(z.shape[0], *s) for p, s in zip(parts, self.latent_shapes, strict=True)]

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``(D,)``."""
        return (math.prod(shape),)

    def input_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of one input."""
        return self.event_shape

    def transform(self, context: Tensor | None = None, **options: Any) -> BijectionTransform:
        """Return this layer as a torch Transform; it knows its own event shapes."""
        options.pop("event_dim", None)
        return BijectionTransform(self, context, len(self.event_shape), 1, **options)


def run_through(layer: Bijection, x: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """Compute ``layer(x)`` with ``run(part, x)`` for each part; chains and levels are taken apart first."""
    if isinstance(layer, MultiScale):
        return layer.run(x, lambda part, y: run_through(part, y, run))
    if not isinstance(layer, Sequential):
        return run(layer, x)
    total = zero_log_det(x)
    for part in layer:
        x, log_det = run_through(part, x, run)
        total = total + log_det
    return x, total
