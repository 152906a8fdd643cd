"""Schrödinger bridges as models of a run: trained between two tables, sampled from the rows of one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyflowkern import transport
from pyflowkern.data import (
    Batch,
    Blocks,
    Columns,
    DataError,
    DataSet,
    load,
    load_pairs,
    open_blocks,
    parts_of,
    read,
    streamed_set,
)
from pyflowkern.train.config import ConfigError, TrainConfig
from pyflowkern.train.data_model import DataModel
from pyflowkern.train.progress import progress

__all__ = ["BRIDGE", "DataBridge", "load_data", "start_rows"]

#: The model that is trained between two tables, by its name.
BRIDGE = transport.SchrodingerBridge.__name__
#: Epsilon of the held-out score, for each standardised column.
EPSILON = 0.1
#: Bytes of float32 from which on a file is streamed: on every machine, as which rows are held out follows from it.
STREAMED = 2**30


class DataBridge(DataModel):
    """A bridge between rows in the units of the data; inside, columns are standardised, and so is sigma."""

    def __init__(
        self,
        bridge: transport.SchrodingerBridge,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> None:
        super().__init__(mean, std)
        self.flow = bridge

    @property
    def unit(self) -> str:
        """The divergence's."""
        return "squared distance"

    def scores(self, rows: Batch) -> Tensor:
        """Return the loss of pairs ``[N, 2, D]`` in training, else how far both ends are missed, ``[1]``.

        That is the Sinkhorn divergence between where paths end and where they should, on average over both directions.
        """
        x0, x1 = self.standardised(parts_of(rows)[0]).unbind(1)
        if self.training:
            return self.flow.loss(x0, x1)[None]
        ends = [
            self.flow.sample(x0, self.flow.steps),
            self.flow.sample(x1, self.flow.steps, backward=True),
        ]
        missed = [
            transport.sinkhorn_divergence(path[-1], wanted, epsilon=EPSILON * x0.shape[1])
            for path, wanted in zip(ends, (x1, x0), strict=True)
            if bool(path[-1].isfinite().all())
        ]
        if len(missed) < 2:
            return x0.new_full((1,), torch.nan)
        return torch.stack(missed).mean(0, keepdim=True)

    @torch.no_grad()
    def ends(self, rows: Tensor, *, steps: int, backward: bool) -> Tensor:
        """Return where paths from the rows ``[N, D]`` end."""
        path = self.flow.sample(self.standardised(rows), steps, backward=backward)
        return self.restored(path[-1])


def load_data(config: TrainConfig) -> DataSet:
    """Load what a run is trained on: one source, or two for a bridge.

    Raises:
        ConfigError: for a bridge without two sources, or another flow with two.
        DataError: one line, for data that cannot be used.
    """
    given = bool(config.data0), bool(config.data1)
    context = Columns.parse(config.context_columns, config.label_column)
    if config.flow != BRIDGE:
        if any(given):
            raise ConfigError(f"data0 and data1 are for {BRIDGE}; {config.flow} takes data")
        options: dict[str, Any] = {"size": config.size, "seed": config.seed}
        if not config.labels and (file := _streamed(config)) is not None:
            with progress("read", sum(file.counts)) as advance:
                return streamed_set(file, config.seed, context, told=advance)
        return load(config.data, context=context, labels=config.labels, **options)
    if context is not None or config.labels:
        raise ConfigError(f"{BRIDGE} takes no context and no labels")
    if config.stream == "always":
        raise ConfigError(f"{BRIDGE} reads its tables whole: stream must be auto or never")
    if not all(given):
        raise ConfigError(f"{BRIDGE} needs two tables, data0 and data1")
    if config.data != TrainConfig().data:
        raise ConfigError(f"{BRIDGE} takes data0 and data1, not data (got {config.data!r})")
    return load_pairs(config.data0, config.data1, seed=config.seed)


def _streamed(config: TrainConfig) -> Blocks | None:
    """Return the file whose rows stay there, of which some are in memory at a time; None if all are to be."""
    path = Path(config.data)
    if config.stream == "always":
        return open_blocks(path)
    kinds = (".npy", ".parquet")
    if config.stream == "never" or not path.is_file() or path.suffix.lower() not in kinds:
        return None
    file = open_blocks(path)
    return file if 4 * sum(file.counts) * math.prod(file.shape) >= STREAMED else None


def start_rows(
    config: TrainConfig, n: int, seed: int, *, start: str | None, backward: bool
) -> Tensor:
    """Return ``n`` rows for paths to begin at: of a file, or of the table at that end.

    They are in random order; rows come again only where more are wanted than there are.
    """
    source = start or (config.data1 if backward else config.data0)
    rows, _ = read(Path(source))
    if rows.dim() != 2:
        raise DataError(f"{source}: holds images; a bridge begins at rows of numbers")
    generator = torch.Generator().manual_seed(seed)
    whole = [torch.randperm(len(rows), generator=generator) for _ in range(-(-n // len(rows)))]
    return rows[torch.cat(whole)[:n]]
