"""Results as one page: tables and pictures in a file that needs nothing else."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

__all__ = ["page", "write_page"]

#: The facts of a measurement that stand under the name of its family.
FACTS = ("device", "threads", "torch", "simd", "commit", "date")
#: The columns of a table of times: title, key of a record, and what follows the number.
COLUMNS = (
    ("median", "p50", ""),
    ("20%", "p20", ""),
    ("80%", "p80", ""),
    ("time / floor", "ratio_to_floor", ""),
    ("faster than eager", "speedup_vs_eager", "x"),
    ("than compile", "speedup_vs_compile", "x"),
    ("time / ours", "time_vs_ours", "x"),
)
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
td.name, th.name { text-align: left; }
tr.ours { font-weight: 600; }
td.noisy { color: #c60; }
img { max-width: 100%; background: white; }
nav a { margin-right: .8rem; white-space: nowrap; }
small { opacity: .7; }
"""


def write_page(out: Path, files: Iterable[Path]) -> None:
    """Write the page of these results: files of records (``<family>.json``) and tables (``.md``)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(files))


def page(files: Iterable[Path]) -> str:
    """Return the page of these results.  Pictures that lie beside a file with its name are part of it."""
    chosen = sorted(set(files))
    # records of times are also written as CSV; other results have a table of their own beside them
    times = [f for f in chosen if f.suffix == ".json" and f.with_suffix(".csv").is_file()]
    own = [f for f in chosen if f.suffix == ".md"]
    sections = [(f.stem, _times(f)) for f in times] + [(f.stem, _own(f)) for f in own]
    links = "\n".join(f'<a href="#{escape(n)}">{escape(n)}</a>' for n, _ in sections)
    body = "\n".join(
        f'<section id="{escape(name)}"><h2>{escape(name)}</h2>\n{text}</section>'
        for name, text in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>pyflowkern: benchmarks</title><style>{STYLE}</style></head><body>\n"
        "<h1>pyflowkern: benchmarks</h1>\n<p>Medians, and the 20th and 80th percentiles, of rounds in which all "
        "take turns. The floor is the time of the least memory traffic, or arithmetic, that the work needs.</p>\n"
        f"<nav>{links}</nav>\n{body}\n</body></html>\n"
    )


def _times(path: Path) -> str:
    """Return the tables of a file of records, a table a case, under its pictures."""
    found: list[dict[str, Any]] = json.loads(path.read_text())
    facts = ", ".join(f"{key} {found[0][key]}" for key in FACTS if found[0].get(key))
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in found:
        cases.setdefault((record["case"], record["dtype"]), []).append(record)
    head = "".join(f"<th>{title}</th>" for title, _, _ in COLUMNS)
    tables = [
        f"<h3>{escape(case)} <small>{escape(dtype)}</small></h3>\n"
        '<div class="wide"><table><tr><th class="name">pass</th><th class="name">provider</th>'
        f"{head}</tr>\n{''.join(map(_row, rows))}</table></div>"
        for (case, dtype), rows in cases.items()
    ]
    return "\n".join([f"<p><small>{escape(facts)}</small></p>", _pictures(path), *tables])


def _row(record: Mapping[str, Any]) -> str:
    """Return a row of a table; what was not timed has its reason in the place of numbers."""
    name = "ours (reference)" if record["kernel"] == "no" else record["provider"]
    cells = [f"{record['pass']} ({record['metric']})", name]
    head = "".join(f'<td class="name">{escape(cell)}</td>' for cell in cells)
    kind = ' class="ours"' if record["provider"] == "ours" else ""
    if record["status"] != "ok":
        return f'<tr{kind}>{head}<td class="name" colspan="{len(COLUMNS)}">{escape(record["status"])}</td></tr>\n'
    noisy = ' class="noisy" title="other processes kept cores busy"' if record["noisy"] else ""
    numbers = "".join(
        f"<td{noisy}>{'' if record[key] is None else f'{record[key]:.3g}{unit}'}</td>"
        for _, key, unit in COLUMNS
    )
    return f"<tr{kind}>{head}{numbers}</tr>\n"


def _own(path: Path) -> str:
    """Return a page of text and tables, as ``bench._results.write`` writes them."""
    parts: list[str] = []
    rows: list[str] = []
    for line in [*path.read_text().splitlines(), ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not all(set(cell) <= set("-: ") for cell in cells):
                kind = "td" if rows else "th"
                rows.append("".join(f'<{kind} class="name">{escape(c)}</{kind}>' for c in cells))
            continue
        if rows:
            body = "\n".join(f"<tr>{row}</tr>" for row in rows)
            parts.append(f'<div class="wide"><table>{body}</table></div>')
            rows = []
        if line.strip():
            parts.append(f"<p>{escape(line.lstrip('# '))}</p>")
    return "\n".join([*parts, _pictures(path)])


def _pictures(path: Path) -> str:
    """Return the pictures that belong to a file, within the page."""
    found = [path.with_name(f"{path.stem}{end}.png") for end in ("", "_scaling")]
    return "\n".join(
        f'<p><img alt="{escape(picture.stem)}" src="data:image/png;base64,'
        f'{base64.b64encode(picture.read_bytes()).decode()}"></p>'
        for picture in found
        if picture.is_file()
    )
