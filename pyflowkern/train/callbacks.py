"""What happens after each evaluation: a row of metrics, a grid of samples, a look at the clock."""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from pyflowkern.data import step_seed
from pyflowkern.train.checkpoint import write_atomic
from pyflowkern.train.model import score
from pyflowkern.train.module import FlowModule, learning_rate
from pyflowkern.train.plots import image_grid, save_curve, save_grid

__all__ = ["FIELDS", "Bar", "History", "SampleGrid", "StopEarly"]

FIELDS = ("step", "train", "held_out", "lr", "skipped", "seconds")


class History(Callback):
    """Keep one row per evaluation, write them as ``metrics.csv`` and ``curve.png``, stop when time is up.

    The rows travel in the checkpoint, so a resumed run's files hold each step once.  Row 0 is the flow before
    training, after its ActNorm layers have seen one batch.
    """

    def __init__(self, out: Path, *, talk: bool) -> None:
        self.out, self.talk = out, talk
        self.rows: list[dict[str, float]] = []
        self._before = 0.0  # seconds of earlier processes
        self._start = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Initialise from one batch and score the untrained flow."""
        module = _flow_module(pl_module)
        if not self.rows:
            seed = module.config.seed
            rows = module.batches.batch(0).to(module.device)
            torch.manual_seed(step_seed(seed, 0))
            with torch.no_grad():
                train = float(module.scores(module.model, rows).mean())
            held_out = score(module.model, module.data.validation.to(module.device), seed=seed)
            self._append(module, train, float(held_out.mean()))
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a row."""
        module = _flow_module(pl_module)
        self._append(module, module.take_round_mean(), float(trainer.callback_metrics["held_out"]))
        limit = module.config.minutes * 60
        if limit and self.rows[-1]["seconds"] >= limit:
            trainer.should_stop = True

    def _append(self, module: FlowModule, train: float, held_out: float) -> None:
        seconds = self._before + time.monotonic() - self._start if self.rows else 0.0
        lr = learning_rate(module.config, max(0, module.step - 1))
        row = (module.step, train, held_out, lr, module.skipped, round(seconds, 2))
        self.rows.append(dict(zip(FIELDS, row, strict=True)))
        write_atomic(self.out / "metrics.csv", self._write_csv)
        save_curve(self.out / "curve.png", self.rows, module.unit)
        if self.talk:
            print(
                f"step {module.step:>6}/{module.config.steps}  train {train:.4f}  held out {held_out:.4f} {module.unit}"
                f"  {seconds:.0f} s" + (f"  skipped {module.skipped}" if module.skipped else ""),
                flush=True,
            )

    def _write_csv(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(self.rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows so far."""
        self.rows = list(state_dict["rows"])
        self._before = self.rows[-1]["seconds"] if self.rows else 0.0


class SampleGrid(Callback):
    """Draw the same 64 latents after each evaluation, as ``samples.png`` and in TensorBoard."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the grid."""
        module = _flow_module(pl_module)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(module.config.seed)
            images = module.evaluated.eval().sample(64).cpu()
        save_grid(self.out / "samples.png", images, module.data.levels)
        if isinstance(trainer.logger, TensorBoardLogger):
            grid = image_grid(images, module.data.levels)
            trainer.logger.experiment.add_image("samples", grid, module.step)


class StopEarly(EarlyStopping):
    """Stop when the held-out score has not fallen for ``patience`` evaluations, and say so."""

    def __init__(self, patience: int) -> None:
        super().__init__("held_out", patience=patience)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a resumed run that had stopped be over."""
        trainer.should_stop = trainer.should_stop or self.stopped_epoch > 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the reason, if this is what ended the run."""
        value = float(trainer.callback_metrics.get("held_out", 0.0))
        reason = f"has not fallen in {self.patience} evaluations"
        if not math.isfinite(value):
            reason = f"is {value}"
        elif not self.stopped_epoch:
            return
        print(f"stopped at step {_flow_module(pl_module).step}: the held-out score {reason}")


class Bar(TQDMProgressBar):
    """A bar over the steps up to the next evaluation, with the scores and their unit."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands at the end of the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        names = {"train": f"train {self.unit}", "held_out": f"held out {self.unit}"}
        shown: dict[str, int | str | float | dict[str, float]] = {
            "step": _flow_module(pl_module).step
        }
        shown.update((label, metrics[name]) for name, label in names.items() if name in metrics)
        return shown


def _flow_module(module: LightningModule) -> FlowModule:
    if not isinstance(module, FlowModule):
        raise TypeError(f"module must be a FlowModule, got {type(module).__name__}")
    return module
