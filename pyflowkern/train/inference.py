"""Use a trained flow: samples to a file, scores of data."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyflowkern.data import Batch, Conditioned, DataError, Moments, read_parts
from pyflowkern.train.bridges import DataBridge, load_data, start_rows
from pyflowkern.train.checkpoint import Trained, load_trained
from pyflowkern.train.config import ConfigError
from pyflowkern.train.contexts import ContextOf, contexts_of, with_context
from pyflowkern.train.generators import forked_generators, seed_generators
from pyflowkern.train.model import evaluation
from pyflowkern.train.plots import save_grid
from pyflowkern.train.progress import progress
from pyflowkern.train.signals import signals_raise
from pyflowkern.train.threads import limited_threads
from pyflowkern.train.writers import rows_into

__all__ = ["BRIDGE_STEPS", "evaluate_checkpoint", "held_out_or_file", "save_samples"]


#: Values that are drawn or scored at a time; the flow needs some hundred times as many numbers meanwhile.
_DRAWN, _SCORED = 2**18, 2**16
#: Images and pairs of a bridge that are scored at a time.
_IMAGES = 128
#: Steps of a bridge's path.
BRIDGE_STEPS = 100
#: Bytes that a pixel takes until it is in a picture: the sample, and what is made of it.
_BYTES = 16


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
    bar: bool | None = None,
) -> None:
    """Draw ``n`` samples and write them as ``.png`` (images), ``.csv`` or ``.parquet`` (vectors) or ``.npy`` (either).

    They are written as they are drawn, so that memory is needed for some of them; only a picture is made of all.  The
    file stands under its name once it is whole.

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
    given: dict[str, Any] = {}
    if not bridge or context is not None or label is not None:
        given["context_of"] = contexts_of(trained, context, label)
    if guidance != 1:
        given["guidance"] = _guidance(trained, guidance)
    suffix, pixels = out.suffix.lower(), trained.facts["bits"] is not None
    suffixes = (".png", ".npy") if pixels else (".csv", ".npy", ".parquet")
    if suffix not in suffixes:
        known = " or ".join([", ".join(suffixes[:-1]), suffixes[-1]])
        raise ConfigError(f"{out}: these samples go to a {known} file")
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder, wants a file")
    drawn = (
        _ends(
            trained,
            start_rows(trained.config, n, seed, start=start, backward=backward),
            start,
            backward,
        )
        if bridge
        else _drawn(trained, n, temperature, **given)
    )
    with _drawing(trained, n, seed, bar) as advance:
        parts = _told(drawn, advance)
        if suffix == ".png":
            _check_memory(n, n * math.prod(trained.facts["shape"]) * _BYTES)
            columns = math.ceil(math.sqrt(n))
            save_grid(out, torch.cat([*parts]), trained.facts["levels"], columns=columns)
            return
        with rows_into(out, n, tuple(trained.facts["shape"]), trained.facts["columns"]) as write:
            for part in parts:
                write(part)


def _check_memory(n: int, wanted: int) -> None:
    """Refuse more samples than this machine could hold, before it tries to."""
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > present:
        raise ConfigError(
            f"{n} samples would need {wanted / 1e9:.3g} GB of memory, this machine has {present / 1e9:.3g} GB"
        )


@contextmanager
def _drawing(trained: Trained, n: int, seed: int, bar: bool | None) -> Iterator[Any]:
    """Run the block with the seed, the threads and the signals of drawing, and give it the bar's function."""
    shape = tuple(trained.facts["shape"])
    threads = trained.config.threads
    device = next(trained.model.parameters()).device
    with (
        forked_generators(device),
        limited_threads(trained.model, min(n, _part(shape)), shape, threads),
        signals_raise(),
        progress("sample", n, bar) as advance,
    ):
        seed_generators(seed, device)
        yield advance


