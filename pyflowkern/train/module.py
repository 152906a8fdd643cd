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
from pyflowkern.train.generators import forked_generators, seed_generators
from pyflowkern.train.model import data_facts
from pyflowkern.train.ranks import (
    check_alike,
    check_shares,
    check_strategy,
    start_together,
    sum_of_all,
)
from pyflowkern.train.signals import StopSignals

__all__ = ["FlowModule", "MovingAverage", "TrainingDiverged", "learning_rate"]

#: The tensors of a module and of its copy, a name in both, and whether it is a weight (else a buffer).
_Slot = tuple[dict[str, Tensor], dict[str, Tensor], str, bool]
#: Held-out rows that are scored at a time.
_PART = 128


class TrainingDiverged(RuntimeError):
    """Too many consecutive steps had a loss or gradient that was not finite.

    The last good state is in ``last.ckpt``.

    Example:
        >>> from pyflowkern.train import TrainingDiverged
        >>> TrainingDiverged("stopped at step 8").exit_code  # of a command that ends so
        1
    """

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
        self.module = deepcopy(model).requires_grad_(False)
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


class _Places(IterableDataset[int]):
    """Which parts of the held-out rows a process scores; no sampler of Lightning's divides them again."""

    def __init__(self, places: range) -> None:
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)


class FlowModule(LightningModule):
    """Train a flow by maximum likelihood.

    Everything random in a step follows from ``(seed, step, rank)``: its rows, their mirroring and the dequantisation
    noise.  A checkpoint therefore needs no generator states, and a resumed run repeats the uninterrupted one
    bit for bit.

    Several processes share each batch: rows and their mirroring are those of one process.  What a flow draws in a step
    (noise, dropout, probes of continuous flows) is drawn anew for each row, and so by each process for itself.

    :func:`train` makes one, and a trainer with the callbacks that write checkpoints and curves.

    Args:
        config: the options of the run.
        data: its rows.
        model: the flow in the units of the data.

    Example:
        >>> from pyflowkern.train import TrainConfig, train
        >>> run = train(TrainConfig(data="digits", steps=200, out="out/digits"))  # doctest: +SKIP
        >>> run.module.evaluated.sample(5).shape  # by the averaged weights  # doctest: +SKIP
        torch.Size([5, 1, 8, 8])
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
        self.signals = StopSignals()
        self.rank, self.ranks = 0, 1
        self._round: list[Tensor] = []
        self._joined: list[Any] = []
        self._held_out = torch.zeros(0)
        self.facts = data_facts(data)
        self.unit = model.curve_unit

    def setup(self, stage: str) -> None:
        """Take this process's share of the batches, once the trainer knows how many processes there are."""
        self.rank, self.ranks = self.global_rank, self.trainer.world_size
        seed, size = self.config.seed, self.config.batch_size
        self.batches = Batches(self.data, size, seed, rank=self.rank, ranks=self.ranks)
        check_shares(self.batches.rows, self.ranks)
        if self.ranks > 1:
            check_strategy(self.trainer.strategy)
            self._joined += start_together(self.model)

    def teardown(self, stage: str) -> None:
        """Let the flow be that of this process alone, whose next call waits for no other."""
        while self._joined:
            self._joined.pop().process_group = None

    def on_fit_start(self) -> None:
        """Compare what the processes have read."""
        if self.ranks > 1:
            facts = {"step": self.step, "checksum of the data": self.facts["fingerprint"]}
            own = ("out", "threads", "data", "data0", "data1")  # each machine may have its own
            options = {k: v for k, v in self.config.to_dict().items() if k not in own}
            check_alike(options | facts)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the batches up to the next evaluation; the trainer asks anew after each."""
        every = self.config.every
        steps = range(self.step, min((self.step // every + 1) * every, self.config.steps))
        return DataLoader(_Round(self.batches, steps), batch_size=None)

    def val_dataloader(self) -> DataLoader[int]:
        """Return the numbers of the parts of the held-out rows that this process scores."""
        return DataLoader(_Places(self._places()), batch_size=None)

    def _places(self) -> range:
        """Return this process's parts, one at least: a part beyond the last one has no rows."""
        parts = -(-len(self.data.validation) // _PART)
        return range(self.rank, max(parts, self.ranks), self.ranks)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the trained weights, as one call for all of them."""
        decay = self.config.weight_decay
        return torch.optim.AdamW(
            self.model.parameters(), lr=self.config.lr, weight_decay=decay, fused=True
        )

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Take one step, or skip it if its loss or gradient is not finite."""
        seed_generators(step_seed(self.config.seed, self.step, self.rank), self.device)
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        optimizer.zero_grad()
        loss, shown = self.model.objective(batch)
        part = len(batch) / self.batches.rows
        # gradients are averaged over processes, whose shares may differ by a row
        self.manual_backward(loss if self.ranks == 1 else loss * (self.ranks * part))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip, foreach=True)
        self.step += 1
        finite = loss.isfinite() & norm.isfinite()
        if self.ranks > 1:
            finite, shown = self._of_all(finite, part * shown.detach())
        if not bool(finite):
            self._skip(optimizer)
            return
        self.bad_in_a_row = 0
        optimizer.step()
        self.averaged.update()
        self._round.append(shown.detach())

    def _of_all(self, finite: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether all processes may take the step, and their score; hear of signals to any of them."""
        own = torch.tensor([float(not finite), float(shown), *self.signals.counts()])
        bad, score, *signals = sum_of_all(own.double().to(self.device), self.ranks).tolist()
        self.signals.hear(signals)
        return torch.tensor(not bad), torch.tensor(score)

    @torch.no_grad()
    def first_score(self) -> float:
        """Return the score of the first batch of all processes, from which layers start."""
        rows = self.batches.batch(0).to(self.device)
        seed_generators(step_seed(self.config.seed, 0, self.rank), self.device)
        part = len(rows) / self.batches.rows
        return float(sum_of_all(part * self.model.objective(rows)[1].double(), self.ranks))

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
        """Begin with no part scored."""
        parts = -(-len(self.data.validation) // _PART)
        self._held_out = torch.zeros(parts, dtype=torch.float64, device=self.device)

    def validation_step(self, place: int, batch_idx: int) -> None:
        """Score a part of the held-out rows with the averaged weights."""
        self._score(self.evaluated, place)

    def on_validation_epoch_end(self) -> None:
        """Take the mean over the rows of all processes."""
        self.log("held_out", torch.tensor(self._mean_held_out()), prog_bar=True)

    @torch.no_grad()
    def held_out(self, model: DataModel) -> float:
        """Return what the curve shows of the held-out rows: the mean score, or loss, of a model in eval mode."""
        was_training = model.training
        model.eval()
        self.on_validation_epoch_start()
        with forked_generators(self.device):
            for place in self._places():
                self._score(model, place)
        model.train(was_training)
        return self._mean_held_out()

    def _score(self, model: DataModel, place: int) -> None:
        """Note the sum over a part of the held-out rows.

        Every evaluation has the same dequantisation noise, whichever process scores the part.
        """
        if place < len(self._held_out):
            rows = self.data.validation[place * _PART : (place + 1) * _PART].to(self.device)
            seed = self.config.seed  # of the first part, as in evaluations of a checkpoint
            seed_generators(step_seed(seed, place) if place else seed, self.device)
            self._held_out[place] = len(rows) * model.objective(rows)[1].double()

    def _mean_held_out(self) -> float:
        """Return the mean over all parts: the same bits for any number of processes."""
        sums = sum_of_all(self._held_out, self.ranks)  # each is zero in all processes but one
        return float(sums.sum()) / len(self.data.validation)

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
