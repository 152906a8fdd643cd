"""Pictures of the kernels for docs/mathematics: what is read, kept and written.

``python docs/_pictures.py`` writes docs/mathematics/<family>.svg from the table in ``_kernels.py``; a test compares
them.  Boxes have colours of their own and the background is transparent, so that they read in light and dark pages.
"""

from html import escape
from pathlib import Path

from _kernels import KERNELS, Pass

FOLDER = Path(__file__).resolve().parent / "mathematics"
MEMORY, KERNEL, KEPT, LINE = "#2b5f8f", "#8a4b12", "#2d6b4a", "#7c8794"
WIDTH, BOX, TEXT = 960, 264, 17  # of the picture, of a box, and the height of a line
LEFT, MIDDLE, RIGHT = 4, 348, 692  # where the three columns begin
MOST = 37  # characters that fit into a box


def box(x: int, y: int, title: str, lines: tuple[str, ...], colour: str) -> str:
    """Return a box with a title and lines of text."""
    height = box_height(lines)
    parts = [f'<rect x="{x}" y="{y}" width="{BOX}" height="{height}" rx="6" fill="{colour}"/>']
    for i, text in enumerate((title, *lines)):
        if len(text) > MOST:
            raise ValueError(f"{text!r} is longer than {MOST} characters")
        weight = ' font-weight="bold"' if i == 0 else ""
        place = f'x="{x + 10}" y="{y + 20 + TEXT * i}"'
        parts.append(f'<text {place} fill="#ffffff"{weight}>{escape(text)}</text>')
    return "\n".join(parts)


def box_height(lines: tuple[str, ...]) -> int:
    """Return the height of a box with so many lines below its title."""
    return 30 + TEXT * len(lines)


def label(x: int, y: int, text: str) -> str:
    """Return text outside boxes, centred."""
    return f'<text x="{x}" y="{y}" fill="{LINE}" text-anchor="middle">{escape(text)}</text>'


def arrow(x0: int, y0: int, x1: int, y1: int) -> str:
    """Return an arrow."""
    ends = f'x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}"'
    return f'<line {ends} stroke="{LINE}" stroke-width="2" marker-end="url(#tip)"/>'


def row(name: str, p: Pass, top: int) -> tuple[str, int]:
    """Return the picture of a pass, and where the next may begin."""
    height = max(box_height(lines) for lines in (p.read, p.kernel, p.written))
    y = top + 26
    middle = y + 24
    parts = [
        f'<text x="{LEFT}" y="{top + 14}" fill="{LINE}" font-weight="bold">{name}</text>',
        box(LEFT, y, "memory", p.read, MEMORY),
        box(MIDDLE, y, "kernel", p.kernel, KERNEL),
        box(RIGHT, y, "memory", p.written, MEMORY),
        arrow(LEFT + BOX, middle, MIDDLE - 4, middle),
        label((LEFT + BOX + MIDDLE) // 2, middle - 9, p.reads),
        arrow(MIDDLE + BOX, middle, RIGHT - 4, middle),
        label((MIDDLE + BOX + RIGHT) // 2, middle - 9, "written"),
    ]
    y += height
    if p.kept:
        x = MIDDLE + BOX // 2
        parts += [
            arrow(x, y - height + box_height(p.kernel), x, y + 30),
            label(x + 28, y + 22, "kept"),
            box(MIDDLE, y + 34, "for the backward pass", p.kept, KEPT),
        ]
        y += 34 + box_height(p.kept)
    return "\n".join(parts), y + 16


def draw(family: str) -> str:
    """Return the picture of a family."""
    rows, y = [], 0
    for name, p in KERNELS[family].items():
        text, y = row(name, p, y)
        rows.append(text)
    body = "\n".join(rows)
    font = 'font-family="sans-serif" font-size="13"'
    tip = f'<path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/>'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" {font}>
<title>{family}: what its kernel reads, keeps and writes</title>
<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">{tip}</marker></defs>
{body}
</svg>
"""


if __name__ == "__main__":
    for family in KERNELS:
        (FOLDER / f"{family}.svg").write_text(draw(family))
