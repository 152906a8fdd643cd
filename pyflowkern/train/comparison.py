"""Several flows trained on one split with one budget, and scored on the same held-out rows."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyflowkern.core.files import write_atomic
from pyflowkern.data import Batches, DataSet, parts_of
from pyflowkern.estimation import mean_with_error
from pyflowkern.train.bridges import BRIDGE, load_data
from pyflowkern.train.checkpoint import Trained, load_trained
from pyflowkern.train.config import ConfigError, TrainConfig, merged
from pyflowkern.train.model import build, score, with_defaults
from pyflowkern.train.module import TrainingDiverged
from pyflowkern.train.runner import check_folder, train
from pyflowkern.train.signals import TrainingInterrupted
from pyflowkern.train.threads import limited_threads

__all__ = ["compare", "configs_of", "table_of"]

_ARGUMENT = re.compile(r"\w+=")
#: Rows that are scored at a time, each part under noise of its own seed, the same for all flows.
_PART = 128
#: Seconds in which steps, and samples, are measured, and how many measurements are enough.
_SECONDS, _TIMES = 10.0, 20
#: Samples that are drawn to measure how many a second.
_SAMPLES = 256


def compare(
    configs: dict[str, TrainConfig],
    out: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Train flows on the same rows with the same budget, and score them on the same held-out rows.

    Each run lies in a folder of ``out`` under its name.  What is scored are the averaged weights of the last step: the
    best of all evaluations would have been chosen by the rows that it is scored on.  Writes ``comparison.json`` and
    ``comparison.csv``; by ``resume`` a run that is finished is not begun again, one that was ended goes on, and one
    that diverged is tried again, from its last checkpoint.

    Args:
        configs: the options of each run by its name, with the same data, split, steps and batch size.
        out: the folder.
        resume: go on with the comparison that the folder holds, of the same options.
        overwrite: replace it.

    Returns:
        A row for each flow, the best first: ``log_prob``, the mean log-density of held-out rows in nats, and its
        standard error; for images ``bits_per_dim``; ``difference`` to the best flow, row by row, and its standard
        error; ``parameters``, ``seconds_per_step`` and ``samples_per_second``.  A flow whose training diverged, or
        whose scores are not finite, stands last with a ``problem``.

    Raises:
        ConfigError: one line, for options or a folder that cannot be used.
        DataError: one line, for data that cannot be used.
        TrainingInterrupted: after a signal.
        OSError: naming the file that could not be written.

    Example:
        >>> from dataclasses import replace
        >>> from pyflowkern.train import TrainConfig, compare
        >>> shared = TrainConfig(data="table.csv", steps=500)
        >>> compare({n: replace(shared, flow=n) for n in ("NSF", "MAF")}, "out/table")  # doctest: +SKIP
    """
    out = Path(out)
    runs = {n: with_defaults(replace(c, out=str(out / n))) for n, c in configs.items()}
    _check(runs)
    check_folder(out)
    data = load_data(next(iter(runs.values())))
    for config in runs.values():  # before the first of them is trained
        build(config, data)
    plan = {name: config.to_dict() | {"out": ""} for name, config in runs.items()}
    _begin(out, plan, resume, overwrite)
    found = {name: _run(config, data, out, resume) for name, config in runs.items()}
    rows = _rows(found, math.prod(data.shape) if data.is_image else None)
    first = next(iter(runs.values()))
    facts = {
        "data": data.name,
        "held_out_rows": len(data.validation),
        "steps": first.steps,
        "batch_size": first.batch_size,
        "seed": first.seed,
        "flows": rows,
    }
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*dict.fromkeys(name for row in rows for name in row)])
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out / "comparison.csv", text.getvalue().encode())
    write_atomic(out / "comparison.json", (json.dumps(facts, indent=1) + "\n").encode())
    return rows


