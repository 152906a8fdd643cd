"""The pictures of a run, when it ends and whenever they are wanted again: held-out data beside samples, densities."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyflowkern.core.files import write_atomic
from pyflowkern.data import Batch, Conditioned, parts_of
from pyflowkern.train.bridges import DataBridge
from pyflowkern.train.checkpoint import load_trained
from pyflowkern.train.config import ConfigError
from pyflowkern.train.data_model import DataFlow, DataModel
from pyflowkern.train.inference import BRIDGE_STEPS, held_out_or_file
from pyflowkern.train.model import evaluation
from pyflowkern.train.plots import (
    MOST_POINTS,
    curve_picture,
    save_beside,
    save_density,
    save_pairs,
)
from pyflowkern.train.signals import signals_raise
from pyflowkern.train.threads import limited_threads

if TYPE_CHECKING:
    from pyflowkern.train.module import FlowModule

__all__ = ["PICTURES", "draw_at_end", "plot", "why_not_drawn"]

#: What a run may have, beside its curve.
PICTURES = ("pairs.png", "density.png", "beside.png")
#: Images of each kind that lie beside each other.
_IMAGES = 64


def plot(
    run: Path | str,
    out: Path | str | None = None,
    *,
    data: str | None = None,
    n: int = MOST_POINTS,
    seed: int | None = None,
) -> dict[str, str]:
    """Draw the pictures of a trained run again.

    Of rows these are ``pairs.png``, a pair plot of held-out rows beside samples, and for two columns without a context
    ``density.png``, the log-density with the held-out rows; of images ``beside.png``, held-out images beside
    samples.  Samples of a flow with contexts are those of the contexts of the held-out rows.  Of a bridge, rows of both
    tables stand beside the ends of paths from the first.  ``curve.png`` is drawn from ``metrics.csv``.

    Args:
        run: the folder of a run (its ``last.ckpt`` is used), or one ``.ckpt`` file in it.
        out: the folder of the pictures, by default that of the run.
        data: a file of rows in place of the run's own held-out rows, as ``pyflowkern evaluate`` takes it.
        n: how many samples, and rows at most; 2000 at most.
        seed: of the samples and of the choice of rows; by default that of the run.

    Returns:
        For each picture, by its path, what is on it.

    Raises:
        ConfigError: one line, for a folder that holds no run or no checkpoint yet, or a checkpoint that is damaged.
        DataError: one line, for data that cannot be used.
        ModuleNotFoundError: without matplotlib.
        OSError: naming the file that could not be written.

    Example:
        >>> from pyflowkern.train import plot
        >>> plot("out/table")  # doctest: +SKIP
        {'out/table/pairs.png': '200 held-out rows, 2000 samples'}
    """
    if not 1 <= n <= MOST_POINTS:
        raise ConfigError(f"number must be from 1 to {MOST_POINTS}, got {n}")
    checkpoint = _checkpoint_of(Path(run))
    trained = load_trained(checkpoint)
    folder = checkpoint.parent if out is None else Path(out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file, wants a folder")
    rows = _history(checkpoint.with_name("metrics.csv"))
    parts, _ = held_out_or_file(trained, data)
    seed = trained.config.seed if seed is None else seed
    shape, threads = tuple(trained.facts["shape"]), trained.config.threads
    with limited_threads(trained.model, n, shape, threads), signals_raise():
        drawn = _draw(trained.model, parts, trained.facts, folder, seed, n, data)
    if rows:
        write_atomic(folder / "curve.png", curve_picture(rows, trained.model.curve_unit))
        drawn["curve.png"] = f"scores up to step {rows[-1]['step']:.0f}"
    if trained.step < trained.config.steps:
        done = f"after {trained.step} of {trained.config.steps} steps"
        drawn = {name: f"{what}, {done}" for name, what in drawn.items()}
    return {str(folder / name): what for name, what in drawn.items()}


def draw_at_end(module: FlowModule, out: Path) -> None:
    """Draw the pictures of a run that has ended; what goes wrong is a line on stderr, for the run itself is complete.

    Of several processes the first one draws.  Without matplotlib the curve has said so already.
    """
    if module.rank:
        return
    try:
        _draw(
            module.evaluated,
            [module.data.validation],
            module.facts,
            out,
            module.config.seed,
            MOST_POINTS,
        )
    except Exception as error:
        if not _is_without_matplotlib(error):
            print(why_not_drawn(error, out), file=sys.stderr, flush=True)


def why_not_drawn(error: Exception, out: Path) -> str:
    """Return a line that says why there is no picture, and how to get one."""
    again = f"pyflowkern plot {out}"
    if _is_without_matplotlib(error):
        return f"no curve and no plots without matplotlib: pip install matplotlib, then {again}"
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{out}: its plots were not drawn ({reason}); {again} tries again"


def _is_without_matplotlib(error: Exception) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name == "matplotlib"


def _checkpoint_of(run: Path) -> Path:
    """Return the checkpoint of a run; raise ConfigError that says what is there in its place."""
    if not run.is_dir():
        if not run.exists():
            raise ConfigError(f"{run}: no such run")
        return run
    if (run / "last.ckpt").exists():
        return run / "last.ckpt"
    if (run / "config.yaml").exists():
        raise ConfigError(
            f"{run}: its run ended before its first checkpoint; go on with: pyflowkern train --resume {run}"
        )
    raise ConfigError(f"{run}: holds no run (no last.ckpt)")


def _history(path: Path) -> list[dict[str, float]]:
    """Return the rows of a run's metrics, none where there is no such file."""
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        if not all({"step", "train", "held_out"} <= row.keys() for row in rows):
            raise ValueError
    except (ValueError, TypeError):
        raise ConfigError(f"{path}: is damaged, so that there is no curve to draw") from None
    return rows


