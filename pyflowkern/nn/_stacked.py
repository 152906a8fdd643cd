r"""Fields that carry tangents through their layers, stacked on the primal along the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyflowkern._library import transformed
from pyflowkern.core.dtypes import accumulation_dtype, cast
from pyflowkern.nn._fields import DivergenceField, Wanted, check_states, probes_of
from pyflowkern.ops.field import hutchinson_trace

__all__ = ["StackedField"]

MOST = 2**24  # numbers that the widest layer's stack of tangents may have in an exact trace


class StackedField(DivergenceField):
    """A field on images, whose subclass computes the velocity and its products with probes in one pass."""

    channels: int

    def _run(
        self, t: Tensor | float, x: Tensor, e: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``f`` and, for probes ``[K, N, C, H, W]``, ``J e``; both in the dtype of the work."""
        raise NotImplementedError

    def _widest(self, height: int, width: int) -> int:
        """Return how many numbers the widest layer has for one image."""
        raise NotImplementedError

    def _check(self, x: Tensor) -> None:
        check_states(x, self.channels, 4)

    def _fused(
        self, t: Tensor | float, x: Tensor, context: Tensor | None, wanted: Wanted
    ) -> tuple[Tensor, ...]:
        probe, probes, method, per_probe, regularizers = wanted
        exact = method == "exact" and probe is None
        if exact:
            velocity, divergence, frobenius = self._exact(t, x, context)
        else:
            e = probes_of(x, probe, probes, method)
            velocity, traces, norms = self._traces(t, x, e, context)
            divergence, frobenius = traces if per_probe else _mean(traces), norms
        if not regularizers:
            return cast(velocity, x.dtype), divergence
        kinetic = velocity.flatten(1).square().sum(1)
        return (
            cast(velocity, x.dtype),
            divergence,
            kinetic,
            frobenius if exact else _mean(frobenius),
        )

    def _traces(
        self, t: Tensor | float, x: Tensor, e: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``f`` and of each probe ``[K, N, C, H, W]`` the trace and the norm, ``[K, N]``."""
        velocity, product = self._run(t, x, e, context)
        assert product is not None
        e = cast(e, product.dtype).expand_as(product)
        pair = hutchinson_trace(e.flatten(0, 1), product.flatten(0, 1), with_norm=True)
        trace, norm = (part.view(e.shape[:2]) for part in pair)
        return velocity, trace, norm

    def _exact(
        self, t: Tensor | float, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``f``, its divergence and the squared norm of its Jacobian, chunk by chunk of unit vectors.

        Where gradients are recorded the chunks are computed again one by one in the backward pass.
        """
        size = math.prod(x.shape[1:])
        widest = self._widest(*x.shape[2:])
        step = max(1, MOST // max(1, x.shape[0] * widest) - 1)
        velocity = x
        divergence = frobenius = x.new_zeros(x.shape[0], dtype=accumulation_dtype(x.dtype))
        for first in range(0, size, step):
            count = min(step, size - first)
            e = x.new_zeros(count, 1, size)
            e[:, 0].diagonal(first).fill_(1)
            e = e.view(count, 1, *x.shape[1:]).expand(count, *x.shape)
            if count < size and torch.is_grad_enabled() and not transformed():
                results = checkpoint(
                    self._traces, t, x, e, context, use_reentrant=False, preserve_rng_state=False
                )
            else:
                results = self._traces(t, x, e, context)
            velocity, traces, norms = results
            divergence, frobenius = divergence + traces.sum(0), frobenius + norms.sum(0)
        return velocity, divergence, frobenius


def _mean(t: Tensor) -> Tensor:
    return t.squeeze(0) if t.shape[0] == 1 else t.mean(0)