def configs_of(
    flows: list[str], file: Path | None, options: dict[str, Any], settings: list[str]
) -> dict[str, TrainConfig]:
    """Return the options of each run by its name, from texts such as ``NSF,transforms=3`` and what all share.

    Raises:
        ConfigError: one line, for a text or an option that cannot be used.
    """
    base = TrainConfig.read(file) if file else {}
    configs: dict[str, TrainConfig] = {}
    for text in flows:
        kind, *arguments = _parts(text)
        if wrong := [a for a in arguments if not _ARGUMENT.match(a)]:
            raise ConfigError(f"--flow {text}: wants NAME=VALUE behind a comma, got {wrong[0]!r}")
        name, count = kind, 1
        while name in configs:
            count += 1
            name = f"{kind}-{count}"
        given = [*settings, *(f"flow_args.{a}" for a in arguments)]
        configs[name] = TrainConfig.create(merged(base, options | {"flow": kind}, given))
    return configs


def _parts(text: str) -> list[str]:
    """Divide a text at its commas, but for those within lists and mappings."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _check(runs: dict[str, TrainConfig]) -> None:
    """Refuse what cannot be compared."""
    if len(runs) < 2:
        raise ConfigError(f"a comparison needs two flows at least, got {len(runs)}")
    first = next(iter(runs.values()))
    for config in runs.values():
        if config.flow == BRIDGE:
            raise ConfigError(f"{BRIDGE} has no likelihood, by which flows are compared")
        for name in ("data", "size", "seed", "steps", "batch_size", "context_columns", "labels"):
            if getattr(config, name) != getattr(first, name):
                raise ConfigError(f"{name} must be the same for all flows of a comparison")
        if config.devices * config.nodes > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "a comparison runs in one process, without devices, nodes or torchrun"
            )


def _begin(out: Path, plan: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Make the folder that of this comparison, or see that it is."""
    path = out / "plan.json"
    if path.exists() and resume:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ConfigError(f"{path}: is damaged; start again with --overwrite") from None
        if stored != json.loads(json.dumps(plan)):
            raise ConfigError(f"{out}: holds a comparison with other options; give those again")
        return
    if path.exists() and not overwrite:
        raise ConfigError(
            f"{out}: holds a comparison already; resume it, overwrite it or name another folder"
        )
    for name in plan:
        for file in ("result.json", "scores.npy"):
            (out / name / file).unlink(missing_ok=True)
    for file in ("comparison.json", "comparison.csv"):
        (out / file).unlink(missing_ok=True)
    if not overwrite and (taken := [name for name in plan if (out / name / "last.ckpt").exists()]):
        raise ConfigError(f"{out / taken[0]}: holds a run already; name another folder")
    write_atomic(path, (json.dumps(plan, indent=1) + "\n").encode())


def _run(
    config: TrainConfig, data: DataSet, out: Path, resume: bool
) -> tuple[dict[str, Any], Tensor | None]:
    """Train and score a flow, or read what an earlier process found; its facts and the log-density of each row."""
    folder = Path(config.out)
    path, scores = folder / "result.json", folder / "scores.npy"
    if resume and (done := _finished(path, scores)):
        return done
    scores.unlink(missing_ok=True)  # of a run that this one replaces
    print(f"{folder.name}:", flush=True)
    found = {"name": folder.name, "flow": config.flow, "flow_args": config.flow_args}
    log_prob = None
    try:
        train(config, data, resume=resume and folder.exists(), overwrite=True)
        trained = load_trained(folder)
        log_prob = _log_prob(trained, data)
        buffer = io.BytesIO()
        np.save(buffer, log_prob.numpy())
        write_atomic(scores, buffer.getvalue())
        found |= _measured(trained, config, data)
    except TrainingDiverged as error:
        found["problem"] = " ".join(str(error).split())
    except TrainingInterrupted as error:
        error.args = (f"{str(error).split(';')[0]}; go on with --resume and the same options",)
        raise
    write_atomic(path, json.dumps(found).encode())
    return found, log_prob


def _finished(path: Path, scores: Path) -> tuple[dict[str, Any], Tensor] | None:
    """Return what an earlier process found; None where it did not finish, diverged, or its files are damaged."""
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        if "parameters" not in found:
            return None  # it diverged: another try from its last checkpoint costs a few steps
        return found, torch.from_numpy(np.load(scores, allow_pickle=False))
    except (FileNotFoundError, ValueError, TypeError, EOFError):
        return None  # the checkpoint is still there: the run is scored again


