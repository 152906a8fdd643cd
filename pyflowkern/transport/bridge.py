"""Schrödinger bridges learned from samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pyflowkern import ops
from pyflowkern.core.checks import check_choice, check_count, check_generator, check_same_device
from pyflowkern.ops.philox import draw_seed
from pyflowkern.transport._arguments import check_pair, positive
from pyflowkern.transport._bridge_fields import BridgeFields, equal_times
from pyflowkern.transport._bridge_steps import (
    Drift,
    Regression,
    matched,
    mean_matching,
    regression_loss,
    walk,
)
from pyflowkern.transport.samplers import OTPlanSampler

__all__ = ["SchrodingerBridge"]

#: The plan by which each method pairs the samples of a batch at first; None for those that begin with Brownian motion.
METHODS = {"sf2m": "sinkhorn", "dsbm_imf": "independent", "dsbm_ipf": None, "dsb": None}
PLANS = ("sinkhorn", "exact", "unbalanced", "independent", "given")


class SchrodingerBridge(BridgeFields):
    r"""The process closest to Brownian motion :math:`\sigma W` that begins in one law and ends in another.

    Closest is in relative entropy; the process has a drift :math:`u`: :math:`dX = u(t, X)\,dt + \sigma\,dW`.  It
    trains as flows do: an optimizer, and :meth:`loss` of a batch of each end.  Methods:

    * ``"sf2m"``: the velocity of the probability flow and the score are regressed on Brownian bridges between pairs of
      an entropic plan with epsilon :math:`2 \sigma^2`.  Nothing is simulated; the plan is that of a batch.
    * ``"dsbm_imf"``: drifts forward and backward are regressed in turns on Brownian bridges between the ends of paths
      that the other drift has drawn (iterative Markovian fitting).  The first pairs are independent.
    * ``"dsbm_ipf"``: the same, but the first pairs are the ends of Brownian paths (iterative proportional fitting).
    * ``"dsb"``: proportional fitting in discrete time: a drift is regressed on the means of the reversed steps of paths
      that the other has drawn.

    All but the first go through iterations, each of which trains one drift: the backward one, then the forward one,
    and so on.  :meth:`loss` simulates with the other one, keeps what it needs in buffers, and moves on after
    ``iteration_calls`` calls in training mode; :meth:`next_iteration` does so at any time.  Iteration, counts and
    simulated samples are part of the ``state_dict``.  Reading the counts waits for the device once a call.

    Args:
        event_shape: a dimension ``D``, or a shape ``(C, H, W)``; any other shape with a ``network``.
        sigma: the volatility, in units of the data per square root of time.
        method: see above.
        steps: steps of a simulated path over each interval of ``times``; for "dsb" its discretization.
        hidden: widths of the hidden layers of both networks.
        activation: of the networks.
        time: how time enters the networks: "none", "concat" or "concatsquash".
        network: makes a network ``net(t, x)`` from ``event_shape[0]``, called twice; None for
            :class:`~pyflowkern.nn.VectorFieldMLP`, or :class:`~pyflowkern.nn.VectorFieldConv` for images, whose last
            layers start at zero.
        times: of the two ends; or of more snapshots, between each two of which is a bridge, all learned by the same
            networks.
        plan: how "sf2m" and "dsbm_imf" pair the samples of a batch at first: "sinkhorn" (default of the first),
            "exact", "unbalanced", "independent" (default of the second), or "given": row by row, as
            :class:`PairedBatches` draws them from a larger plan.
        reg_m: the penalty of "unbalanced" on marginals.  Pairs are then drawn in proportion to the mass that the plan
            has for them: samples from which nothing grows are drawn rarely; see :meth:`growth`.
        iteration_calls: calls of :meth:`loss` in an iteration; None moves on by :meth:`next_iteration` alone.
        refresh_every: calls between two simulations, each of as many paths as the batch has samples.
        pool: how many simulated pairs are kept for each interval, or steps of paths for "dsb".

    Raises:
        TypeError: for arguments of other types.
        ValueError: for unknown names, numbers out of range, and a plan for a method that begins without one.

    Sources: Tong, Malkin, Fatras, Atanackovic, Zhang, Huguet, Wolf and Bengio (2024) for "sf2m"; Shi, De Bortoli,
    Campbell and Doucet (2023) for "dsbm_imf" and "dsbm_ipf"; De Bortoli, Thornton, Heng and Doucet (2021) for "dsb".

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> bridge = transport.SchrodingerBridge(2, sigma=0.5, hidden=(32, 32))
        >>> optimizer = torch.optim.Adam(bridge.parameters(), 1e-2)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     bridge.loss(torch.randn(64, 2), torch.randn(64, 2) + 3).backward()
        ...     optimizer.step()
        >>> tuple(bridge.sample(torch.randn(5, 2), steps=20).shape)
        (21, 5, 2)
        >>> base = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
        >>> tuple(bridge.log_prob(torch.randn(5, 2), base).shape)
        (5,)
    """

    progress: Tensor
    pool_from: Tensor
    pool_to: Tensor
    pool_times: Tensor

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        sigma: float = 1.0,
        method: str = "sf2m",
        steps: int = 20,
        hidden: Sequence[int] = (128, 128),
        activation: str = "silu",
        time: str = "concat",
        network: Callable[[int], nn.Module] | None = None,
        times: Sequence[float] = (0.0, 1.0),
        plan: str | None = None,
        reg_m: float = 1.0,
        iteration_calls: int | None = 5000,
        refresh_every: int = 10,
        pool: int = 2048,
    ) -> None:
        check_choice("method", method, METHODS)
        super().__init__(
            event_shape,
            sigma=sigma,
            of_drifts=method != "sf2m",
            times=times,
            hidden=hidden,
            activation=activation,
            time=time,
            network=network,
        )
        self.method, self.steps = method, check_count("steps", steps)
        self.plan = _plan(method, plan)
        self.reg_m = positive("reg_m", reg_m)
        calls = iteration_calls
        self.iteration_calls = None if calls is None else check_count("iteration_calls", calls)
        self.refresh_every = check_count("refresh_every", refresh_every)
        pool = check_count("pool", pool)
        # the iteration, its calls of the loss, and the rows that were written to the pool in it
        self.register_buffer("progress", torch.zeros(3, dtype=torch.int64))
        if method != "sf2m":
            shape = (len(self.times) - 1, pool)
            self.register_buffer("pool_from", torch.zeros(*shape, *self.event_shape))
            self.register_buffer("pool_to", torch.zeros(*shape, *self.event_shape))
            self.register_buffer("pool_times", torch.zeros(shape))

    @property
    def iteration(self) -> int:
        """The number of the present iteration, from 0; even ones train the backward drift."""
        return int(self.progress[0])

    def next_iteration(self) -> None:
        """Train the other drift from now on, on paths of the present one.

        Raises:
            ValueError: for "sf2m", which has no iterations.
        """
        if self.method == "sf2m":
            raise ValueError("method must be another than 'sf2m', which has no iterations")
        self.progress.copy_(self.progress.new_tensor([self.iteration + 1, 0, 0]))

    def loss(
        self,
        x0: Tensor | Sequence[Tensor],
        x1: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the loss of the present iteration, a scalar.

        In eval mode it changes no state: what it needs is simulated from the batch.

        Args:
            x0: samples at the first time, ``[N, *shape]``; or a sequence with samples for each of ``times``, without
                ``x1``.
            x1: samples at the last time, ``[M, *shape]``.
            generator: the source of random numbers, on the device of the samples.

        Raises:
            TypeError: for tensors of other dtypes, or a wrong generator.
            ValueError: for shapes that do not fit, empty batches, or another number of clouds than of times.
        """
        clouds = self._clouds(x0, x1)
        check_generator(generator)
        terms = self._regressions(clouds, generator)
        names = ("velocity", "score") if self.method == "sf2m" else ("forward", "backward")
        networks = dict(zip(names, self.networks, strict=True))
        total = [
            regression_loss(network, mine)
            for name, network in networks.items()
            if (mine := [term for term in terms if term.network == name])
        ]
        return torch.stack(total).sum() / (len(self.times) - 1)

    def growth(self, x0: Tensor, x1: Tensor, interval: int = 0) -> Tensor:
        """Return what part of the mass of each of ``x0`` goes on to ``x1`` by the unbalanced plan, ``[N]``.

        Below 1 samples die, above 1 they multiply; the loss draws pairs in proportion to it.

        Args:
            x0: samples at the beginning of an interval, ``[N, *shape]``.
            x1: samples at its end, ``[M, *shape]``.
            interval: which, from 0.

        Raises:
            ValueError: for another plan than "unbalanced", other shapes, or an interval that is not there.
        """
        if self.plan != "unbalanced":
            raise ValueError(f"plan must be 'unbalanced' for growth, got {self.plan!r}")
        last = len(self.times) - 2
        if check_count("interval", interval, 0) > last:
            raise ValueError(f"interval must be at most {last}, got {interval}")
        for name, x in (("x0", x0), ("x1", x1)):
            self._check(name, x)
        h = self.times[interval + 1] - self.times[interval]
        return self._sampler(h).solve(x0, x1).plan.growth()

    def _clouds(self, x0: Tensor | Sequence[Tensor], x1: Tensor | None) -> list[Tensor]:
        """Return checked samples for each time."""
        if isinstance(x0, Tensor):
            if x1 is None:
                raise ValueError("x1 must be given, or x0 a sequence of samples for each time")
            clouds, names = [x0, x1], ["x0", "x1"]
        else:
            if x1 is not None:
                raise ValueError("x1 must be None where x0 is a sequence of samples")
            clouds = list(x0)
            names = [f"x0[{i}]" for i in range(len(clouds))]
        if len(clouds) != len(self.times):
            raise ValueError(
                f"samples must be given for each of the {len(self.times)} times, got {len(clouds)}"
            )
        for name, cloud in zip(names, clouds, strict=True):
            self._check(name, cloud)
            if not len(cloud):
                raise ValueError(f"{name} must have a sample at least")
        check_same_device(**dict(zip(names, clouds, strict=True)))
        return [cloud.detach() for cloud in clouds]

    def _regressions(
        self, clouds: list[Tensor], generator: torch.Generator | None
    ) -> list[Regression]:
        """Return what the networks are to be at random points, of each interval."""
        if self.method == "sf2m":
            return [
                term
                for i in range(len(clouds) - 1)
                for term in self._bridges(
                    "velocity", i, *self._first(i, clouds, generator), generator
                )
            ]
        iteration, calls, written = self._progress()
        network = "forward" if iteration % 2 else "backward"
        intervals = range(len(clouds) - 1)
        if iteration == 0 and self.method != "dsb":
            pairs = [self._first(i, clouds, generator) for i in intervals]
            terms = [self._bridges(network, i, *pairs[i], generator) for i in intervals]
        else:
            if not self.training:
                rows = [self._draw(i, clouds, iteration, generator) for i in intervals]
            else:
                if calls % self.refresh_every == 0 or not written:
                    written = self._refill(clouds, iteration, written, generator)
                count = min(map(len, clouds))
                rows = [self._from_pool(i, written, count, generator) for i in intervals]
            terms = [self._terms(network, i, *rows[i], generator) for i in intervals]
        if self.training:
            self.progress.copy_(self.progress.new_tensor([iteration, calls + 1, written]))
        return [term for of_interval in terms for term in of_interval]

    def _terms(
        self,
        network: str,
        i: int,
        first: Tensor,
        second: Tensor,
        times: Tensor,
        generator: torch.Generator | None,
    ) -> list[Regression]:
        """Return the regressions on simulated rows: see :meth:`_draw`."""
        if self.method != "dsb":
            return self._bridges(network, i, first, second, generator)
        step = (self.times[i + 1] - self.times[i]) / self.steps
        # the inverse of the variance of a step's slope, as in bridges
        return [Regression(network, times, first, second, 1 / (1 + self.sigma**2 / step))]

    def _progress(self) -> list[int]:
        """Return the iteration, its calls and the rows written, having moved on if it was over."""
        iteration, calls, written = self.progress.tolist()
        over = self.iteration_calls is not None and calls >= self.iteration_calls
        if over and self.training:
            return [iteration + 1, 0, 0]
        return [iteration, calls, written]

    def _bridges(
        self, network: str, i: int, x0: Tensor, x1: Tensor, generator: torch.Generator | None
    ) -> list[Regression]:
        start, end = self.times[i], self.times[i + 1]
        return matched(network, x0, x1, start, end, self.sigma, generator)

    def _first(
        self, i: int, clouds: list[Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Return the pairs of an interval with which a method begins."""
        x0, x1 = clouds[i], clouds[i + 1]
        h = self.times[i + 1] - self.times[i]
        if self.plan is None:
            return x0, ops.add_noise(x0, self.sigma * h**0.5, generator=generator)
        if self.plan == "given":
            check_pair(x0, x1)
            if len(x0) != len(x1):
                raise ValueError(
                    f"x0 and x1 must have as many samples with plan='given', got {len(x0)} and {len(x1)}"
                )
            return x0, x1
        if self.plan == "independent":
            return x0, _some(x1, len(x0), generator)
        return self._sampler(h).sample_plan(x0, x1, generator=generator)

    def _sampler(self, h: float) -> OTPlanSampler:
        """Return what pairs the ends of an interval of this length."""
        assert self.plan is not None
        return OTPlanSampler(self.plan, 2 * self.sigma**2 * h, self.reg_m)

    # --- simulated paths --------------------------------------------------------------------------

    @torch.no_grad()
    def _draw(
        self, i: int, clouds: list[Tensor], iteration: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows for the pool of an interval: pairs of ends, or points, targets and times of steps."""
        backward = iteration % 2 == 1  # the forward drift is trained on paths of the backward one
        first, last = (i + 1, i) if backward else (i, i + 1)
        x, times = clouds[first], equal_times(self.times[first], self.times[last], self.steps)
        drift: Drift = lambda t, x: torch.zeros_like(x)  # noqa: E731
        if iteration:
            drift = partial(self.drift, backward=backward)
        seed = draw_seed(None, generator, x.device)
        if self.method == "dsb":
            at, points, targets = mean_matching(drift, x, times, self.sigma, seed)
            return points, targets, at
        (y,) = deque(walk(drift, x, times, self.sigma, seed), maxlen=1)
        pair = (y, x) if backward else (x, y)
        return *pair, x.new_zeros(len(x))

    @torch.no_grad()
    def _refill(
        self,
        clouds: list[Tensor],
        iteration: int,
        written: int,
        generator: torch.Generator | None,
    ) -> int:
        """Write simulated rows over the oldest of each pool; return how many were written up to now."""
        size = self.pool_from.shape[1]
        drawn = [self._draw(i, clouds, iteration, generator) for i in range(len(clouds) - 1)]
        count = min(size, *(len(rows[0]) for rows in drawn))
        places = torch.arange(written, written + count, device=self.pool_from.device) % size
        for i, rows in enumerate(drawn):
            order = torch.randperm(len(rows[0]), device=rows[0].device, generator=generator)[
                :count
            ]
            for pool, values in zip(
                (self.pool_from, self.pool_to, self.pool_times), rows, strict=True
            ):
                pool[i, places] = values[order].to(pool)
        return written + count

    def _from_pool(
        self, i: int, written: int, count: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        device, filled = self.pool_from.device, min(written, self.pool_from.shape[1])
        k = torch.randint(filled, (count,), device=device, generator=generator)
        return self.pool_from[i, k], self.pool_to[i, k], self.pool_times[i, k]

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{super().extra_repr()}, method={self.method!r}, steps={self.steps}, plan={self.plan!r}"


def _plan(method: str, plan: str | None) -> str | None:
    """Return how a method pairs samples at first."""
    if plan is None:
        return METHODS[method]
    if METHODS[method] is None:
        raise ValueError(
            f"plan must be None for {method!r}, which begins with Brownian motion, got {plan!r}"
        )
    return check_choice("plan", plan, PLANS)


def _some(x: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Return ``count`` random samples, each once where they are as many."""
    if count == len(x):
        return x[torch.randperm(count, device=x.device, generator=generator)]
    return x[torch.randint(len(x), (count,), device=x.device, generator=generator)]