def _draw(
    model: DataModel,
    parts: Iterable[Batch],
    facts: Mapping[str, Any],
    out: Path,
    seed: int,
    n: int,
    source: str | None = None,
) -> dict[str, str]:
    """Draw what there is to draw of a model beside its data; return what is on each picture."""
    pixels, kind = facts["bits"] is not None, "rows" if source else "held-out rows"
    held_out = _some(parts, min(n, _IMAGES) if pixels else n, seed)
    name = " to ".join(Path(part).name for part in (source or facts["name"]).split(" to "))
    with evaluation(model, seed), torch.no_grad():
        if pixels:
            assert isinstance(model, DataFlow)
            return _draw_images(model, held_out, facts["levels"], out)
        rows = parts_of(held_out)[0]
        sets = _of_bridge(model, rows, n) if isinstance(model, DataBridge) else {kind: rows}
        if isinstance(model, DataFlow):
            sets["samples"] = _samples(model, held_out, n)
        note = save_pairs(out / "pairs.png", sets, facts["columns"], name)
        counts = ", ".join(f"{len(some)} {what}" for what, some in sets.items())
        drawn = {"pairs.png": f"{counts}, {note}" if note else counts}
        if isinstance(model, DataFlow) and rows.shape[1] == 2 and isinstance(held_out, Tensor):
            device = next(model.parameters()).device
            title = f"{name}: density of the flow, and {kind}"
            log_prob: Any = model.log_prob
            save_density(
                out / "density.png",
                lambda x: log_prob(x.to(device)),
                rows,
                facts["columns"],
                title,
            )
            drawn["density.png"] = f"log-density, {len(rows)} {kind}"
    return drawn


def _draw_images(model: DataFlow, held_out: Batch, levels: int, out: Path) -> dict[str, str]:
    images, labels = parts_of(held_out)
    samples = _samples(model, held_out, len(images))
    sets = {
        "held out": images,
        "samples, of the same labels" if labels is not None else "samples": samples,
    }
    save_beside(out / "beside.png", sets, levels)
    return {"beside.png": f"{len(images)} held-out images, {len(samples)} samples"}


def _samples(model: DataFlow, held_out: Batch, n: int) -> Tensor:
    """Draw samples, of the contexts of the held-out rows where there are some, from the first again at their end."""
    context = parts_of(held_out)[1]
    if context is not None:
        index = torch.arange(n) % len(context)
        context = context[index].to(next(model.parameters()).device)
    return model.sample(n, context).cpu()


def _of_bridge(model: DataBridge, pairs: Tensor, n: int) -> dict[str, Tensor]:
    """Return rows of both tables, and the ends of ``n`` paths from those of the first."""
    start, end = pairs.unbind(1)
    begin = start[torch.arange(n) % len(start)].to(next(model.parameters()).device)
    moved = model.ends(begin, steps=BRIDGE_STEPS, backward=False).cpu()
    return {"start": start, "end": end, "transported": moved}


def _some(parts: Iterable[Batch], n: int, seed: int) -> Batch:
    """Return ``n`` of all rows at random, or all: those with the smallest of random keys."""
    generator = torch.Generator().manual_seed(seed)
    kept: Batch | None = None
    keys = torch.empty(0, dtype=torch.float64)
    for part in parts:
        new = torch.rand(len(part), generator=generator, dtype=torch.float64)
        keys, kept = torch.cat([keys, new]), part if kept is None else _joined(kept, part)
        if len(keys) > n:
            keys, index = keys.topk(n, largest=False)
            kept = kept[index]
    if kept is None:
        raise ConfigError("there are no rows to draw")
    return kept


def _joined(first: Batch, second: Batch) -> Batch:
    if isinstance(first, Conditioned) and isinstance(second, Conditioned):
        contexts = torch.cat([first.context, second.context])
        return Conditioned(torch.cat([first.rows, second.rows]), contexts)
    return torch.cat([parts_of(first)[0], parts_of(second)[0]])
