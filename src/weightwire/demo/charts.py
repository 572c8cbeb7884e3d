"""Charts as plain numbers: what is where in an SVG. The report's template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Bar", "Chart", "Dot", "Tick", "line", "nice_ticks", "stacked_bars"]

WIDTH, HEIGHT = 720, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Dot:
    x: float
    y: float
    title: str
    marked: bool


@dataclass(frozen=True, slots=True)
class Bar:
    """`series` is the number of its colour."""

    x: float
    y: float
    width: float
    height: float
    series: int
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Either a line of dots or bars, with its axes; all places in the SVG's own units."""

    title: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    dots: Sequence[Dot] = ()
    bars: Sequence[Bar] = ()
    legend: Sequence[str] = ()

    width, height, left, right, top, bottom = WIDTH, HEIGHT, LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM

    @property
    def path(self) -> str:
        return " ".join(f"{dot.x:.1f},{dot.y:.1f}" for dot in self.dots)


def line(title: str, values: Mapping[int, float], *, top: float, marked: Sequence[int] = ()) -> Chart:
    """Values by their x, from 0 up to `top`; those at `marked` stand out."""
    y_ticks, highest = _y_axis(top)
    place = _places(list(values))
    dots = [Dot(place[x], _height_of(value, highest), f"{x}: {value:.3f}", x in marked) for x, value in values.items()]
    return Chart(title=title, x_ticks=_x_axis(place), y_ticks=y_ticks, dots=dots)


def stacked_bars(title: str, columns: Mapping[int, Mapping[str, float]], *, unit: str) -> Chart:
    """For each x a column of named parts, stacked in their order."""
    names = list(dict.fromkeys(name for parts in columns.values() for name in parts))
    y_ticks, highest = _y_axis(max((sum(parts.values()) for parts in columns.values()), default=0.0))
    place = _places(list(columns))
    width = max(1.0, 0.7 * (WIDTH - LEFT - RIGHT) / max(len(columns), 1))
    bars = []
    for x, parts in columns.items():
        below = 0.0
        for name, value in parts.items():
            bottom, top = _height_of(below, highest), _height_of(below + value, highest)
            label = f"{x}: {name} {value:.3g} {unit}"
            bars.append(Bar(place[x] - width / 2, top, width, bottom - top, names.index(name), label))
            below += value
    return Chart(title=title, x_ticks=_x_axis(place), y_ticks=y_ticks, bars=bars, legend=names)


def nice_ticks(top: float) -> list[float]:
    """From 0 to `top` or a little above, three to six round numbers.

    >>> nice_ticks(0.93)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> nice_ticks(0)
    [0.0, 0.5, 1.0]
    """
    if not math.isfinite(top) or top <= 0:
        return [0.0, 0.5, 1.0]
    scale = 10.0 ** math.floor(math.log10(top))
    step = next(size * scale for size in (0.2, 0.5, 1.0, 2.0) if top <= 5 * size * scale * (1 + 1e-9))
    return [round(n * step, 12) for n in range(math.ceil(top / step - 1e-9) + 1)]


def _y_axis(top: float) -> tuple[list[Tick], float]:
    values = nice_ticks(top)
    return [Tick(_height_of(value, values[-1]), f"{value:g}") for value in values], values[-1]


def _height_of(value: float, highest: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / highest


def _places(xs: Sequence[int]) -> dict[int, float]:
    slot = (WIDTH - LEFT - RIGHT) / max(len(xs), 1)
    return {x: LEFT + slot * (n + 0.5) for n, x in enumerate(xs)}


def _x_axis(place: Mapping[int, float]) -> list[Tick]:
    every = math.ceil(len(place) / 15) or 1
    return [Tick(at, str(x)) for n, (x, at) in enumerate(place.items()) if n % every == 0]
