"""The LightningModule: one deterministic training step, EMA weights beside the trained ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset

from pyflowkern.data import Batches, DataSet, step_seed
from pyflowkern.train.config import TrainConfig
from pyflowkern.train.model import DataFlow, data_facts

__all__ = ["FlowModule", "TrainingDiverged", "learning_rate"]


class TrainingDiverged(RuntimeError):
    """Too many consecutive steps had a loss or gradient that was not finite."""

    exit_code = 1


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine down to ``final_lr * lr``.

    Example:
        >>> config = TrainConfig(lr=1.0, warmup=10, steps=110, final_lr=0.0)
        >>> [round(learning_rate(config, s), 2) for s in (0, 9, 60, 110)]
        [0.1, 1.0, 0.5, 0.0]
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def _warm_ema(decay: float) -> Any:
    """EMA whose decay grows with the steps seen, so that a short run is not held at its start."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], seen: Tensor | int) -> None:
        n = float(seen)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return update


class _Round(IterableDataset[Tensor]):
    """The batches of some steps."""

    def __init__(self, batches: Batches, steps: range) -> None:
        self._batches, self._steps = batches, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._batches.batch, self._steps)


class FlowModule(LightningModule):
    """Train a flow by maximum likelihood.

    Everything random in a step follows from ``(seed, step)``: its rows, their mirroring and the dequantisation
    noise.  A checkpoint therefore needs no generator states, and a resumed run repeats the uninterrupted one
    bit for bit.
    """

    def __init__(self, config: TrainConfig, data: DataSet, model: DataFlow) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.data, self.model = config, data, model
        self.batches = Batches(data, config.batch_size, config.seed)
        self.averaged = AveragedModel(model, multi_avg_fn=_warm_ema(config.ema))
        self.step = 0  #: batches seen, skipped ones included
        self.skipped = 0
        self.bad_in_a_row = 0
        self._round: list[Tensor] = []
        self.facts = data_facts(data)
        self.unit = "bits/dim" if data.is_image else "nats"

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return the batches up to the next evaluation; the trainer asks anew after each."""
        steps = range(self.step, min(self.step + self.config.every, self.config.steps))
        return DataLoader(_Round(self.batches, steps), batch_size=None)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return the held-out rows."""
        return DataLoader(list(self.data.validation.split(128)), batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the trained weights."""
        decay = self.config.weight_decay
        return torch.optim.AdamW(self.model.parameters(), lr=self.config.lr, weight_decay=decay)

    def scores(self, model: DataFlow, rows: Tensor) -> Tensor:
        """Return each row's bits/dim for images, nats for vectors."""
        nll = -model.log_prob(rows)
        return nll / (rows[0].numel() * math.log(2)) if self.data.is_image else nll

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Take one step, or skip it if its loss or gradient is not finite."""
        torch.manual_seed(step_seed(self.config.seed, self.step))
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        optimizer.zero_grad()
        scores = self.scores(self.model, batch).mean()
        loss = scores if self.data.is_image else scores / batch[0].numel()
        self.manual_backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.step += 1
        if not bool(loss.isfinite() & norm.isfinite()):
            self._skip(optimizer)
            return
        self.bad_in_a_row = 0
        optimizer.step()
        self.averaged.update_parameters(self.model)
        self._round.append(scores.detach())
        self.log("train", scores.detach(), prog_bar=True)

    def take_round_mean(self) -> float:
        """Return the mean training score since the last call."""
        scores, self._round = self._round, []
        return float(torch.stack(scores).mean()) if scores else math.nan

    def _skip(self, optimizer: Any) -> None:
        optimizer.zero_grad()
        self.skipped += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= self.config.max_bad_steps:
            raise TrainingDiverged(
                f"stopped at step {self.step}: loss or gradient was not finite in {self.bad_in_a_row} steps in a row "
                "(a smaller lr or clip, a longer warmup or precision 32-true may help)"
            )

    @property
    def evaluated(self) -> DataFlow:
        """The weights that are evaluated and sampled with: the moving average once there is one."""
        started = int(self.averaged.n_averaged) > 0
        chosen: Any = self.averaged.module if started else self.model
        return chosen  # type: ignore[no-any-return]

    def on_validation_epoch_start(self) -> None:
        """Give every evaluation the same dequantisation noise."""
        torch.manual_seed(self.config.seed)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Score held-out rows with the averaged weights."""
        scores = self.scores(self.evaluated, batch)
        self.log("held_out", scores.mean(), prog_bar=True, batch_size=len(batch))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the flow and where the run stands."""
        checkpoint["pyflowkern"] = {
            "config": self.config.to_dict(),
            "data": self.facts,
            "unit": self.unit,
            "progress": [self.step, self.skipped, self.bad_in_a_row],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the checkpoint stands."""
        self.step, self.skipped, self.bad_in_a_row = checkpoint["pyflowkern"]["progress"]
