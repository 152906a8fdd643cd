"""Train any flow on any data set, from a config to a folder with checkpoints, metrics and pictures."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from pyflowkern.data import DataSet, load
from pyflowkern.train.callbacks import Bar, History, SampleGrid, StopEarly
from pyflowkern.train.checkpoint import (
    AtomicCheckpointIO,
    KeepLastAndBest,
    load_checkpoint,
    write_atomic,
)
from pyflowkern.train.config import ConfigError, TrainConfig
from pyflowkern.train.model import build
from pyflowkern.train.module import FlowModule

__all__ = ["Run", "check_folder", "resume_config", "train"]


@dataclass(frozen=True)
class Run:
    """What a training run leaves behind."""

    module: FlowModule
    history: list[dict[str, float]]
    out: Path


def resume_config(out: Path) -> TrainConfig:
    """Return the config that a run's folder holds; the folder itself may have been moved."""
    if not (out / "config.yaml").exists():
        raise ConfigError(f"{out}: holds no run to resume (no config.yaml)")
    return replace(TrainConfig.create(TrainConfig.read(out / "config.yaml")), out=str(out))


def check_folder(out: Path) -> None:
    """Raise ConfigError if ``out`` cannot become a folder."""
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"{existing}: is a file, wants a folder")


def train(
    config: TrainConfig,
    data: DataSet | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Run:
    """Train and write ``last.ckpt``, ``best.ckpt``, ``metrics.csv``, ``curve.png`` and, for images, ``samples.png``.

    Nothing is written before the data and the flow have been found good.

    Args:
        config: The options of the run.
        data: The data; loaded from ``config.data`` when not given.
        resume: Go on from ``last.ckpt`` in ``config.out``, if one was written.
        overwrite: Allow ``config.out`` to hold another run already.

    Example:
        >>> train(TrainConfig(data="digits", steps=200, out="out/digits"))  # doctest: +SKIP
    """
    out = Path(config.out)
    last = out / "last.ckpt"
    check_folder(out)
    if last.exists() and not (resume or overwrite):
        raise ConfigError(
            f"{out}: holds a run already; resume it, overwrite it or name another folder"
        )
    data = data or load(config.data, size=config.size, seed=config.seed)
    checkpoint = last if resume and last.exists() else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module = FlowModule(config, data, build(config, data))
    if checkpoint:
        _check_same_data(checkpoint, module)
    elif last.exists():
        last.unlink()
    write_atomic(
        out / "config.yaml", lambda path: path.write_text(config.to_yaml(), encoding="utf-8")
    )
    return _fit(module, out, checkpoint)


def _check_same_data(checkpoint: Path, module: FlowModule) -> None:
    stored = load_checkpoint(checkpoint)["pyflowkern"]["data"]
    if stored["fingerprint"] != module.facts["fingerprint"]:
        raise ConfigError(
            f"{checkpoint}: was trained on other data than {module.data.name} holds now"
        )


def _fit(module: FlowModule, out: Path, checkpoint: Path | None) -> Run:
    config = module.config
    bar = sys.stderr.isatty()
    history = History(out, talk=not bar)
    callbacks: list[Callback] = [history, KeepLastAndBest(out)]
    if module.data.is_image:
        callbacks.append(SampleGrid(out))
    if config.patience:
        callbacks.append(StopEarly(config.patience))
    if bar:
        callbacks.append(Bar(module.unit))
    done: dict[str, Any] = (
        load_checkpoint(checkpoint)["pyflowkern"] if checkpoint else {"progress": [0]}
    )
    logger = TensorBoardLogger(out, name="tensorboard", version="", purge_step=done["progress"][0])
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = Trainer(
            max_epochs=-(
                -config.steps // config.every
            ),  # an "epoch" is the steps between evaluations
            reload_dataloaders_every_n_epochs=1,
            accelerator="auto",
            devices=1,
            precision=config.precision,  # type: ignore[arg-type]
            plugins=[AtomicCheckpointIO()],
            callbacks=callbacks,
            logger=logger,
            log_every_n_steps=min(10, config.every),
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_progress_bar=bar,
        )
        trainer.fit(module, ckpt_path=checkpoint)
    return Run(module, history.rows, out)