def _part(shape: tuple[int, ...]) -> int:
    """Return how many samples are drawn at a time."""
    return max(1, _DRAWN // math.prod(shape))


def _told(parts: Iterable[Tensor], advance: Any) -> Iterator[Tensor]:
    """Yield the parts, and tell the bar of each that is done with."""
    for part in parts:
        yield part
        advance(len(part))


@torch.no_grad()
def _drawn(
    trained: Trained, n: int, temperature: float, context_of: ContextOf, **options: float
) -> Iterator[Tensor]:
    """Draw in parts, so that memory is needed for a part of the samples and of the flow's own numbers."""
    part = _part(tuple(trained.facts["shape"]))
    sample: Any = trained.model.sample
    for begin in range(0, n, part):
        end = min(begin + part, n)
        yield sample(end - begin, context_of(begin, end), temperature=temperature, **options)


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


def _ends(trained: Trained, rows: Tensor, start: str | None, backward: bool) -> Iterator[Tensor]:
    """Yield where paths end that begin at the rows, some at a time: a path has many steps."""
    model = trained.model
    assert isinstance(model, DataBridge)
    _check_kind(trained.facts, start or "the table", tuple(rows.shape[1:]), None)
    part = max(1, _DRAWN // (rows.shape[1] * BRIDGE_STEPS // 4))
    return (model.ends(some, steps=BRIDGE_STEPS, backward=backward) for some in rows.split(part))


@torch.no_grad()
def evaluate_checkpoint(
    checkpoint: Path, source: str | None = None, *, seed: int = 0, bar: bool | None = None
) -> dict[str, Any]:
    """Score the run's own held-out rows, or every row of other data, which is read as it is scored.

    Raises:
        ConfigError: one line, for a checkpoint that cannot be used, and data for a bridge.
        DataError: one line, for data that cannot be used.
    """
    trained = load_trained(checkpoint)
    shape, moments = tuple(trained.facts["shape"]), Moments()
    parts, total = held_out_or_file(trained, source)
    at_once = _IMAGES
    if trained.facts["bits"] is None and not isinstance(trained.model, DataBridge):
        at_once = max(_IMAGES, _SCORED // math.prod(shape))
    with (
        evaluation(trained.model, seed),
        limited_threads(trained.model, at_once, shape, trained.config.threads),
        progress("evaluate", total, bar) as advance,
    ):
        for rows in parts:
            for part in rows.split(at_once):
                moments.update(trained.model.scores(part))
                advance(len(part))
    return {
        "score": float(moments.mean),
        "standard_error": float(moments.std) / math.sqrt(moments.count),
        "unit": trained.unit,
        "rows": moments.count,
        "data": source or trained.facts["name"],
        "step": trained.step,
    }


def held_out_or_file(trained: Trained, source: str | None) -> tuple[Iterable[Batch], int | None]:
    """Return the held-out rows of the run's own data or of a named set, else every row of a file; and how many."""
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
        return [data.validation], len(data.validation)
    parts, total = read_parts(str(source), size=config.size, numbers=_SCORED)
    return (_of_kind(trained, str(source), *part) for part in parts), total


def _of_kind(trained: Trained, source: str, rows: Tensor, header: list[str]) -> Batch:
    """Return rows of a file with their contexts, having seen that they are what the flow was trained on."""
    taken: Batch = rows
    bits = 8 if rows.dim() == 4 else None
    if condition := trained.facts.get("condition"):
        taken = with_context(trained, source, rows, header)
        header = [name for name in header if name not in condition["columns"]]
    wanted = trained.facts["columns"]
    named = bool(header and wanted)
    if named and (missing := [name for name in wanted if name not in header]):
        known = ", ".join(header)
        raise DataError(
            f"{source}: has no column {missing[0]!r}, which the flow was trained on; its columns are {known}"
        )
    if named and (others := [name for name in header if name not in wanted]):
        raise DataError(
            f"{source}: has the column {others[0]!r}, which the flow was not trained on; leave it out"
        )
    _check_kind(trained.facts, source, tuple(taken.shape[1:]), bits)
    if header == wanted or not named:
        return taken
    order = [header.index(name) for name in wanted]
    if isinstance(taken, Conditioned):
        return replace(taken, rows=taken.rows[:, order])
    return taken[:, order]


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
