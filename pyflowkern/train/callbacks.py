"""What happens during a run: metrics, checkpoints, a grid of samples, and the reasons to stop."""

from __future__ import annotations

import csv
import io
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from pyflowkern.core.files import write_atomic
from pyflowkern.train.generators import forked_generators
from pyflowkern.train.module import FlowModule, learning_rate
from pyflowkern.train.pictures import why_not_drawn
from pyflowkern.train.plots import curve_picture, image_grid, save_grid
from pyflowkern.train.signals import StopSignals, TrainingInterrupted

__all__ = ["FIELDS", "Bar", "EventLog", "History", "KeepLastAndBest", "SampleGrid", "StopEarly"]

FIELDS = ("step", "train", "held_out", "lr", "skipped", "seconds")
_LOG_EVERY = 10  #: steps between training scores in TensorBoard


class History(Callback):
    """Keep one row per evaluation, write them as ``metrics.csv`` and ``curve.png``, stop when time is up.

    The rows travel in the checkpoint, so a resumed run's files hold each step once.  Row 0 is the flow before
    training, after its ActNorm layers have seen one batch.

    All processes of a run have the same rows, with the seconds of the first one, which alone writes and prints them.
    """

    def __init__(self, out: Path, *, talk: bool) -> None:
        self.out, self.talk = out, talk
        self.rows: list[dict[str, float]] = []
        self._before = 0.0  # seconds of earlier processes
        self._start = time.monotonic()
        self._next_curve = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Initialise from one batch and score the untrained flow."""
        module = _flow_module(pl_module)
        if self.talk and not module.rank and module.unit == "nats":
            print("nats are of the negative log-density: lower is better", flush=True)
        if not self.rows:
            self._append(trainer, module, module.first_score(), module.held_out(module.model))
        self._start = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Give every tenth training score to TensorBoard, all of them where evaluations are closer."""
        module = _flow_module(pl_module)
        latest = module.latest_score
        if latest is not None and module.step % min(_LOG_EVERY, module.config.every) == 0:
            _log(trainer, "train", float(latest), module.step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a row."""
        module = _flow_module(pl_module)
        latest = float(trainer.callback_metrics["held_out"])
        self._append(trainer, module, module.take_round_mean(), latest)
        _log(trainer, "held_out", latest, module.step)
        limit = module.config.minutes * 60
        if limit and self.rows[-1]["seconds"] >= limit:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the whole curve."""
        self._draw_curve(_flow_module(pl_module))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Draw what was reached, unless it is the disk that fails."""
        if self.rows and not isinstance(exception, OSError):
            self._draw_curve(_flow_module(pl_module))

    def _draw_curve(self, module: FlowModule) -> None:
        """Draw the curve, then wait 20 times as long as that took: in small runs drawing is most of the cost.

        A curve that cannot be drawn is a line on stderr, once.
        """
        if module.rank or self._next_curve == math.inf:
            return
        start = time.monotonic()
        try:
            picture = curve_picture(self.rows, module.unit)
        except Exception as error:  # a run is worth more than its picture
            self._next_curve = math.inf
            print(why_not_drawn(error, self.out), file=sys.stderr, flush=True)
            return
        write_atomic(self.out / "curve.png", picture)
        end = time.monotonic()
        self._next_curve = end + 20 * (end - start)

    def _append(self, trainer: Trainer, module: FlowModule, train: float, held_out: float) -> None:
        seconds = self._before + time.monotonic() - self._start if self.rows else 0.0
        seconds = trainer.strategy.broadcast(seconds)  # they may end the run, which all must do
        lr = learning_rate(module.config, max(0, module.step - 1))
        row = (module.step, train, held_out, lr, module.skipped, round(seconds, 2))
        self.rows.append(dict(zip(FIELDS, row, strict=True)))
        if module.rank:
            return
        write_atomic(self.out / "metrics.csv", self._table().encode())
        if time.monotonic() >= self._next_curve:
            self._draw_curve(module)
        if self.talk:
            print(
                f"step {module.step:>6}/{module.config.steps}  train {train:.4f}  held out {held_out:.4f} {module.unit}"
                f"  {seconds:.0f} s" + (f"  skipped {module.skipped}" if module.skipped else ""),
                flush=True,
            )

    def _table(self) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, FIELDS)
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows so far."""
        self.rows = list(state_dict["rows"])
        self._before = self.rows[-1]["seconds"] if self.rows else 0.0


class KeepLastAndBest(Checkpoint):
    """Write ``last.ckpt`` after every evaluation and ``best.ckpt`` when the held-out score fell.

    After a signal to stop, write ``last.ckpt`` and end the run: after the step that it came in, or after the
    evaluation if that is due.  Lightning runs a Checkpoint after every other callback.
    """

    def __init__(self, out: Path, signals: StopSignals) -> None:
        self.out, self.signals = out, signals
        self.best = float("inf")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over, from Lightning too, which ends with exit code 0 and without a checkpoint."""
        self.signals.install()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop between two evaluations if a signal came."""
        module = _flow_module(pl_module)
        evaluated_next = module.step % module.config.every == 0
        if self.signals.wanted and not evaluated_next and module.step < module.config.steps:
            trainer.save_checkpoint(self.out / "last.ckpt")
            self._stop(module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is due, then stop if a signal came."""
        score = float(trainer.callback_metrics["held_out"])
        if score < self.best:  # false for NaN
            self.best = score
            trainer.save_checkpoint(self.out / "best.ckpt")
        trainer.save_checkpoint(self.out / "last.ckpt")
        self._stop(_flow_module(pl_module))

    def _stop(self, module: FlowModule) -> None:
        if self.signals.wanted and module.step < module.config.steps:
            raise TrainingInterrupted(self.signals.wanted, module.step, str(self.out))

    def state_dict(self) -> dict[str, Any]:
        """Return the best score so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score so far."""
        self.best = state_dict["best"]


class SampleGrid(Callback):
    """Draw the same 64 latents after each evaluation, as ``samples.png`` and in TensorBoard."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the grid."""
        module = _flow_module(pl_module)
        if module.rank:
            return
        with forked_generators(module.device), torch.no_grad():
            torch.manual_seed(module.config.seed)
            images = module.evaluated.eval().sample(64).cpu()  # type: ignore[operator]
        save_grid(self.out / "samples.png", images, module.data.levels)
        if isinstance(trainer.logger, TensorBoardLogger):
            grid = image_grid(images, module.data.levels)
            trainer.logger.experiment.add_image("samples", grid, module.step)


class StopEarly(Callback):
    """Stop when the held-out score has not fallen for ``patience`` evaluations, and say so.

    The rows of the history decide, so that a resumed run that had stopped is over at once.
    """

    def __init__(self, history: History, patience: int) -> None:
        self.history, self.patience = history, patience

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the evaluations of earlier processes."""
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the newest evaluation; the history is in front of this callback."""
        trainer.should_stop = trainer.should_stop or self._reason() is not None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the reason, if this is what ended the run."""
        if trainer.is_global_zero and (reason := self._reason()):
            step = _flow_module(pl_module).step
            print(f"stopped at step {step}: the held-out score {reason}")

    def _reason(self) -> str | None:
        scores = [
            row["held_out"] for row in self.history.rows[1:]
        ]  # the first row is before training
        if not scores:
            return None
        if not math.isfinite(scores[-1]):
            return f"is {scores[-1]}"
        if len(scores) - 1 - scores.index(min(scores)) >= self.patience:
            return f"has not fallen in {self.patience} evaluations"
        return None


class Bar(TQDMProgressBar):
    """A bar over the steps up to the next evaluation, with the scores and their unit."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands at the end of the bar."""
        module = _flow_module(pl_module)
        shown: dict[str, int | str | float | dict[str, float]] = {"step": module.step}
        if module.latest_score is not None:
            shown[f"train {self.unit}"] = float(module.latest_score)
        if "held_out" in trainer.callback_metrics:
            shown[f"held out {self.unit}"] = float(trainer.callback_metrics["held_out"])
        return shown


class EventLog(TensorBoardLogger):
    """TensorBoard's files, written by the callbacks above alone, which know the step of the whole run.

    Lightning counts the steps of this process, and its ``log_metrics`` hides what a full disk says.
    """

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Leave out what Lightning would write."""

    def add(self, name: str, value: float, step: int) -> None:
        """Write a number."""
        self.experiment.add_scalar(name, value, step)


def _log(trainer: Trainer, name: str, value: float, step: int) -> None:
    if isinstance(trainer.logger, EventLog):
        trainer.logger.add(name, value, step)


def _flow_module(module: LightningModule) -> FlowModule:
    if not isinstance(module, FlowModule):
        raise TypeError(f"module must be a FlowModule, got {type(module).__name__}")
    return module
