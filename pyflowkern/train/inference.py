"""Use a trained flow: samples to a file, scores of data."""

from __future__ import annotations

import csv
import io
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyflowkern.data import Batch, DataError, read
from pyflowkern.train.bridges import DataBridge, load_data, start_rows
from pyflowkern.train.checkpoint import Trained, load_trained
from pyflowkern.train.config import ConfigError
from pyflowkern.train.contexts import contexts_of, with_context
from pyflowkern.train.files import write_atomic
from pyflowkern.train.model import score
from pyflowkern.train.plots import save_grid
from pyflowkern.train.threads import limited_threads

__all__ = ["evaluate_checkpoint", "save_samples"]


#: Values that are drawn at a time; the flow needs some hundred times as many numbers meanwhile.
_AT_ONCE = 2**20
#: Steps of a bridge's path.
BRIDGE_STEPS = 100
#: Bytes that a value takes until it is in a file: the sample, and what is made of it.
_BYTES = {".png": 16, ".npy": 8, ".csv": 64}


def save_samples(
    checkpoint: Path,
    out: Path,
    n: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    start: str | None = None,
    backward: bool = False,
    context: str | None = None,
    label: int | None = None,
    guidance: float = 1.0,
) -> None:
    """Draw ``n`` samples and write them as ``.png`` (images), ``.csv`` (vectors) or ``.npy`` (either).

    Samples of a bridge are the ends of paths that begin at rows of ``start``, by default of the table at that end;
    ``backward`` paths run from the second table to the first.

    Samples of a flow with contexts are those of ``context``: numbers in the units of the data, separated by commas, or
    a file with a row for each sample, from the first again where there are fewer.  Those of a flow with labels are of
    one ``label``, or of all in turn.  ``guidance`` is the weight of the condition, of ``FlowMatching``.

    Raises:
        ConfigError: one line, for a checkpoint, a file name, a number or a temperature that cannot be used.
        OSError: naming ``out`` if it cannot be written.
    """
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature must be a number from 0 on, got {temperature}")
    trained = load_trained(checkpoint)
    bridge = isinstance(trained.model, DataBridge)
    if bridge and temperature != 1:
        raise ConfigError(f"temperature must be 1 for a bridge, got {temperature}")
    if not bridge and (start is not None or backward):
        raise ConfigError(f"start and backward are for bridges, {checkpoint} is a flow")
    given = (
        {}
        if bridge and context is None and label is None
        else contexts_of(trained, n, context, label)
    )
    if guidance != 1:
        given["guidance"] = _guidance(trained, guidance)
    suffix = out.suffix.lower()
    suffixes = (".png", ".npy") if trained.facts["bits"] is not None else (".csv", ".npy")
    if suffix not in suffixes:
        raise ConfigError(f"{out}: these samples go to a {' or '.join(suffixes)} file")
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder, wants a file")
    _check_memory(n, n * math.prod(trained.facts["shape"]) * _BYTES[suffix])
    samples = (
        _ends(trained, n, seed, start, backward)
        if bridge
        else _draw(trained, n, temperature, seed, **given)
    )
    if suffix == ".png":
        save_grid(out, samples, trained.facts["levels"], columns=math.ceil(math.sqrt(n)))
    elif suffix == ".npy":
        write_atomic(out, _array(samples))
    else:
        write_atomic(out, _table(samples, trained.facts["columns"]).encode())


def _check_memory(n: int, wanted: int) -> None:
    """Refuse more samples than this machine could hold, before it tries to."""
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > present:
        raise ConfigError(
            f"{n} samples would need {wanted / 1e9:.3g} GB of memory, this machine has {present / 1e9:.3g} GB"
        )


@torch.no_grad()
def _draw(
    trained: Trained,
    n: int,
    temperature: float,
    seed: int,
    context: Tensor | None = None,
    **options: float,
) -> Tensor:
    """Draw in parts, so that memory is needed for the samples and for a part of the flow's own numbers."""
    shape = tuple(trained.facts["shape"])
    part = min(n, max(1, _AT_ONCE // math.prod(shape)))
    places = torch.arange(n).split(part)
    threads = trained.config.threads
    with torch.random.fork_rng(), limited_threads(trained.model, part, shape, threads):
        torch.manual_seed(seed)
        sample: Any = trained.model.sample
        return torch.cat(
            [
                sample(
                    len(i),
                    None if context is None else context[i],
                    temperature=temperature,
                    **options,
                )
                for i in places
            ]
        )


def _guidance(trained: Trained, weight: float) -> float:
    """Return the weight of the condition; raise ConfigError where the flow has no use for it."""
    guided = getattr(trained.model.flow, "guided", None)
    if guided is None:
        raise ConfigError(f"guidance is for FlowMatching, the run is one of {trained.config.flow}")
    try:
        guided(weight)
    except ValueError as error:
        raise ConfigError(str(error).replace("weight", "guidance")) from None
    return weight


def _ends(trained: Trained, n: int, seed: int, start: str | None, backward: bool) -> Tensor:
    model, config = trained.model, trained.config
    assert isinstance(model, DataBridge)
    rows = start_rows(config, n, seed, start=start, backward=backward)
    _check_kind(trained.facts, start or "the table", tuple(rows.shape[1:]), None)
    with torch.random.fork_rng(), limited_threads(model, n, tuple(rows.shape[1:]), config.threads):
        torch.manual_seed(seed)
        return model.ends(rows, steps=BRIDGE_STEPS, backward=backward)


def _array(samples: Tensor) -> memoryview:
    buffer = io.BytesIO()
    np.save(buffer, samples.numpy())
    return buffer.getbuffer()


def _table(samples: Tensor, columns: list[str]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    if columns:
        writer.writerow(columns)
    writer.writerows(samples.tolist())
    return text.getvalue()


def evaluate_checkpoint(
    checkpoint: Path, source: str | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """Score the run's own held-out rows, or every row of other data."""
    trained = load_trained(checkpoint)
    rows = _rows(trained, source)
    with limited_threads(
        trained.model, 128, tuple(trained.facts["shape"]), trained.config.threads
    ):
        scores = score(trained.model, rows, seed=seed).double()
    return {
        "score": float(scores.mean()),
        "standard_error": float(scores.std(correction=0)) / math.sqrt(len(scores)),
        "unit": trained.unit,
        "rows": len(scores),
        "data": source or trained.facts["name"],
        "step": trained.step,
    }


def _rows(trained: Trained, source: str | None) -> Batch:
    """Return the held-out rows of the run's own data or of a named set, else every row of a file."""
    config, facts = trained.config, trained.facts
    if isinstance(trained.model, DataBridge) and source is not None:
        raise ConfigError("a bridge is scored on its own held-out rows, without data")
    if source in (None, config.data, "photos", "digits"):
        data = load_data(replace(config, data=source) if source else config)
        _check_kind(facts, data.name, data.shape, data.bits)
        if data.name == facts["name"] and data.fingerprint() != facts["fingerprint"]:
            raise DataError(
                f"{data.name}: has changed since training, so its held-out rows are not known any more; "
                "give a file of held-out rows with --data"
            )
        return data.validation
    rows: Batch
    rows, header = read(str(source), size=config.size)
    bits = 8 if rows.dim() == 4 else None
    if facts.get("condition"):
        rows = with_context(trained, str(source), rows, header)
    _check_kind(facts, str(source), tuple(rows.shape[1:]), bits)
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
