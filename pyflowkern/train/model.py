"""A flow built for a data set, and the scores of its rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyflowkern import flows, ode, transport
from pyflowkern.data import Batch, Condition, DataSet
from pyflowkern.flows import Flow
from pyflowkern.train.bridges import BRIDGE, DataBridge
from pyflowkern.train.config import ConfigError, TrainConfig
from pyflowkern.train.data_model import DataFlow, DataModel
from pyflowkern.train.generators import forked_generators, seed_generators

__all__ = [
    "BRIDGE",
    "DataFlow",
    "DataModel",
    "arguments_of",
    "build",
    "evaluation",
    "score",
    "with_defaults",
    "with_earlier_defaults",
]


#: Arguments of flows that a run does not offer: its data decides bits and contexts, and modules are no text.
NOT_OPTIONS = (
    "bits",
    "context_features",
    "conditioner",
    "base",
    "spline",
    "field",
    "params",
    "norm",
    "network",
    "times",
    "classes",
)


def build(config: TrainConfig, data: DataSet | dict[str, Any]) -> DataModel:
    """Build the configured flow for a data set, or for the facts about one that a checkpoint stores."""
    facts = data if isinstance(data, dict) else data_facts(data)
    known = _known_flows()
    if config.flow not in known:
        raise ConfigError(f"unknown flow {config.flow!r}; known are {', '.join(sorted(known))}")
    shape = tuple(facts["shape"])
    arguments = arguments_of(config, facts)
    condition = _condition_of(facts)
    try:
        flow = known[config.flow](**arguments)
    except (TypeError, ValueError, ArithmeticError, MemoryError, RuntimeError) as error:
        raise ConfigError(  # the last three: more weights than memory
            f"{config.flow} cannot be built for {shape}: {' '.join(str(error).split())}"
        ) from None
    if isinstance(flow, transport.SchrodingerBridge):
        return DataBridge(flow, facts["mean"], facts["std"])
    if flow.domain is not None and flow.preprocess is None:
        raise ConfigError(
            f"{config.flow} is asked for with values from {flow.domain[0]:.4g} to {flow.domain[1]:.4g}, but a run "
            "standardises its columns: leave out tails and circular, or train such a flow in Python"
        )
    return DataFlow(flow, facts["mean"], facts["std"], condition)


def arguments_of(config: TrainConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments, by name, that the flow of a run is made with, for the facts about its data.

    Raises:
        ConfigError: for an argument that the flow does not take, and data that it is not for.
    """
    flow, shape = _known_flows()[config.flow], tuple(facts["shape"])
    _check_arguments(config, flow)
    arguments = {"event_shape": shape if len(shape) > 1 else shape[0], **config.flow_args}
    if facts["bits"] is not None:
        if not _takes(flow, "bits"):
            raise ConfigError(
                f"{config.flow} is a flow of rows, {facts['name']} has images {shape}"
            )
        arguments["bits"] = facts["bits"]
    condition = _condition_of(facts)
    if condition is not None:
        arguments |= _context_arguments(config, flow, condition)
    return arguments


def _condition_of(facts: dict[str, Any]) -> Condition | None:
    stored = facts.get("condition")
    return Condition(**stored) if stored else None


def _context_arguments(
    config: TrainConfig, flow: type[Flow], condition: Condition
) -> dict[str, int]:
    """Return the arguments of a flow with such contexts: classes where it has some, else so many numbers."""
    if condition.classes and _takes(flow, "classes", passed_on=False):
        return {"classes": len(condition.classes)}
    if not _takes(flow, "context_features"):
        raise ConfigError(f"{config.flow} takes no context")
    return {"context_features": len(condition.classes or condition.columns)}


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
    found = {
        n: c
        for n, c in vars(flows).items()
        if inspect.isclass(c) and issubclass(c, Flow) and c is not Flow
    }
    return found | {BRIDGE: transport.SchrodingerBridge}


def _takes(flow: type[Flow], name: str, *, passed_on: bool = True) -> bool:
    """Whether a flow has an argument, also among those that it passes on."""
    parameters = inspect.signature(flow).parameters
    others = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return name in parameters or (passed_on and others)


def _options(flow: type[Flow]) -> dict[str, Any]:
    """Return the options of a flow with their defaults; what it passes on belongs to its base, then to the solver."""
    taken: dict[str, Any] = {}
    sources: list[Callable[..., Any]] = [
        c for c in flow.__mro__ if issubclass(c, Flow) and c is not Flow
    ] or [flow]
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
        "condition": data.condition and dict(vars(data.condition)),
        "fingerprint": data.fingerprint(),
    }


@torch.no_grad()
def score(model: DataModel, rows: Batch, *, seed: int = 0, batch_size: int = 128) -> Tensor:
    """Return the scores of a model in eval mode, those of parts of the rows one after another.

    Dequantisation noise comes from ``seed``, so two models are scored under the same noise.
    """
    with evaluation(model, seed):
        return torch.cat([model.scores(part) for part in rows.split(batch_size)])


@contextmanager
def evaluation(model: DataModel, seed: int) -> Iterator[None]:
    """Run the block in eval mode, with random numbers that follow from the seed."""
    was_training = model.training
    model.eval()
    try:
        with forked_generators(device := next(model.parameters()).device):
            seed_generators(seed, device)
            yield
    finally:
        model.train(was_training)