def _log_prob(trained: Trained, data: DataSet) -> Tensor:
    """Return the log-density of each held-out row in nats, under the same noise for every flow."""
    factor = math.prod(data.shape) * math.log(2) if data.is_image else 1.0
    with limited_threads(trained.model, _PART, data.shape, trained.config.threads):
        parts = [
            score(trained.model, part, seed=trained.config.seed + i, batch_size=_PART)
            for i, part in enumerate(data.validation.split(_PART))
        ]
    return -torch.cat(parts).double() * factor


def _measured(trained: Trained, config: TrainConfig, data: DataSet) -> dict[str, Any]:
    """Return the number of weights and the medians of the time of a step and of samples."""
    model = trained.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-8)
    batches = Batches(data, config.batch_size, config.seed)
    contexts = parts_of(data.validation)[1]
    n = _SAMPLES if contexts is None else min(_SAMPLES, len(contexts))
    given = () if contexts is None else (contexts[:n],)

    def step(number: int) -> None:
        optimizer.zero_grad()
        model.objective(batches.batch(number))[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()

    def draw(number: int) -> None:
        model.sample(n, *given)  # type: ignore[operator]

    with (
        torch.random.fork_rng(devices=[]),
        limited_threads(model, config.batch_size, data.shape, config.threads),
    ):
        drawing = _median_seconds(draw)
        model.train()
        stepping = _median_seconds(step)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_per_step": stepping,
        "samples_per_second": n / drawing,
        "steps": trained.step,
    }


def _median_seconds(work: Any) -> float:
    """Return the median seconds of a call, after one that warms up."""
    work(0)
    times: list[float] = []
    end = time.monotonic() + _SECONDS
    while len(times) < _TIMES and (not times or time.monotonic() < end):
        start = time.perf_counter()
        work(1 + len(times))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _rows(
    found: dict[str, tuple[dict[str, Any], Tensor | None]], pixels: int | None
) -> list[dict[str, Any]]:
    """Return the facts of each flow with its scores, the best first and those without at the end."""
    scored = {n: s for n, (_, s) in found.items() if s is not None and bool(s.isfinite().all())}
    order = sorted(scored, key=lambda name: -float(scored[name].mean()))
    rows = []
    for name in order:
        mean, error = mean_with_error(scored[name])
        row: dict[str, Any] = {"log_prob": mean, "log_prob_error": error}
        if pixels is not None:
            bits = pixels * math.log(2)
            row |= {"bits_per_dim": -mean / bits, "bits_per_dim_error": error / bits}
        less, uncertain = mean_with_error(scored[name] - scored[order[0]])
        row |= {"difference": less, "difference_error": 0.0 if name == order[0] else uncertain}
        rows.append({"name": name} | row | found[name][0])
    for name, (facts, log_prob) in found.items():
        if name not in scored:
            bad = 0 if log_prob is None else int((~log_prob.isfinite()).sum())
            rows.append({"problem": f"{bad} held-out rows without a finite score"} | facts)
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return the rows of :func:`compare` as text, in columns."""
    images = any("bits_per_dim" in row for row in rows)
    head = ["flow", "held-out nats", *(["bits/dim"] if images else []), "to the best"]
    lines = [[*head, "parameters", "ms a step", "samples/s"]]
    problems = []
    for row in rows:
        if "log_prob" not in row:
            problems.append(f"{row['name']}: {row['problem']}")
            continue
        line = [row["name"], f"{row['log_prob']:.4f} +- {row['log_prob_error']:.4f}"]
        if images:
            line.append(f"{row['bits_per_dim']:.4f} +- {row['bits_per_dim_error']:.4f}")
        best = row is rows[0]
        line.append(
            "best" if best else f"{row['difference']:.4f} +- {row['difference_error']:.4f}"
        )
        line += [f"{row['parameters']}", f"{1e3 * row['seconds_per_step']:.2f}"]
        lines.append([*line, f"{row['samples_per_second']:.0f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)).rstrip() for x in lines]
    sign = "held-out nats are of the log-density: higher is better"
    return "\n".join([*text, *problems, *([sign] if len(lines) > 1 else [])])
