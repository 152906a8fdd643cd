"""Use a trained flow: samples to a file, scores of data."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyflowkern.data import DataError, load, read
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
        write_atomic(out, lambda path: _write_array(path, samples))
    else:
        write_atomic(out, lambda path: _write_table(path, samples, trained.facts["columns"]))


def _write_array(path: Path, samples: Tensor) -> None:
    with path.open("wb") as file:  # given a name, numpy appends .npy to .NPY
        np.save(file, samples.numpy())


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
    """Return the held-out rows of the run's own data or of a named set, else every row of a file."""
    config, facts = trained.config, trained.facts
    if source in (None, config.data, "photos", "digits"):
        data = load(source or config.data, size=config.size, seed=config.seed)
        _check_kind(facts, data.name, data.shape, data.bits)
        if data.name == facts["name"] and data.fingerprint() != facts["fingerprint"]:
            raise DataError(
                f"{data.name}: has changed since training, so its held-out rows are not known any more; "
                "give a file of held-out rows with --data"
            )
        return data.validation
    rows, _ = read(str(source), size=config.size)
    _check_kind(facts, str(source), tuple(rows.shape[1:]), 8 if rows.dim() == 4 else None)
    return rows


def _check_kind(
    facts: dict[str, Any], name: str, shape: tuple[int, ...], bits: int | None
) -> None:
    """Compare data with what the flow was trained on."""
    if list(shape) != facts["shape"] or bits != facts["bits"]:
        wanted = _kind(tuple(facts["shape"]), facts["bits"])
        raise DataError(f"{name}: holds {_kind(shape, bits)}; the flow was trained on {wanted}")


def _kind(shape: tuple[int, ...], bits: int | None) -> str:
    if bits is None:
        return f"rows of {shape[0]} numbers"
    return f"{bits}-bit images of shape {shape}"
