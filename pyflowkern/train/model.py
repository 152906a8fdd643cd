"""A flow built for a data set, and the same flow in the units of its data."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyflowkern import flows, ode
from pyflowkern.data import DataSet
from pyflowkern.flows import Flow
from pyflowkern.train.config import ConfigError, TrainConfig

__all__ = ["DataFlow", "build", "score", "with_defaults", "with_earlier_defaults"]


#: Arguments of flows that a run does not offer: its data decides bits, it has no context, and modules are no text.
NOT_OPTIONS = (
    "bits",
    "context_features",
    "conditioner",
    "base",
    "spline",
    "field",
    "params",
    "norm",
)


class DataFlow(nn.Module):
    """A flow whose densities and samples are in the units of the data.

    Vectors are standardised on the way in; ``log_prob`` counts that step's log-determinant.  Images pass as they are,
    for an image flow dequantises inside.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, flow: Flow, mean: Tensor | None = None, std: Tensor | None = None) -> None:
        super().__init__()
        self.flow = flow
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def _standardise(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        if self.mean is None or self.std is None:
            return x, 0.0
        return (x - self.mean) / self.std, -self.std.log().sum()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map data to latent; returns ``z`` and ``log_det``."""
        x, log_det = self._standardise(x)
        z, inner = self.flow(x)
        return z, inner + log_det

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map latent to data; returns ``x`` and ``log_det``."""
        x, inner = self.flow.inverse(z)
        if self.mean is None or self.std is None:
            return x, inner
        return x * self.std + self.mean, inner + self.std.log().sum()

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density of each row, in nats and data units."""
        x, log_det = self._standardise(x)
        return self.flow.log_prob(x) + log_det

    def sample(self, n: int, *, temperature: float = 1.0) -> Tensor:
        """Draw ``n`` rows in data units, integers for an image flow."""
        if self.mean is None or self.std is None:
            return self.flow.sample(
                n, temperature=temperature, quantized=self.flow.preprocess is not None
            )
        return self.flow.sample(n, temperature=temperature) * self.std + self.mean


def build(config: TrainConfig, data: DataSet | dict[str, Any]) -> DataFlow:
    """Build the configured flow for a data set, or for the facts about one that a checkpoint stores."""
    facts = data if isinstance(data, dict) else data_facts(data)
    known = _known_flows()
    if config.flow not in known:
        raise ConfigError(f"unknown flow {config.flow!r}; known are {', '.join(sorted(known))}")
    shape = tuple(facts["shape"])
    _check_arguments(config, known[config.flow])
    arguments = dict(config.flow_args)
    if facts["bits"] is not None:
        if not _takes_bits(known[config.flow]):
            raise ConfigError(
                f"{config.flow} is a flow of rows, {facts['name']} has images {shape}"
            )
        arguments["bits"] = facts["bits"]
    try:
        flow = known[config.flow](shape if len(shape) > 1 else shape[0], **arguments)
    except (TypeError, ValueError, ArithmeticError, MemoryError, RuntimeError) as error:
        raise ConfigError(  # the last three: more weights than memory
            f"{config.flow} cannot be built for {shape}: {' '.join(str(error).split())}"
        ) from None
    if flow.domain is not None and flow.preprocess is None:
        raise ConfigError(
            f"a run standardises its columns, which leaves no values between {flow.domain[0]:.4g} and "
            f"{flow.domain[1]:.4g}: {config.flow} must not have a bounded domain here"
        )
    return DataFlow(flow, facts["mean"], facts["std"])


def _check_arguments(config: TrainConfig, flow: type[Flow]) -> None:
    """Compare the names and types of ``flow_args`` with what the flow takes."""
    taken = _options(flow)
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    for name, value in config.flow_args.items():
        if name not in taken:
            raise ConfigError(
                f"{config.flow} takes no argument {name!r}; it takes {', '.join(taken)} "
                "(the options of a run: pyflowkern train --help)"
            )
        kind = type(taken[name])
        fits = isinstance(value, (int, float) if kind is float else kind)
        if kind in words and (isinstance(value, bool) != (kind is bool) or not fits):
            raise ConfigError(f"{name} of {config.flow} must be {words[kind]}, got {value!r}")


def with_defaults(config: TrainConfig) -> TrainConfig:
    """Return the config with the flow's default numbers, strings and flags written out: a default may change later."""
    if (flow := _known_flows().get(config.flow)) is None:
        return config  # building the flow will report it
    parameters = inspect.signature(flow).parameters.values()
    kept = {
        p.name: p.default
        for p in parameters
        if isinstance(p.default, (int, float, str, type(None))) and p.name not in NOT_OPTIONS
    }
    return replace(config, flow_args=kept | config.flow_args)


def with_earlier_defaults(config: TrainConfig) -> TrainConfig:
    """Return a stored run's config with the old defaults, for runs that did not write theirs out yet."""
    if config.flow != "NSF" or config.flow_args.keys() & {"bound", "circular"}:
        return config
    return replace(config, flow_args={**config.flow_args, "bound": 3.0})


def _known_flows() -> dict[str, Any]:
    return {
        n: c
        for n, c in vars(flows).items()
        if inspect.isclass(c) and issubclass(c, Flow) and c is not Flow
    }


def _takes_bits(flow: type[Flow]) -> bool:
    parameters = inspect.signature(flow).parameters
    return "bits" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _options(flow: type[Flow]) -> dict[str, Any]:
    """Return the options of a flow with their defaults; what it passes on belongs to its base, then to the solver."""
    taken: dict[str, Any] = {}
    sources: list[Callable[..., Any]] = [
        c for c in flow.__mro__ if issubclass(c, Flow) and c is not Flow
    ]
    for source in (*sources, ode.solve):
        parameters = inspect.signature(source).parameters.values()
        for p in parameters:
            if p.default is not p.empty and p.name not in NOT_OPTIONS:
                taken.setdefault(p.name, p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return taken


def data_facts(data: DataSet) -> dict[str, Any]:
    """Return what a checkpoint must know about its data to rebuild the flow and show samples."""
    return {
        "name": data.name,
        "shape": list(data.shape),
        "bits": data.bits,
        "levels": data.levels,
        "mean": data.mean,
        "std": data.std,
        "columns": data.columns,
        "fingerprint": data.fingerprint(),
    }


@torch.no_grad()
def score(model: DataFlow, rows: Tensor, *, seed: int = 0, batch_size: int = 128) -> Tensor:
    """Return each row's score: bits/dim for integer images, negative log-density in nats for vectors.

    Dequantisation noise comes from ``seed``, so two models are scored under the same noise.
    """
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        nll = -torch.cat([model.log_prob(part) for part in rows.split(batch_size)])
    model.train(was_training)
    return nll if model.mean is not None else nll / (rows[0].numel() * math.log(2))
