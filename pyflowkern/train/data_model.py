"""A model in the units of its data."""

from __future__ import annotations

import math

from torch import Tensor, nn

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

    def scores(self, rows: Tensor) -> Tensor:
        """Return how well the model describes each row; lower is better."""
        raise NotImplementedError

    def loss(self, rows: Tensor) -> Tensor | None:
        """Return the loss of a model that is not trained by its scores, else None."""
        return None

    def objective(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a training step makes small, and what the run's curve shows of it: two scalars."""
        own = self.loss(rows)
        if own is not None:
            return own, own
        score = self.scores(rows).mean()
        return score if self.mean is None else score / rows[0].numel(), score


class DataFlow(DataModel):
    """A flow whose densities and samples are in the units of the data.

    Vectors are standardised on the way in; ``log_prob`` counts that step's log-determinant.  Images pass as they are,
    for an image flow dequantises inside.
    """

    def __init__(self, flow: Flow, mean: Tensor | None = None, std: Tensor | None = None) -> None:
        super().__init__(mean, std)
        self.flow = flow

    def _standardise(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        return self.standardised(x), 0.0 if self.std is None else -self.std.log().sum()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map data to latent; returns ``z`` and ``log_det``."""
        x, log_det = self._standardise(x)
        z, inner = self.flow(x)
        return z, inner + log_det

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map latent to data; returns ``x`` and ``log_det``."""
        x, inner = self.flow.inverse(z)
        return self.restored(x), inner if self.std is None else inner + self.std.log().sum()

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density of each row, in nats and data units."""
        x, log_det = self._standardise(x)
        return self.flow.log_prob(x) + log_det

    @property
    def unit(self) -> str:
        """Bits/dim for images, nats for vectors."""
        return "bits/dim" if self.mean is None else "nats"

    @property
    def curve_unit(self) -> str:
        """The loss of a flow that brings one along: its likelihood takes a solve, and is for evaluations."""
        return "loss" if hasattr(self.flow, "loss") else self.unit

    def scores(self, rows: Tensor) -> Tensor:
        """Return each row's bits/dim for images, nats for vectors."""
        nll = -self.log_prob(rows)
        return nll if self.mean is not None else nll / (rows[0].numel() * math.log(2))

    def loss(self, rows: Tensor) -> Tensor | None:
        """Return the loss that a flow such as :class:`~pyflowkern.flows.FlowMatching` brings along."""
        own = getattr(self.flow, "loss", None)
        return None if own is None else own(self.standardised(rows))

    def sample(self, n: int, *, temperature: float = 1.0) -> Tensor:
        """Draw ``n`` rows in data units, integers for an image flow."""
        if self.mean is None:
            return self.flow.sample(
                n, temperature=temperature, quantized=self.flow.preprocess is not None
            )
        return self.restored(self.flow.sample(n, temperature=temperature))
