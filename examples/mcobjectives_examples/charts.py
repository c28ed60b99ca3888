"""Line charts as SVG that takes its colours from the page: readable on light and on dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44
_MOST_TICKS = 6
COLOURS = 8
"""How many lines have a colour of their own."""


@dataclass(frozen=True)
class Line:
    """Points by growing x; `style` is a class of the page's styles, such as "c0" or "c0 paper"."""

    label: str
    points: Sequence[tuple[float, float]]
    style: str


def line_chart(
    lines: Sequence[Line], x_label: str, y_label: str, about: str, *, log_x: bool = False, dots: bool = False
) -> str:
    """An SVG of the lines; `about` is read to those who do not see it. With `log_x` the ticks are the x themselves."""
    xs = sorted({x for line in lines for x, _ in line.points})
    ys = [y for line in lines for _, y in line.points]
    ticks_y = nice_ticks(min(ys), max(ys))
    ticks_x = xs if log_x else nice_ticks(xs[0], xs[-1])
    low, high = min(*ys, ticks_y[0]), max(*ys, ticks_y[-1])

    def scale(x: float) -> float:
        return math.log(x) if log_x else x

    def at_x(x: float) -> float:
        span = scale(xs[-1]) - scale(xs[0])
        return LEFT + (WIDTH - LEFT - RIGHT) * ((scale(x) - scale(xs[0])) / span if span else 0.5)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(about)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    ]
    for y in ticks_y:
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks_x:
        if xs[0] <= x <= xs[-1]:
            parts.append(f'<text x="{at_x(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>')
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    for line in lines:
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="{line.style}" points="{path}"><title>{escape(line.label)}</title></polyline>')
        if dots:
            parts += [
                f'<circle class="{line.style}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3.5">'
                f"<title>{escape(line.label)}: {x:g}, {y:.2f}</title></circle>"
                for x, y in line.points
            ]
    return "".join([*parts, "</svg>"])


def nice_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from just below `low` to just above `high`.

    Example:
        >>> nice_ticks(88.7, 90.6)
        [88.5, 89.0, 89.5, 90.0, 90.5, 91.0]
    """
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / _MOST_TICKS))
    step = next(m * power for m in (1, 2, 5, 10, 20) if span / (m * power) <= _MOST_TICKS - 1)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]
