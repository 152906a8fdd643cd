"""The LightningModule: one deterministic training step, EMA weights beside the trained ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from pyflowkern.data import Batch, Batches, DataSet, step_seed
from pyflowkern.train.config import TrainConfig
from pyflowkern.train.data_model import DataModel
from pyflowkern.train.model import data_facts

__all__ = ["FlowModule", "MovingAverage", "TrainingDiverged", "learning_rate", "seed_generators"]

#: The tensors of a module and of its copy, a name in both, and whether it is a weight (else a buffer).
_Slot = tuple[dict[str, Tensor], dict[str, Tensor], str, bool]


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


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed what a step draws from: ``torch.manual_seed``, which visits every kind of device, costs more than a step."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


class MovingAverage(nn.Module):
    """An exponential moving average of a module's weights, and a copy of its buffers.

    After step ``n`` the average is ``d * average + (1 - d) * weights`` with ``d = min(decay, (1 + n) / (10 + n))``:
    the decay grows with the steps seen, so that a short run is not held at its start.  The state is that of
    ``torch.optim.swa_utils.AveragedModel``, whose update walks through all modules and takes as long as a small
    flow's whole step.
    """

    n_averaged: Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = deepcopy(model)
        self.decay = decay
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long))
        self._slots = [*self._matching(model, "_parameters"), *self._matching(model, "_buffers")]

    def _matching(self, model: nn.Module, kind: str) -> Iterator[_Slot]:
        """Yield where each tensor of both modules stands; the tensors themselves may be replaced by others."""
        for mine, theirs in zip(self.module.modules(), model.modules(), strict=True):
            for name, tensor in getattr(mine, kind).items():
                if tensor is not None:
                    yield getattr(mine, kind), getattr(theirs, kind), name, kind == "_parameters"

    @torch.no_grad()
    def update(self) -> None:
        """Take one more step's weights into the average."""
        averaged, current = [], []
        seen = int(self.n_averaged)
        for mine, theirs, name, is_weight in self._slots:
            if is_weight and seen:
                averaged.append(mine[name])
                current.append(theirs[name])
            else:
                mine[name].copy_(theirs[name])
        if averaged:
            torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + seen) / (10 + seen)))
        self.n_averaged.add_(1)


class _Round(IterableDataset[Batch]):
    """The batches of some steps."""

    def __init__(self, batches: Batches, steps: range) -> None:
        self._batches, self._steps = batches, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._batches.batch, self._steps)


class FlowModule(LightningModule):
    """Train a flow by maximum likelihood.

    Everything random in a step follows from ``(seed, step)``: its rows, their mirroring and the dequantisation
    noise.  A checkpoint therefore needs no generator states, and a resumed run repeats the uninterrupted one
    bit for bit.
    """

    def __init__(self, config: TrainConfig, data: DataSet, model: DataModel) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.data, self.model = config, data, model
        self.batches = Batches(data, config.batch_size, config.seed)
        self.averaged = MovingAverage(model, config.ema)
        self.step = 0  #: batches seen, skipped ones included
        self.skipped = 0
        self.bad_in_a_row = 0
        self._round: list[Tensor] = []
        self.facts = data_facts(data)
        self.unit = model.curve_unit

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the batches up to the next evaluation; the trainer asks anew after each."""
        every = self.config.every
        steps = range(self.step, min((self.step // every + 1) * every, self.config.steps))
        return DataLoader(_Round(self.batches, steps), batch_size=None)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the held-out rows."""
        return DataLoader(list(self.data.validation.split(128)), batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the trained weights, as one call for all of them."""
        decay = self.config.weight_decay
        return torch.optim.AdamW(
            self.model.parameters(), lr=self.config.lr, weight_decay=decay, fused=True
        )

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Take one step, or skip it if its loss or gradient is not finite."""
        seed_generators(step_seed(self.config.seed, self.step), self.device)
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        optimizer.zero_grad()
        loss, shown = self.model.objective(batch)
        self.manual_backward(loss)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip, foreach=True)
        self.step += 1
        if not bool(loss.isfinite() & norm.isfinite()):
            self._skip(optimizer)
            return
        self.bad_in_a_row = 0
        optimizer.step()
        self.averaged.update()
        self._round.append(shown.detach())

    @property
    def latest_score(self) -> Tensor | None:
        """The score of the latest batch since the last evaluation."""
        return self._round[-1] if self._round else None

    def take_round_mean(self) -> float:
        """Return the mean training score since the last call."""
        scores, self._round = self._round, []
        return float(torch.stack([s.cpu() for s in scores]).mean()) if scores else math.nan

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
    def evaluated(self) -> DataModel:
        """The weights that are evaluated and sampled with: the moving average once there is one."""
        started = int(self.averaged.n_averaged) > 0
        chosen: Any = self.averaged.module if started else self.model
        return chosen  # type: ignore[no-any-return]

    def on_validation_epoch_start(self) -> None:
        """Give every evaluation the same dequantisation noise."""
        seed_generators(self.config.seed, self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score held-out rows with the averaged weights."""
        _, shown = self.evaluated.objective(batch)
        self.log("held_out", shown, prog_bar=True, batch_size=len(batch))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the flow and where the run stands; Lightning's own counters are not needed."""
        checkpoint.pop("loops", None)
        checkpoint["pyflowkern"] = {
            "config": self.config.to_dict(),
            "data": self.facts,
            "unit": self.model.unit,
            "progress": [self.step, self.skipped, self.bad_in_a_row],
            "scores": [float(score) for score in self._round],  # since the last evaluation
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the checkpoint stands."""
        own = checkpoint["pyflowkern"]
        self.step, self.skipped, self.bad_in_a_row = own["progress"]
        self._round = [torch.tensor(score) for score in own.get("scores", [])]
