"""Use a trained flow: samples to a file, scores of data."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyflowkern.data import DataError, load
from pyflowkern.train.checkpoint import Trained, load_trained, write_atomic
from pyflowkern.train.config import ConfigError
from pyflowkern.train.model import score
from pyflowkern.train.plots import save_grid

__all__ = ["evaluate_checkpoint", "save_samples"]


def save_samples(
    checkpoint: Path, out: Path, n: int, *, temperature: float = 1.0, seed: int = 0
) -> None:
    """Draw ``n`` samples and write them as ``.png`` (images), ``.csv`` (vectors) or ``.npy`` (either)."""
    trained = load_trained(checkpoint)
    suffixes = (".png", ".npy") if trained.facts["bits"] is not None else (".csv", ".npy")
    if out.suffix.lower() not in suffixes:
        raise ConfigError(f"{out}: these samples go to a {' or '.join(suffixes)} file")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        samples = trained.model.sample(n, temperature=temperature)
    if out.suffix.lower() == ".png":
        save_grid(out, samples, trained.facts["levels"], columns=math.ceil(math.sqrt(n)))
    elif out.suffix.lower() == ".npy":
        write_atomic(out, lambda path: np.save(path, samples.numpy()))
    else:
        write_atomic(out, lambda path: _write_table(path, samples, trained.facts["columns"]))


def _write_table(path: Path, samples: Tensor, columns: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if columns:
            writer.writerow(columns)
        writer.writerows(samples.tolist())


def evaluate_checkpoint(
    checkpoint: Path, source: str | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """Score the run's own held-out rows, or every row of other data."""
    trained = load_trained(checkpoint)
    rows = _rows(trained, source)
    scores = score(trained.model, rows, seed=seed).double()
    return {
        "score": float(scores.mean()),
        "standard_error": float(scores.std(correction=0)) / math.sqrt(len(scores)),
        "unit": trained.unit,
        "rows": len(scores),
        "data": source or trained.facts["name"],
        "step": trained.step,
    }


def _rows(trained: Trained, source: str | None) -> Tensor:
    config, facts = trained.config, trained.facts
    data = load(source or config.data, size=config.size, seed=config.seed)
    if list(data.shape) != facts["shape"] or data.bits != facts["bits"]:
        wanted = (
            f"{'images' if facts['bits'] is not None else 'rows'} of shape {tuple(facts['shape'])}"
        )
        raise DataError(f"{data.name}: the flow was trained on {wanted}, these are {data.shape}")
    if source in (None, config.data, "photos", "digits"):
        return data.validation
    return torch.cat([data.train[torch.arange(len(data.train))], data.validation])
