"""Weights of a run as a safetensors file, for programs that should not read checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from pyflowkern.flows import Flow, save_weights
from pyflowkern.nn import Sequential, Standardize
from pyflowkern.train.bridges import DataBridge
from pyflowkern.train.checkpoint import Trained, load_trained
from pyflowkern.train.config import ConfigError
from pyflowkern.train.model import arguments_of

__all__ = ["export_weights"]


def export_weights(checkpoint: Path, out: Path) -> str:
    """Write the averaged weights of a run's flow to a safetensors file, and return the units of its densities.

    :func:`pyflowkern.flows.load_flow` makes the flow again.  It models the data in their own units, ``"data"``: the
    standardization of columns becomes a layer in front.  A flow with a loss of its own, such as FlowMatching, takes no
    such layer: its units are ``"standardized"``.

    Args:
        checkpoint: a run's folder, of which the last checkpoint is taken, or a checkpoint.
        out: the file, ``.safetensors``.

    Raises:
        ConfigError: one line, for a checkpoint or a file name that cannot be used, a bridge, and a run whose contexts
            are standardized, which no layer of a flow does.
        OSError: naming ``out`` if it cannot be written.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: weights go to a .safetensors file")
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder, wants a file")
    trained = load_trained(checkpoint)
    if isinstance(trained.model, DataBridge):
        raise ConfigError(f"{checkpoint}: is a bridge, and weights are exported of flows")
    condition = trained.facts.get("condition")
    if condition is not None and not condition["classes"]:
        raise ConfigError(
            f"{checkpoint}: has context columns, which the run standardizes and an exported flow could not"
        )
    flow: Flow = trained.model.flow  # type: ignore[assignment]
    units = _in_units_of_data(trained, flow)
    save_weights(flow, out, arguments=arguments_of(trained.config, trained.facts))
    return units


@torch.no_grad()
def _in_units_of_data(trained: Trained, flow: Flow) -> str:
    """Put the standardization of a run in front of its flow, and return the units that the flow then has."""
    mean, std = trained.model.mean, trained.model.std
    if mean is None or std is None:
        return "data"
    if type(flow.bijection) is not Sequential or hasattr(flow, "loss"):
        return "standardized"
    layer = flow.standardize().bijection[0]  # type: ignore[index]
    assert isinstance(layer, Standardize)
    layer.log_scale.copy_(-std.log())
    layer.bias.copy_(-mean)
    return "data"
