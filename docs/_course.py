"""Pictures of the course in docs/course, each computed from the formulas of its page.

``python docs/_course.py`` writes docs/course/<page>.svg; a test compares them.
"""

import math
import random
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

from _plot import BLACK, BLUE, BROWN, GREEN, GREY, Panel, Point, arrow, svg, text

FOLDER = Path(__file__).resolve().parent / "course"


def steps(start: float, end: float, n: int) -> list[float]:
    """Return n + 1 equal steps."""
    return [start + (end - start) * i / n for i in range(n + 1)]


def first(x: Point) -> Point:
    """Return the first coupling of the page: the second coordinate moves."""
    return x[0], 2 ** x[0] * x[1] - 4 * x[0]


def second(y: Point) -> Point:
    """Return the second coupling: the first coordinate moves."""
    return 2 ** -y[1] * y[0] + y[1] / 2, y[1]


def coupling() -> str:
    """Draw a grid of squares before and after each of two couplings."""
    maps: list[tuple[str, Callable[[Point], Point]]] = [
        ("x = (1, 3)", lambda x: x),
        ("y = (1, 2), areas × 2", first),
        ("z = (1.25, 2), areas × 1/2", lambda x: second(first(x))),
    ]
    parts = []
    for i, (title, move) in enumerate(maps):
        panel = Panel((30 + 240 * i, 34), (204, 289), (0, 2.4), (0.8, 4.2), title)
        panel.ticks(x=(0, 1, 2), y=(1, 2, 3, 4))
        for at in steps(-0.5, 0.5, 4):
            panel.line([move((1 + at, 3 + d)) for d in steps(-0.5, 0.5, 24)], BLUE)
            panel.line([move((1 + d, 3 + at)) for d in steps(-0.5, 0.5, 24)], GREEN)
        sides = [(0.0, d) for d in steps(0, 0.25, 8)] + [(d, 0.25) for d in steps(0, 0.25, 8)]
        sides += [(0.25, 0.25 - d) for d in steps(0, 0.25, 8)]
        sides += [(0.25 - d, 0.0) for d in steps(0, 0.25, 8)]
        panel.area([move((1 + a, 3 + b)) for a, b in sides], BROWN, 0.6)
        panel.dots([move((1, 3))], BLACK, 4)
        parts += panel.parts
    return svg("A square grid, and what two couplings make of it", (720, 350), parts)


def box(x: float, y: float, words: str, colour: str) -> str:
    """Return a box with a word in it."""
    rect = f'<rect x="{x:.1f}" y="{y:.1f}" width="46" height="24" rx="4" fill="{colour}"/>'
    return rect + text(x + 23, y + 17, words, "#ffffff", anchor="middle")


def at_once(left: float, top: float, given: str, found: str) -> list[str]:
    """Return four values that are computed together from four that are given."""
    parts = []
    for i in range(4):
        x = left + 72 * i
        parts += [box(x, top, f"{given}{i + 1}", GREY), box(x, top + 74, f"{found}{i + 1}", BLUE)]
        parts += [arrow((left + 72 * j + 23, top + 24), (x + 23, top + 73)) for j in range(i + 1)]
    return parts


def in_turn(left: float, top: float, given: str, found: str) -> list[str]:
    """Return four values of which each needs those before it."""
    parts = [box(left + 72 * i, top, f"{given}{i + 1}", GREY) for i in range(4)]
    for i in range(4):
        x, y = left + 72 * i, top + 48 + 36 * i
        parts.append(arrow((x + 23, top + 24), (x + 23, y - 1)))
        parts.append(box(x, y, f"{found}{i + 1}", BROWN))
        if i:
            parts.append(arrow((x - 26, y - 24), (x - 1, y + 10)))
    return parts


def maf_iaf() -> str:
    """Draw what can be computed at once, and what only in turn."""
    parts = [
        text(210, 22, "density of a given x", anchor="middle", bold=True),
        text(560, 22, "sample from a given z", anchor="middle", bold=True),
        text(4, 60, "MAF", bold=True),
        text(4, 296, "IAF", bold=True),
        *at_once(80, 43, "x", "z"),
        *in_turn(430, 43, "z", "x"),
        *in_turn(80, 279, "x", "z"),
        *at_once(430, 279, "z", "x"),
        text(80, 165, "one pass of the network", BLUE),
        text(430, 226, "each waits for the one before", BROWN),
        text(80, 462, "each waits for the one before", BROWN),
        text(430, 401, "one pass of the network", BLUE),
    ]
    return svg("MAF and IAF: what one pass computes, and what not", (720, 480), parts)


