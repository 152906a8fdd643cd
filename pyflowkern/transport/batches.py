"""Minibatches of pairs, from plans that may be larger."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyflowkern.core.checks import check_count, check_flag, check_generator
from pyflowkern.transport._ahead import Ahead
from pyflowkern.transport.samplers import OTPlanSampler

__all__ = ["PairedBatches"]


class PairedBatches:
    r"""Minibatches of pairs, from one plan for many of them.

    Plans of more samples than a minibatch has come closer to the true transport, and so straighten paths more
    (Klein et al., 2025).  ``plan_size`` samples are drawn from each side, one plan is solved, every sample of the
    source gets a partner, and ``plan_size // batch_size`` minibatches are handed out.  Then a new plan begins.

    Use them with a matcher that pairs no more: ``ConditionalFlowMatcher``, or ``SchrodingerBridge...`` with
    ``ot_method=None``.

    With ``ahead``, on the CPU the next plan is solved by a thread while the minibatches of the last one are used.  That
    hides the plan where cores are idle during a step, and takes longer where a step uses all of them.  All random
    numbers are drawn by the caller's thread, in one order with or without it, and what goes wrong is raised where the
    next minibatch is asked for.

    Args:
        source: all samples ``[N, *shape]``, from which ``plan_size`` different ones are drawn, or a function that is
            given a count and returns so many.
        target: likewise.
        plan_size: samples of a plan.
        batch_size: pairs of a minibatch; divides ``plan_size``.
        sampler: how pairs are drawn; entropic, with ``reg=0.01`` of the spread, if None.
        generator: the source of random numbers.
        ahead: whether a thread solves plans ahead of time.

    Raises:
        TypeError: for a source that is neither a tensor nor a function, another sampler, and an ``ahead`` that is no
            bool.
        ValueError: for sizes that do not fit.

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> pairs = transport.PairedBatches(lambda n: torch.randn(n, 2), torch.randn(1000, 2) + 3,
        ...                                 plan_size=512, batch_size=128)
        >>> x0, x1 = next(iter(pairs))
        >>> tuple(x0.shape), tuple(x1.shape)
        ((128, 2), (128, 2))
    """

    def __init__(
        self,
        source: Tensor | Callable[[int], Tensor],
        target: Tensor | Callable[[int], Tensor],
        *,
        plan_size: int = 16_384,
        batch_size: int = 512,
        sampler: OTPlanSampler | None = None,
        generator: torch.Generator | None = None,
        ahead: bool = False,
    ) -> None:
        self.plan_size = check_count("plan_size", plan_size)
        self.batch_size = check_count("batch_size", batch_size)
        if plan_size % batch_size:
            raise ValueError(f"batch_size must divide plan_size, got {batch_size} and {plan_size}")
        check_generator(generator)
        self.ahead = check_flag("ahead", ahead)
        if sampler is None:
            sampler = OTPlanSampler("sinkhorn", 0.01, normalize_cost="spread")
        elif not isinstance(sampler, OTPlanSampler):
            raise TypeError(f"sampler must be an OTPlanSampler, got {type(sampler).__name__}")
        self.sampler = sampler
        if self.sampler.mass < 1:
            raise ValueError(
                "sampler must give every sample a partner: a plan of the whole mass, "
                f"got mass={self.sampler.mass}"
            )
        self.generator = generator
        for name, side in (("source", source), ("target", target)):
            if not isinstance(side, Tensor) and not callable(side):
                raise TypeError(
                    f"{name} must be a tensor or a function, got {type(side).__name__}"
                )
            if isinstance(side, Tensor) and len(side) < plan_size:
                raise ValueError(
                    f"{name} must have at least plan_size = {plan_size} samples, got {len(side)}"
                )
        self.source, self.target = source, target

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(x0, x1)`` of ``batch_size`` pairs, without end."""
        drawn = self._drawn()
        on_host = drawn[0].device.type == "cpu"
        plans = Ahead(self.sampler.pairs_of, threaded=self.ahead and on_host)
        try:
            plans.start(*drawn)
            while True:
                i, j = plans.result()
                x0, x1 = drawn[:2]
                order = torch.randperm(len(x0), device=x0.device, generator=self.generator)
                # copies: a source may give the same memory again
                x0, x1 = x0[i[order]], x1[j[order]]
                failure = None
                try:
                    drawn = self._drawn()
                    plans.start(*drawn)
                except Exception as error:  # raised once this plan has been handed out
                    failure = error
                yield from zip(x0.split(self.batch_size), x1.split(self.batch_size), strict=True)
                if failure is not None:
                    raise failure
        finally:
            plans.close()

    def _drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the samples of a plan, and what chooses its pairs."""
        x0, x1 = self._draw("source", self.source), self._draw("target", self.target)
        return x0, x1, self.sampler.uniforms(x0, False, generator=self.generator)

    def _draw(self, name: str, side: Tensor | Callable[[int], Tensor]) -> Tensor:
        if not isinstance(side, Tensor):
            samples = side(self.plan_size)
            if not isinstance(samples, Tensor) or len(samples) != self.plan_size:
                raise ValueError(f"{name} must return a tensor of {self.plan_size} samples")
            return samples
        order = torch.randperm(len(side), device=side.device, generator=self.generator)
        return side[order[: self.plan_size]]
