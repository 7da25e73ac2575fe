"""Line charts as inline SVG, drawn by hand so that a report needs no plotting library and no network.

Colours are CSS variables (`--c0` ... `--c5`, set in page.py for light and dark mode), so a chart follows the reader's theme. Series also
have dash patterns: they can be told apart without colour, in print too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 42
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2")
MAX_POINTS = 400  # more cannot be seen at this width; thinning keeps the first and the last


@dataclass(frozen=True)
class Series:
    """One curve. `colour` and `dash` are indices into the palette and the patterns; `markers` draws its points too.

    `band` is what is shaded around it: (x, lowest, highest).
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: int
    dash: int
    markers: bool = False
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Level:
    """A horizontal reference line, such as the PSNR of bicubic."""

    label: str
    value: float


def styled(index: int) -> tuple[int, int]:
    """(colour, dash) of the index-th of many curves: after a round of the palette the patterns are shifted."""
    return index % len(DASHES), (index + index // len(DASHES)) % len(DASHES)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high], about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 5, 10) if rough <= power * nice * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that cover [low, high], with 2 and 5 between them when there are fewer than three decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first >= 3:
        return [10.0**power for power in range(first, last + 1)]
    marks = [nice * 10.0**power for power in range(first, last + 1) for nice in (1, 2, 5)]
    start = max(index for index, mark in enumerate(marks) if mark <= low * (1 + 1e-9))
    stop = min((index for index, mark in enumerate(marks) if mark >= high * (1 - 1e-9)), default=len(marks) - 1)
    return marks[start : max(stop, start + 1) + 1]


def number(value: float) -> str:
    """A tick label: 20000 -> "20,000", 0.5 -> "0.5", 1e-7 -> "1e-07"."""
    if value and abs(value) < 1e-4:
        return f"{value:.0e}"
    return f"{value:,.10g}"


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about MAX_POINTS points, evenly taken, the last one always among them."""
    stride = max(1, math.ceil(len(points) / MAX_POINTS))
    kept = list(points[::stride])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


class _Axis:
    """Maps values to pixels between `start` and `stop`. Its ends are its first and last tick, or exactly `low` and `high`."""

    def __init__(
        self, low: float, high: float, start: float, stop: float, *, log: bool = False, exact: bool = False
    ) -> None:
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.marks = log_ticks(low, high) if log else ticks(low, high)
        if exact:
            self.marks = [mark for mark in self.marks if low <= mark <= high * (1 + 1e-9)]
        else:
            low, high = self.marks[0], self.marks[-1]
        self.log, self.start, self.stop = log, start, stop
        self.low, self.high = self._scale(low), self._scale(high)

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        part = (self._scale(value) - self.low) / (self.high - self.low)
        return round(self.start + part * (self.stop - self.start), 2)


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    levels: Sequence[Level] = (),
    log: bool = False,
) -> str:
    """A <figure> with the chart and its legend; "" when no series has a finite point.

    The x axis starts at 0. `log` makes the y axis logarithmic (points that are not positive are left out). What is not
    finite, such as the PSNR of equal images, is left out: points, parts of bands and levels.
    """
    clean = [
        dataclasses.replace(line, points=points, band=[part for part in line.band if _is_finite(part)])
        for line in series
        if (points := [p for p in line.points if _is_finite(p) and (p[1] > 0 or not log)])
    ]
    levels = [level for level in levels if math.isfinite(level.value)]
    if not clean:
        return ""
    heights = [y for line in clean for _, y in line.points] + [level.value for level in levels]
    heights += [y for line in clean for _, *ends in line.band for y in ends]
    longest = max(x for line in clean for x, _ in line.points)
    across = _Axis(0.0, max(longest, 1e-9), LEFT, WIDTH - RIGHT, exact=True)
    up = _Axis(min(heights), max(heights), HEIGHT - BOTTOM, TOP, log=log)
    parts = [
        *_grid(across, up, x_label, y_label),
        *(_level(level, up) for level in levels),
        *(_band(line, across, up) for line in clean if line.band),
        *(_curve(line, across, up) for line in clean),
    ]
    rule = f'<line class="rule" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>'
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><div class="legend">{"".join(map(_swatch, clean))}</div>'
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'{"".join(parts)}{rule}</svg><div class="tip" hidden></div></figure>'
    )


def _is_finite(point: Sequence[float]) -> bool:
    return all(map(math.isfinite, point))


def _swatch(line: Series) -> str:
    stroke = f'<line x1="1" y1="4" x2="29" y2="4" {_stroke(line)}/>'
    return f'<span><svg class="swatch" viewBox="0 0 30 8" aria-hidden="true">{stroke}</svg>{escape(line.label)}</span>'


def _colour(line: Series) -> str:
    return f"var(--c{line.colour % len(DASHES)})"


def _stroke(line: Series) -> str:
    dash = DASHES[line.dash % len(DASHES)]
    pattern = f' stroke-dasharray="{dash}"' if dash else ""
    return f'stroke="{_colour(line)}" stroke-width="2" fill="none"{pattern}'


def _grid(across: _Axis, up: _Axis, x_label: str, y_label: str) -> list[str]:
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    lines = []
    for mark in up.marks:
        lines.append(f'<line class="grid" x1="{LEFT}" y1="{up(mark)}" x2="{right}" y2="{up(mark)}"/>')
        lines.append(_text(LEFT - 7, up(mark) + 4, number(mark), "end"))
    for mark in across.marks:
        lines.append(f'<line class="axis" x1="{across(mark)}" y1="{floor}" x2="{across(mark)}" y2="{floor + 4}"/>')
        at_end = across(mark) > right - 12  # its number must not stick out
        lines.append(_text(across(mark) + 4 * at_end, floor + 18, number(mark), "end" if at_end else "middle"))
    lines.append(f'<line class="axis" x1="{LEFT}" y1="{floor}" x2="{right}" y2="{floor}"/>')
    lines.append(_text((LEFT + right) / 2, HEIGHT - 6, x_label, "middle"))
    lines.append(
        f'<g transform="rotate(-90 12 {(TOP + floor) / 2})">{_text(12, (TOP + floor) / 2, y_label, "middle")}</g>'
    )
    return lines


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _level(level: Level, up: _Axis) -> str:
    y, right = up(level.value), WIDTH - RIGHT
    text = y - 5 if y > TOP + 14 else y + 14
    line = f'<line class="level" x1="{LEFT}" y1="{y}" x2="{right}" y2="{y}"/>'
    return line + _text(right - 4, text, level.label, "end")


def _band(line: Series, across: _Axis, up: _Axis) -> str:
    edge = [(x, high) for x, _, high in line.band] + [(x, low) for x, low, _ in reversed(line.band)]
    points = " ".join(f"{across(x)},{up(y)}" for x, y in edge)
    return f'<polygon points="{points}" fill="{_colour(line)}" fill-opacity="0.15"/>'


def _curve(line: Series, across: _Axis, up: _Axis) -> str:
    """The curve; its values ride along in data attributes for the read-out under the pointer (page.py)."""
    shown = thin(line.points)
    places = [(across(x), up(y)) for x, y in shown]
    points = " ".join(f"{x},{y}" for x, y in places)
    xs, ys = (" ".join(f"{point[axis]:.6g}" for point in shown) for axis in (0, 1))
    data = f'data-label="{escape(line.label)}" data-x="{xs}" data-y="{ys}"'
    fill = f'fill="{_colour(line)}"'
    dots = [f'<circle cx="{x}" cy="{y}" r="3" {fill}/>' for x, y in places] if line.markers else []
    return f'<polyline points="{points}" {_stroke(line)} {data}/>{"".join(dots)}'


def picture(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """A whole SVG file with both axes logarithmic: points are joined and marked, the legend stands to the right.

    Raises:
        ValueError: no series has a point that is positive in x and y.
    """
    points = [point for line in series for point in line.points]
    if not points or min(map(min, points)) <= 0:
        raise ValueError(f"The picture {title!r} needs points that are positive in x and y; it was given {points[:3]}.")
    across = _Axis(min(x for x, _ in points), max(x for x, _ in points), LEFT, WIDTH - RIGHT, log=True)
    up = _Axis(min(y for _, y in points), max(y for _, y in points), HEIGHT - BOTTOM, TOP + 18, log=True)
    legend = []
    for row, line in enumerate(series):
        y = TOP + 24 + 18 * row
        legend.append(f'<line x1="{WIDTH + 8}" y1="{y}" x2="{WIDTH + 36}" y2="{y}" {_stroke(line)}/>')
        legend.append(_text(WIDTH + 42, y + 4, line.label, "start"))
    parts = [*_grid(across, up, x_label, y_label), *(_curve(line, across, up) for line in series), *legend]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 170} {HEIGHT}" font-family="sans-serif" font-size="11">'
        f"<style>{_PICTURE_STYLE}</style><title>{escape(title)}</title>{_text(LEFT, TOP + 4, title, 'start')}{''.join(parts)}</svg>\n"
    )


# Grey and these six read on white and on black.
_PICTURE_STYLE = (
    "svg{--c0:#d1495b;--c1:#2e86ab;--c2:#5a9e4b;--c3:#e39b1f;--c4:#8d6bb8;--c5:#888}"
    "text{fill:#888}.grid{stroke:#888;stroke-opacity:.25}.axis{stroke:#888}"
)