MATRIX, SHIFT, DURATION = ((0.4, -1.5), (1.0, -0.9)), (0.5, 0.2), 1.5


def velocity(z: Point) -> Point:
    """Return A z + b."""
    (a, b), (c, d) = MATRIX
    return a * z[0] + b * z[1] + SHIFT[0], c * z[0] + d * z[1] + SHIFT[1]


def path(z: Point, n: int = 60) -> list[Point]:
    """Return the states of z up to the duration, by the classical Runge-Kutta method."""
    h, out = DURATION / n, [z]
    for _ in range(n):
        k = [velocity(out[-1])]
        for part in (h / 2, h / 2, h):
            k.append(velocity((out[-1][0] + part * k[-1][0], out[-1][1] + part * k[-1][1])))
        x, y = (sum(w * v[i] for w, v in zip((1, 2, 2, 1), k, strict=True)) for i in (0, 1))
        out.append((out[-1][0] + h / 6 * x, out[-1][1] + h / 6 * y))
    return out


def affine_cnf() -> str:
    """Draw a Gaussian along an affine field, and the change of log-densities beside two estimates."""
    left = Panel((34, 34), (300, 300), (-1.5, 2), (-1.7, 1.8), "standard deviation, t = 0 to 1.5")
    left.ticks(x=(-1, 0, 1, 2), y=(-1, 0, 1))
    circle = [path((math.cos(a), math.sin(a))) for a in steps(0, 2 * math.pi, 72)]
    for track in circle[::9]:
        left.line(track, GREY, 1)
    for when, colour in ((0, BLUE), (20, GREEN), (40, GREEN), (60, BROWN)):
        left.line([track[when] for track in circle], colour, 2)
    left.dots([path((0, 0))[i] for i in (0, 20, 40, 60)], BLACK, 3)
    right = Panel((404, 34), (300, 300), (0, 1.5), (-0.2, 1.7), "change of the log-density, nats")
    right.ticks(x=(0, 0.5, 1, 1.5), y=(0, 0.5, 1, 1.5))
    right.labels(x="t")
    (a, b), (c, d) = MATRIX
    for sign, name in ((1, "probe (1, 1)"), (-1, "probe (1, -1)")):
        slope = -(a + d + sign * (b + c))
        right.line(
            [(0, 0), (DURATION, DURATION * slope)], GREY, 1.5, more='stroke-dasharray="5 4"'
        )
        right.note((0.95, 0.95 * slope), name, GREY, anchor="end", move=(-6, -8))
    right.line([(0, 0), (DURATION, -DURATION * (a + d))], BROWN, 2.5)
    right.note((1.45, 0.25), "-t tr A, every sample", BROWN, anchor="end")
    return svg("An affine field keeps a Gaussian Gaussian", (720, 384), left.parts + right.parts)


START, END, SIGMA = (0.0, 0.6), (2.0, 1.0), 0.8  # mean and deviation of both ends; the volatility


def coupling_covariance(sigma: float) -> float:
    """Return the covariance of both ends of the bridge."""
    product, square = START[1] ** 2 * END[1] ** 2, sigma**2
    return (math.sqrt(square**2 + 4 * product) - square) / 2


def bridge_path(x: float, draw: random.Random, n: int = 50) -> list[Point]:
    """Return a path from x: its end given x, then a Brownian bridge."""
    c, variance = coupling_covariance(SIGMA), START[1] ** 2
    mean = END[0] + c / variance * (x - START[0])
    end = mean + SIGMA * math.sqrt(c / variance) * draw.gauss(0, 1)
    out = [(0.0, x)]
    for k in range(1, n):
        left = n - k + 1
        step = SIGMA * math.sqrt((left - 1) / left / n) * draw.gauss(0, 1)
        out.append((k / n, out[-1][1] + (end - out[-1][1]) / left + step))
    return [*out, (1.0, end)]


