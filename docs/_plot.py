"""A panel of an SVG picture: lines, points and text in coordinates of the data.

The pictures of the course are drawn by it.  Numbers have one decimal, so that a picture is the same text on every
machine.  Colours are dark enough for a white page, on which all pictures stand.
"""

from collections.abc import Iterable, Sequence
from html import escape

Point = tuple[float, float]

BLUE, BROWN, GREEN, GREY, BLACK = "#2b5f8f", "#b0561a", "#2d6b4a", "#7c8794", "#2a3038"


def text(
    x: float,
    y: float,
    words: str,
    colour: str = BLACK,
    *,
    anchor: str = "start",
    bold: bool = False,
) -> str:
    """Return words at a place of the picture."""
    weight = ' font-weight="bold"' if bold else ""
    place = f'x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}"'
    return f"<text {place}{weight}>{escape(words)}</text>"


def arrow(start: Point, end: Point, colour: str = GREY) -> str:
    """Return an arrow between two places of the picture."""
    (x0, y0), (x1, y1) = start, end
    ends = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="1.5" marker-end="url(#tip)"/>'


class Panel:
    """A rectangle of the picture, ``at`` its upper left corner and of a ``size``, that shows ``x`` and ``y`` ranges."""

    def __init__(self, at: Point, size: Point, x: Point, y: Point, title: str = "") -> None:
        self.at, self.size, self.x, self.y = at, size, x, y
        left, top = at
        frame = f'x="{left}" y="{top}" width="{size[0]}" height="{size[1]}"'
        self.parts = [f'<rect {frame} fill="none" stroke="{GREY}" stroke-width="1"/>']
        if title:
            self.parts.append(
                text(left + size[0] / 2, top - 10, title, anchor="middle", bold=True)
            )

    def place(self, point: Point) -> Point:
        """Return where a point of the data lies in the picture."""
        (left, top), (width, height) = self.at, self.size
        x = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        y = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return left + width * x, top + height * (1 - y)

    def line(
        self, points: Iterable[Point], colour: str, width: float = 1.5, *, more: str = ""
    ) -> None:
        """Draw a line through points; ``more`` are attributes such as ``stroke-dasharray="4 3"``."""
        path = " ".join("{:.1f},{:.1f}".format(*self.place(p)) for p in points)
        style = f'fill="none" stroke="{colour}" stroke-width="{width}" {more}'.rstrip()
        self.parts.append(f'<polyline points="{path}" {style}/>')

    def area(self, points: Iterable[Point], colour: str, opacity: float = 0.2) -> None:
        """Fill a polygon."""
        path = " ".join("{:.1f},{:.1f}".format(*self.place(p)) for p in points)
        self.parts.append(f'<polygon points="{path}" fill="{colour}" fill-opacity="{opacity}"/>')

    def dots(self, points: Iterable[Point], colour: str, radius: float = 2) -> None:
        """Draw points."""
        for x, y in map(self.place, points):
            self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>')

    def arrow(self, start: Point, end: Point, colour: str = GREY) -> None:
        """Draw an arrow."""
        self.parts.append(arrow(self.place(start), self.place(end), colour))

    def note(
        self,
        point: Point,
        words: str,
        colour: str = BLACK,
        *,
        anchor: str = "start",
        move: Point = (0, 0),
    ) -> None:
        """Write at a point, moved by so much of the picture."""
        x, y = self.place(point)
        self.parts.append(text(x + move[0], y + move[1], words, colour, anchor=anchor))

    def ticks(self, x: Sequence[float] = (), y: Sequence[float] = ()) -> None:
        """Mark and label values of both axes."""
        (left, top), (_, height) = self.at, self.size
        for value in x:
            place = self.place((value, self.y[0]))[0]
            bottom = top + height
            self.parts.append(_stroke(place, bottom, place, bottom + 4))
            self.parts.append(text(place, bottom + 19, f"{value:g}", GREY, anchor="middle"))
        for value in y:
            place = self.place((self.x[0], value))[1]
            self.parts.append(_stroke(left - 4, place, left, place))
            self.parts.append(text(left - 7, place + 5, f"{value:g}", GREY, anchor="end"))

    def labels(self, x: str = "", y: str = "") -> None:
        """Name the axes: below the panel, and above its left corner."""
        (left, top), (width, height) = self.at, self.size
        if x:
            self.parts.append(text(left + width / 2, top + height + 38, x, GREY, anchor="middle"))
        if y:
            self.parts.append(text(left + 8, top + 18, y, GREY))


def _stroke(x0: float, y0: float, x1: float, y1: float) -> str:
    ends = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
    return f'<line {ends} stroke="{GREY}"/>'


def svg(title: str, size: Point, parts: Iterable[str]) -> str:
    """Return a whole picture."""
    body = "\n".join(parts)
    font = 'font-family="sans-serif" font-size="14"'
    tip = f'<path d="M0 0 L8 4 L0 8 z" fill="{GREY}"/>'
    marker = f'<marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">{tip}</marker>'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]:g} {size[1]:g}" {font}>
<title>{escape(title)}</title>
<defs>{marker}</defs>
{body}
</svg>
"""
