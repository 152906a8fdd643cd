"""Checkpoints that are whole or absent, whenever the process dies."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pyflowkern.train.config import ConfigError, TrainConfig
from pyflowkern.train.model import DataFlow, build

__all__ = [
    "AtomicCheckpointIO",
    "KeepLastAndBest",
    "Trained",
    "load_checkpoint",
    "load_trained",
    "write_atomic",
]


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary neighbour of ``path``, flush it to the disk, then put it in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written so that ``kill -9`` leaves the old file or the new one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write the checkpoint whole, or leave what is there."""
        write_atomic(Path(path), lambda temporary: torch.save(checkpoint, temporary))


class KeepLastAndBest(Checkpoint):
    """Write ``last.ckpt`` after every evaluation and ``best.ckpt`` when the held-out score fell."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.best = float("inf")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook; a Checkpoint runs after every other callback."""
        score = float(trainer.callback_metrics["held_out"])
        if score < self.best:  # false for NaN
            self.best = score
            trainer.save_checkpoint(self.out / "best.ckpt")
        trainer.save_checkpoint(self.out / "last.ckpt")

    def state_dict(self) -> dict[str, Any]:
        """Return the best score so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score so far."""
        self.best = state_dict["best"]


@dataclass(frozen=True)
class Trained:
    """A trained flow with its averaged weights, the config of its run and the facts about its data."""

    model: DataFlow
    config: TrainConfig
    facts: dict[str, Any]
    unit: str
    step: int


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; ConfigError names the file when that fails."""
    if path.is_dir():
        path = path / "last.ckpt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["pyflowkern"]["config"]
    except Exception as error:  # a damaged zip or pickle raises almost anything
        reason = "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
        raise ConfigError(f"{path}: not a pyflowkern checkpoint ({reason})") from None
    return dict(checkpoint)


def load_trained(path: Path) -> Trained:
    """Rebuild the flow of a checkpoint file, or of the ``last.ckpt`` of a run's folder."""
    checkpoint = load_checkpoint(path)
    own = checkpoint["pyflowkern"]
    config = TrainConfig.create(own["config"])
    model = build(config, own["data"])
    prefix = "averaged.module."
    weights = checkpoint["state_dict"]
    model.load_state_dict(
        {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
    )
    return Trained(model.eval(), config, own["data"], own["unit"], own["progress"][0])