def bell(panel: Panel, at: float, mean: float, deviation: float, colour: str) -> None:
    """Draw a normal density upright at a time; positive heights go right."""
    normal, wide = NormalDist(mean, deviation), 0.25 if at > 0 else -0.25
    ends = steps(mean - 3 * deviation, mean + 3 * deviation, 60)
    curve = [(at + wide * normal.pdf(x), x) for x in ends]
    panel.area([(at, ends[0]), *curve, (at, ends[-1])], colour, 0.25)
    panel.line(curve, colour, 1.5)


def bridge() -> str:
    """Draw paths of deterministic transport beside those of a bridge with the same ends."""
    starts, parts = ((-0.6, GREEN), (0.6, BROWN)), []
    draw = random.Random(4)
    for i, title in enumerate(("transport: one end for a start", "bridge: a law of ends")):
        panel = Panel((34 + 356 * i, 34), (330, 300), (-0.25, 1.3), (-2, 5.2), title)
        panel.ticks(x=(0, 1), y=(-2, 0, 2, 4))
        panel.labels(x="t")
        bell(panel, 0, *START, GREY)
        bell(panel, 1, *END, GREY)
        for x, colour in starts:
            if i == 0:
                end = END[0] + END[1] / START[1] * (x - START[0])
                panel.line([(0, x), (1, end)], colour, 2)
                panel.dots([(0, x), (1, end)], colour, 4)
                continue
            for _ in range(8):
                panel.line(bridge_path(x, draw), colour, 1)
            slope = coupling_covariance(SIGMA) / START[1] ** 2
            bell(panel, 1, END[0] + slope * (x - START[0]), SIGMA * math.sqrt(slope), colour)
            panel.dots([(0, x)], colour, 4)
        parts += panel.parts
    return svg("One start, under transport and under a bridge", (728, 384), parts)


def normal_cdf(x: float) -> float:
    """Return the normal distribution function, precise for negative x."""
    return math.erfc(-x / math.sqrt(2)) / 2


def to_normal(w: float, a: float) -> tuple[float, float]:
    """Return the monotone map from the modes -a and a of deviation 1 to a normal, and its log-slope."""
    if w > 0:
        z, slope = to_normal(-w, a)
        return -z, slope
    z = NormalDist().inv_cdf((normal_cdf(w + a) + normal_cdf(w - a)) / 2)
    return z, (z * z - w * w - a * a) / 2 + math.log(math.cosh(a * w))


def two_modes() -> str:
    """Draw the monotone map between two modes and a normal, and the logarithm of its slope."""
    a, line = 3, steps(-6, 6, 240)
    left = Panel((34, 34), (300, 300), (-6, 6), (-3.6, 3.4), "z(x) for m = 3, s = 1")
    left.ticks(x=(-6, -3, 0, 3, 6), y=(-3, -2, -1, 0, 1, 2, 3))
    left.labels(x="x")
    normal = NormalDist()
    modes = [(x, -3.6 + 4 * (normal.pdf(x - a) + normal.pdf(x + a)) / 2) for x in line]
    left.area([(-6, -3.6), *modes, (6, -3.6)], GREY, 0.3)
    left.note((0, -3.1), "density of x", GREY, anchor="middle")
    left.line([(x, to_normal(x, a)[0]) for x in line], BLUE, 2.5)
    right = Panel((404, 34), (300, 300), (-6, 6), (-9, 1), "log dz/dx")
    right.ticks(x=(-6, -3, 0, 3, 6), y=(-8, -6, -4, -2, 0))
    right.labels(x="x")
    for mode, colour in ((1, GREY), (2, GREEN), (3, BLUE), (4, BROWN)):
        right.line([(x, to_normal(x, mode)[1]) for x in line], colour, 2)
        right.note((2.2, -4.5 - mode), f"m = {mode}: -{mode**2 / 2:g}", colour)
    return svg("The map from two modes to one normal", (720, 384), left.parts + right.parts)


PICTURES: dict[str, Callable[[], str]] = {
    "affine_cnf": affine_cnf,
    "bridge": bridge,
    "coupling": coupling,
    "maf_iaf": maf_iaf,
    "two_modes": two_modes,
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw())
