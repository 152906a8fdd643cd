"""Checkpoints: written whole, checked byte by byte and field by field before anything uses them."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from pyflowkern.core.files import write_atomic
from pyflowkern.data import Condition
from pyflowkern.train.config import ConfigError, TrainConfig
from pyflowkern.train.data_model import DataModel
from pyflowkern.train.model import build, with_earlier_defaults

if TYPE_CHECKING:
    from pyflowkern.train.module import FlowModule

__all__ = ["CheckpointIO", "Trained", "check_resumable", "load_checkpoint", "load_trained"]

_LACKING = object()
#: The fields that a checkpoint must have, by the path to them, and their types.
_FIELDS: dict[str, tuple[type, ...]] = {
    "state_dict": (dict,),
    "optimizer_states": (list,),
    "lr_schedulers": (list,),
    "callbacks": (dict,),
    "pytorch-lightning_version": (str,),
    "pyflowkern.config": (dict,),
    "pyflowkern.unit": (str,),
    "pyflowkern.progress": (list,),
    "pyflowkern.data.name": (str,),
    "pyflowkern.data.shape": (list,),
    "pyflowkern.data.bits": (int, type(None)),
    "pyflowkern.data.levels": (int,),
    "pyflowkern.data.mean": (Tensor, type(None)),
    "pyflowkern.data.std": (Tensor, type(None)),
    "pyflowkern.data.columns": (list,),
    "pyflowkern.data.fingerprint": (int,),
}


class CheckpointIO(TorchCheckpointIO):
    """How Lightning writes and reads checkpoints here: ``kill -9`` leaves the old file or the new one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write the checkpoint whole, or leave what is there."""
        buffer = io.BytesIO()  # torch.save into a file reports a full disk without its reason
        torch.save(checkpoint, buffer)
        write_atomic(Path(path), buffer.getbuffer())

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read and check a checkpoint, always as plain tensors and numbers."""
        return load_checkpoint(Path(path))


@dataclass(frozen=True)
class Trained:
    """A trained flow with its averaged weights, the config of its run and the facts about its data."""

    model: DataModel
    config: TrainConfig
    facts: dict[str, Any]
    unit: str
    step: int


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or the ``last.ckpt`` of a run's folder.

    A checkpoint is a zip archive that holds a checksum (CRC-32) of each tensor; all are compared.

    Raises:
        ConfigError: naming the file, when it is missing, damaged or no checkpoint of this package.
    """
    path = _file(path)
    try:
        if path.exists() and not path.is_file():  # opening a named pipe would wait for ever
            raise ConfigError(f"{path}: not a regular file")
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ConfigError(f"{path}: damaged, the checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except Exception as error:  # a damaged zip or pickle raises almost anything
        reason = "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
        raise ConfigError(f"{path}: not a pyflowkern checkpoint ({reason})") from None
    if problem := _problem_of_fields(checkpoint):
        raise ConfigError(f"{path}: not a pyflowkern checkpoint ({problem})")
    checkpoint.pop("loops", None)  # Lightning's counters, which earlier versions stored
    return dict(checkpoint)


def _file(path: Path) -> Path:
    return path / "last.ckpt" if path.is_dir() else path


def _problem_of_fields(checkpoint: Any) -> str | None:
    """Return which field is missing or of a wrong kind."""
    for name, kinds in _FIELDS.items():
        value = checkpoint
        for key in name.split("."):
            value = value.get(key, _LACKING) if isinstance(value, dict) else _LACKING
        if value is _LACKING:
            return f"without {name}"
        if not isinstance(value, kinds):
            return f"{name} is of type {type(value).__name__}"
    own = checkpoint["pyflowkern"]
    if len(own["progress"]) != 3 or not all(_is_count(n) for n in own["progress"]):
        return "progress must be three counts"
    shape = own["data"]["shape"]
    if len(shape) not in (1, 3) or not all(_is_count(n) and n > 0 for n in shape):
        return f"shape {shape!r} is neither that of rows nor of images"
    moments = (own["data"]["mean"], own["data"]["std"])
    if own["data"]["bits"] is None and not all(
        isinstance(m, Tensor) and list(m.shape) == shape and bool(m.isfinite().all())
        for m in moments
    ):
        return "rows without a finite mean and standard deviation"
    return _problem_of_condition(own["data"].get("condition"))


def _problem_of_condition(condition: Any) -> str | None:
    """Return what is wrong with the contexts of a checkpoint; earlier versions stored none."""
    if condition is None:
        return None
    try:
        facts = Condition(**condition)
        columns, classes, moments = len(facts.columns), facts.classes, (facts.mean, facts.std)
        if classes:
            fits = columns == 1 and all(isinstance(c, int) for c in classes)
        else:
            fits = all(
                isinstance(m, Tensor) and m.shape == (columns,) and bool(m.isfinite().all())
                for m in moments
            )
    except (TypeError, AttributeError):
        fits = False
    return None if fits else "its contexts are neither classes nor standardised columns"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def load_trained(path: Path) -> Trained:
    """Rebuild the flow of a checkpoint file, or of the ``last.ckpt`` of a run's folder.

    Raises:
        ConfigError: naming the file, when it is damaged, another flow's, or its weights are not finite.
    """
    path = _file(path)
    checkpoint = load_checkpoint(path)
    own = checkpoint["pyflowkern"]
    try:
        config = with_earlier_defaults(TrainConfig.stored(own["config"]))
        model = build(config, own["data"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    prefix = "averaged.module."
    weights = {
        name[len(prefix) :]: value
        for name, value in checkpoint["state_dict"].items()
        if isinstance(name, str) and name.startswith(prefix)
    }
    _load_weights(path, model, weights)
    return Trained(model.eval(), config, own["data"], own["unit"], own["progress"][0])


def check_resumable(path: Path, module: FlowModule) -> int:
    """Return the step at which a checkpoint stands, having seen that ``module`` can go on from it.

    Raises:
        ConfigError: naming the file, for other data, another flow or an optimizer state that does not fit.
    """
    checkpoint = load_checkpoint(path)
    own = checkpoint["pyflowkern"]
    if own["data"]["fingerprint"] != module.facts["fingerprint"]:
        raise ConfigError(f"{path}: was trained on other data than {module.data.name} holds now")
    _load_weights(path, module, checkpoint["state_dict"])
    try:
        optimizer = module.configure_optimizers()
        optimizer.load_state_dict(checkpoint["optimizer_states"][0])
        for parameter, state in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].shape != parameter.shape:
                    raise ValueError(f"{name} of shape {list(state[name].shape)}")
        for row in checkpoint["callbacks"]["History"]["rows"]:
            float(row["step"]), float(row["held_out"]), float(row["seconds"])
        float(checkpoint["callbacks"]["KeepLastAndBest"]["best"])
    except Exception as error:  # whatever a foreign state lacks or has too much
        raise ConfigError(
            f"{path}: cannot be resumed, its state of the optimizer or the metrics does not fit "
            f"({_one_line(error)})"
        ) from None
    return int(own["progress"][0])


def _load_weights(path: Path, module: nn.Module, weights: dict[str, Any]) -> None:
    try:
        module.load_state_dict(weights)
    except Exception as error:  # hooks and copies of foreign values raise almost anything
        raise ConfigError(f"{path}: its weights do not fit ({_one_line(error)})") from None
    for name, parameter in module.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ConfigError(f"{path}: its weights are not finite (first {name})")


def _one_line(error: Exception, longest: int = 200) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[:longest]} ..."
