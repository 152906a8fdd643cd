"""A model in the units of its data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyflowkern.data import Batch, Condition, parts_of
from pyflowkern.flows import Flow

__all__ = ["DataFlow", "DataModel"]


class DataModel(nn.Module):
    """What a run trains: a model that standardises vectors on the way in and is scored by rows."""

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, mean: Tensor | None, std: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def standardised(self, x: Tensor) -> Tensor:
        """Return rows without their mean and scale."""
        return x if self.mean is None or self.std is None else (x - self.mean) / self.std

    def restored(self, x: Tensor) -> Tensor:
        """Return standardised rows in the units of the data."""
        return x if self.mean is None or self.std is None else x * self.std + self.mean

    @property
    def unit(self) -> str:
        """What scores are measured in."""
        raise NotImplementedError

    @property
    def curve_unit(self) -> str:
        """What a run's curve shows: scores, or the loss of a model that is not trained by them."""
        return self.unit

    def scores(self, rows: Batch) -> Tensor:
        """Return how well the model describes each row; lower is better."""
        raise NotImplementedError

    def loss(self, rows: Batch) -> Tensor | None:
        """Return the loss of a model that is not trained by its scores, else None."""
        return None

    def objective(self, rows: Batch) -> tuple[Tensor, Tensor]:
        """Return what a training step makes small, and what the run's curve shows of it: two scalars."""
        own = self.loss(rows)
        if own is not None:
            return own, own
        score = self.scores(rows).mean()
        return score if self.mean is None else score / parts_of(rows)[0][0].numel(), score


class DataFlow(DataModel):
    """A flow whose densities and samples are in the units of the data.

    Vectors are standardised on the way in; ``log_prob`` counts that step's log-determinant.  Images pass as they are,
    for an image flow dequantises inside.

    Contexts are numbers in the units of the data, standardised on the way in, too, or classes from 0 on, which a flow
    without classes of its own gets as one-hot vectors.
    """

    context_mean: Tensor | None
    context_std: Tensor | None

    def __init__(
        self,
        flow: Flow,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        condition: Condition | None = None,
    ) -> None:
        super().__init__(mean, std)
        self.flow = flow
        self.register_buffer("context_mean", condition.mean if condition else None)
        self.register_buffer("context_std", condition.std if condition else None)
        self.classes = len(condition.classes) if condition else 0

    def _conditions(self, context: Tensor | None) -> Tensor | None:
        """Return the context that the flow takes."""
        if context is None:
            return None
        if self.context_mean is not None and self.context_std is not None:
            return (context - self.context_mean) / self.context_std
        if getattr(self.flow, "classes", 0):
            return context
        dtype = next(self.flow.parameters()).dtype
        return functional.one_hot(context, self.classes).to(dtype)

    def _standardise(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        return self.standardised(x), 0.0 if self.std is None else -self.std.log().sum()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map data to latent; returns ``z`` and ``log_det``."""
        x, log_det = self._standardise(x)
        z, inner = self.flow(x, self._conditions(context))
        return z, inner + log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map latent to data; returns ``x`` and ``log_det``."""
        x, inner = self.flow.inverse(z, self._conditions(context))
        return self.restored(x), inner if self.std is None else inner + self.std.log().sum()

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the log-density of each row, in nats and data units."""
        x, log_det = self._standardise(x)
        return self.flow.log_prob(x, self._conditions(context)) + log_det

    @property
    def unit(self) -> str:
        """Bits/dim for images, nats for vectors."""
        return "bits/dim" if self.mean is None else "nats"

    @property
    def curve_unit(self) -> str:
        """The loss of a flow that brings one along: its likelihood takes a solve, and is for evaluations."""
        return "loss" if hasattr(self.flow, "loss") else self.unit

    def scores(self, rows: Batch) -> Tensor:
        """Return each row's bits/dim for images, nats for vectors."""
        x, context = parts_of(rows)
        nll = -self.log_prob(x, context)
        return nll if self.mean is not None else nll / (x[0].numel() * math.log(2))

    def loss(self, rows: Batch) -> Tensor | None:
        """Return the loss that a flow such as :class:`~pyflowkern.flows.FlowMatching` brings along."""
        own = getattr(self.flow, "loss", None)
        x, context = parts_of(rows)
        return None if own is None else own(self.standardised(x), self._conditions(context))

    def in_turn(self, n: int) -> Tensor | None:
        """Return ``n`` classes, all in turn; None for a flow without."""
        device = next(self.flow.parameters()).device
        return torch.arange(n, device=device) % self.classes if self.classes else None

    def sample(
        self, n: int, context: Tensor | None = None, *, temperature: float = 1.0, **options: Any
    ) -> Tensor:
        """Draw ``n`` rows in data units, integers for an image flow; of all classes in turn where none are given."""
        context = self.in_turn(n) if context is None else context
        if self.flow.preprocess is not None:
            options["quantized"] = True
        drawn = self.flow.sample(n, self._conditions(context), temperature=temperature, **options)
        return self.restored(drawn)
