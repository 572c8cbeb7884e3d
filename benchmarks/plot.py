"""Curves over two logarithmic axes, as an SVG that is readable on a light page and on a dark one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 230, 36, 48
COLOURS = ("#4477aa", "#888888", "#228833", "#ccbb44", "#ee6677", "#aa3377")
STEPS = (1, 2, 5)


@dataclass(frozen=True, slots=True)
class Curve:
    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    joined: bool = True


class Axis:
    """From values, which are positive, to places between `begin` and `end`."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        self._low, self._high = math.log10(min(values)) - 0.08, math.log10(max(values)) + 0.08
        self._begin, self._end = begin, end

    def place(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return self._begin + share * (self._end - self._begin)

    def ticks(self) -> list[float]:
        powers = range(math.floor(self._low), math.ceil(self._high) + 1)
        values = [step * 10.0**power for power in powers for step in STEPS]
        return [value for value in values if self._low <= math.log10(value) <= self._high]


def log_log(title: str, x_label: str, y_label: str, curves: Sequence[Curve]) -> str:
    x = Axis([at for curve in curves for at, _ in curve.points], LEFT, WIDTH - RIGHT)
    y = Axis([value for curve in curves for _, value in curve.points], HEIGHT - BOTTOM, TOP)
    parts = [_text(LEFT, 20, title, "start"), _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label, "middle")]
    parts.append(f'<g transform="translate(14 {HEIGHT / 2}) rotate(-90)">{_text(0, 0, y_label, "middle")}</g>')
    for value in x.ticks():
        parts.append(_line(x.place(value), TOP, x.place(value), HEIGHT - BOTTOM))
        parts.append(_text(x.place(value), HEIGHT - BOTTOM + 18, f"{value:g}", "middle"))
    for value in y.ticks():
        parts.append(_line(LEFT, y.place(value), WIDTH - RIGHT, y.place(value)))
        parts.append(_text(LEFT - 8, y.place(value) + 4, f"{value:g}", "end"))
    for number, (curve, colour) in enumerate(zip(curves, COLOURS, strict=False)):
        parts += _curve(curve, colour, x, y)
        at = TOP + 12 + 20 * number
        parts.append(f'<rect x="{WIDTH - RIGHT + 14}" y="{at - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT + 30, at, curve.name, "start"))
    style = "text{font:12px system-ui,sans-serif;fill:#808890}"
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{escape(title)}">\n<style>{style}</style>\n{body}\n</svg>\n'
    )


def _curve(curve: Curve, colour: str, x: Axis, y: Axis) -> list[str]:
    places = [(x.place(at), y.place(value)) for at, value in curve.points]
    dots = [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in places]
    if not curve.joined:
        return dots
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    dash = ' stroke-dasharray="6 4"' if curve.dashed else ""
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>', *dots]


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#80889040"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
