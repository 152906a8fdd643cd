"""The gallery: runs the examples in full, keeps their pictures and numbers, and writes docs/gallery.md from them.

python -m bench gallery                          # the page again, from what is kept
python -m bench gallery two_modes sphere         # these scripts again, then the page
"""

from __future__ import annotations

import importlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench._gallery_entries import ENTRIES, INTRODUCTION, Entry

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs/gallery"
NUMBERS = KEPT / "numbers.json"
RESULTS = ROOT / "bench/results/cpu-amd-epyc"
#: A picture of the page is smaller than this.
MOST_BYTES = 150_000


def flatten(found: Any, name: str = "") -> dict[str, float]:
    """Return the numbers of a script as one level: names are joined, members of a sequence are counted."""
    if isinstance(found, Mapping):
        parts = found.items()
    elif isinstance(found, Sequence):
        parts = enumerate(found)
    else:
        return {name or "result": float(f"{float(found):.4g}")}
    numbers: dict[str, float] = {}
    for key, part in parts:
        numbers |= flatten(part, f"{name}: {key}" if name else str(key))
    return numbers


def keep_picture(path: Path, kept: Path) -> None:
    """Copy a picture with as many colours as fit into :data:`MOST_BYTES`, 256 at most."""
    with Image.open(path) as full:
        picture = full.convert("RGB")
    if picture.width > 1200:
        picture = picture.resize(
            (1200, round(picture.height * 1200 / picture.width)), Image.Resampling.LANCZOS
        )
    for colours in (256, 128, 64, 32):
        picture.quantize(colours, dither=Image.Dither.NONE).save(kept, optimize=True)
        if kept.stat().st_size < MOST_BYTES:
            return
    raise ValueError(f"{kept} has {kept.stat().st_size} bytes with 32 colours")


def run(entry: Entry) -> None:
    """Run a script in full on one thread, and keep its picture and its numbers."""
    sys.path.insert(0, str(ROOT / "examples"))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        script = importlib.import_module(entry.script)
        begin = time.process_time()
        found = script.main([*shlex.split(entry.given), "--out", folder])
        minutes = (time.process_time() - begin) / 60
        (picture,) = Path(folder).glob("*.png")
        KEPT.mkdir(exist_ok=True)
        keep_picture(picture, KEPT / f"{entry.script}.png")
    kept = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    kept[entry.script] = {
        "command": entry.command,
        "seed": 0,
        "minutes": float(f"{minutes:.2g}"),
        "numbers": flatten(found),
    }
    NUMBERS.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")


def cell(name: str, row: str, column: str) -> str:
    """Return a cell of a committed table: ``row`` is how its line begins."""
    path = ROOT / name if "/" in name else RESULTS / name
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    head = [part.strip() for part in lines[0].split("|")]
    (line,) = (line for line in lines if line.startswith(f"| {row} |"))
    return line.split("|")[head.index(column)].strip()


def numbers_of(entry: Entry, kept: Mapping[str, Any]) -> str:
    """Return the list of numbers of an entry."""
    shown = []
    for label, source in entry.shows.items():
        if isinstance(source, tuple):
            value = cell(*source)
        else:
            key, form = source.split("|")
            value = format(kept[entry.script]["numbers"][key], form)
        shown.append(f"{label.strip()} **{value}**")
    return "; ".join(shown) + "."


def page() -> str:
    """Return the text of docs/gallery.md."""
    kept = json.loads(NUMBERS.read_text())
    parts = [INTRODUCTION]
    for entry in ENTRIES:
        own = entry.script in kept
        folder = "gallery" if own else "../bench/results/cpu-amd-epyc"
        picture = f"![{entry.title}]({folder}/{entry.script}.png)\n\n"
        seconds = 60 * kept[entry.script]["minutes"] if own else 0
        time_taken = f", {seconds:.0f} CPU seconds" if seconds >= 1 else ""
        parts.append(
            f"## {entry.title}\n\n{picture}{entry.text}\n\n"
            f"{numbers_of(entry, kept)}\n\n"
            f"[{entry.script}.py](../examples/{entry.script}.py): `{entry.command}`{time_taken}\n"
        )
    return "\n".join(parts)


def write(names: Sequence[str]) -> None:
    """Run the named scripts, and write the page.

    Raises:
        ValueError: for a script that the page does not have, or whose results are kept in bench/results.
    """
    entries = {entry.script: entry for entry in ENTRIES}
    for name in names:
        if name not in entries or (RESULTS / f"{name}.png").exists():
            raise ValueError(f"no such script whose picture is kept in docs/gallery: {name!r}")
        run(entries[name])
    (ROOT / "docs/gallery.md").write_text(page())
