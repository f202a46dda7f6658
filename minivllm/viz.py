"""Pictures of real runs: strings of SVG, drawn from traces and counters, with the numbers in the boxes.

Owns how things look, on white and on black. Never runs a model and never makes up a number: what it draws was counted.

    blocks(states, 33)            the block grid after a step, or as a film
    table(ids, 10, 4, 13)         a block table: where logical blocks lie in memory
    timeline(rows)                who does what from when to when
    steps(columns, names, 256)    what each step computes, stacked, with the line of the budget
    line(..), bars(..), triangle(..)   curves; a number for each name; which positions each pass computes
    show(function)                its source as it is today, a learner's version included
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from minivllm.trace import TraceState

# Okabe and Ito's colors, which color-blind readers tell apart, each with the text that can be read on it.
COLORS = (("#0072B2", "#fff"), ("#E69F00", "#000"), ("#CC79A7", "#000"), ("#009E73", "#fff"),
          ("#56B4E9", "#000"), ("#D55E00", "#fff"), ("#F0E442", "#000"), ("#8A6FC9", "#fff"))
GRAY = "#888"  # 3.5 to 1 on white and 5.9 to 1 on black
EMPTY, UNUSED = "#88888814", "#88888855"  # nobody's; somebody's, and without use
WIDTH, FRAME_SECONDS = 720.0, 0.5


class Svg(str):
    """A picture. Jupyter shows it as one, and everybody else sees its text."""

    def _repr_svg_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"<a picture of {len(self):,} bytes>"


class Source(str):
    """A piece of code: Jupyter colors it, everybody else sees it plain."""

    __repr__ = str.__str__

    def _repr_markdown_(self) -> str:
        return f"```python\n{self}\n```"


def show(function: Any) -> Source:
    """The source of a function or class as it is today: the reference's, or a learner's under MINIVLLM_MINE."""
    return Source(textwrap.dedent(inspect.getsource(function)).rstrip())


def picture(parts: Iterable[str], height: float, title: str) -> Svg:
    return Svg(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height + 30:g}" width="100%" role="img" '
               f'style="max-width:{WIDTH:g}px" font-family="system-ui, sans-serif" aria-label="{escape(title)}">'
               f'{text(4, 16, title, size=14, weight=600)}<g transform="translate(0 30)">{"".join(parts)}</g></svg>')


def text(x: float, y: float, words: object, *, fill: str = GRAY, anchor: str = "start", size: float = 12, weight: int = 400) -> str:
    return (f'<text x="{x:.4g}" y="{y:.4g}" fill="{fill}" text-anchor="{anchor}" font-size="{size:g}" font-weight="{weight}">'
            f"{escape(str(words))}</text>")


def box(x: float, y: float, width: float, height: float, fill: str = "none", label: object = "", ink: str = GRAY,
        inner: str = "", size: float = 12) -> str:
    """A rectangle with its number inside; one that is too narrow for it goes without."""
    fits = width >= 0.62 * size * len(str(label)) > 0 and height >= size
    drawn = text(x + width / 2, y + height / 2 + 0.36 * size, label, fill=ink, anchor="middle", size=size) if fits else ""
    return (f'<rect x="{x:.4g}" y="{y:.4g}" width="{width:.4g}" height="{height:.4g}" fill="{fill}" stroke="{GRAY}" '
            f'stroke-width=".5">{inner}</rect>{drawn}')


def legend(names: Sequence[str], x: float) -> str:
    """Colored squares in a row, the n-th name in the n-th color."""
    parts = []
    for number, name in enumerate(names):
        parts += [box(x, 0, 12, 12, COLORS[number % 8][0]), text(x + 17, 10, name)]
        x += 34 + 6.6 * len(name)
    return "".join(parts)


def blocks(states: Sequence[TraceState], num_blocks: int, title: str, columns: int = 32) -> Svg:
    """The pool without its null block, a box for each block in the color and with the number of the request that holds it.

    One state is a still picture; x5 is a block with five owners. Several are the frames of a film, in colors only.
    """
    side, parts = WIDTH / columns, []
    owners = [state.block_owners() for state in states]
    for block_id in range(1, num_blocks):
        fills = [COLORS[int(frame[block_id][0]) % 8][0] if block_id in frame else EMPTY for frame in owners]
        names = owners[0].get(block_id, []) if len(states) == 1 else []
        label = names[0] if len(names) == 1 else f"x{len(names)}" if names else ""
        ink = COLORS[int(names[0]) % 8][1] if names else GRAY
        x, y = (block_id - 1) % columns * side, (block_id - 1) // columns * side
        moves = "" if len(set(fills)) == 1 else (f'<animate attributeName="fill" calcMode="discrete" repeatCount="indefinite" '
                                                 f'dur="{len(fills) * FRAME_SECONDS:g}s" values="{";".join(fills)}"/>')
        parts.append(box(x + 1, y + 1, side - 2, side - 2, fills[len(fills) // 2], label, ink, moves, size=10))
    return picture(parts, -(-(num_blocks - 1) // columns) * side, title)


def table(block_ids: Sequence[int], num_tokens: int, block_size: int, num_blocks: int, title: str) -> Svg:
    """Above, a request's logical blocks with the tokens in them; below, memory; an arrow for each entry of the table."""
    side, wide = WIDTH / num_blocks, WIDTH / max(len(block_ids), 6)
    parts = [text(0, 12, "logical order: tokens"), text(0, 168, "memory: block numbers")]
    for index, block_id in enumerate(block_ids):
        fill, ink = COLORS[index % 8]
        first, last = index * block_size, min(num_tokens, (index + 1) * block_size) - 1
        parts.append(box(index * wide + 2, 20, wide - 4, 34, fill, f"{first}-{last}" if last > first else first, ink, size=10))
        start, end = (index + 0.5) * wide, (block_id + 0.5) * side
        parts.append(f'<path d="M{start:.4g} 54 C{start:.4g} 84 {end:.4g} 76 {end:.4g} 106" fill="none" stroke="{fill}" '
                     f'stroke-width="2"/><path d="M{end - 4:.4g} 102 l4 8 l4 -8z" fill="{fill}"/>')
    for block_id in range(num_blocks):
        fill, ink = COLORS[block_ids.index(block_id) % 8] if block_id in block_ids else (EMPTY, GRAY)
        parts.append(box(block_id * side + 1, 112, side - 2, 36, fill, block_id, ink))
    return picture(parts, 176, title)


def timeline(rows: Sequence[tuple[str, Sequence[tuple[int, int, int | None, str]]]], unit: str, title: str) -> Svg:
    """A line for each name, with its bars (start, end, color, label); color None is gray: time that nobody uses."""
    left, height, end = 54.0, 22.0, max(bar[1] for _, bars in rows for bar in bars)
    scale, parts = (WIDTH - left) / end, []
    for number, (name, bars) in enumerate(rows):
        parts.append(text(left - 6, number * height + 15, name, anchor="end"))
        for start, stop, which, label in bars:
            fill, ink = (UNUSED, GRAY) if which is None else COLORS[which % 8]
            y, wide = number * height + 1, (stop - start) * scale
            parts.append(box(left + start * scale, y, wide, height - 2, fill, label, ink, size=11))
    return picture([*parts, axis(left, WIDTH, len(rows) * height, end, unit)], len(rows) * height + 34, title)


def steps(columns: Sequence[Sequence[int]], names: Sequence[str], budget: int | None, title: str, unit: str = "step") -> Svg:
    """A column for each step: its parts stacked, the first at the bottom, and the budget as a dashed line."""
    left, height, most = 40.0, 190.0, max([budget or 0, *map(sum, columns)])
    wide, scale, parts = (WIDTH - left) / len(columns), height / most, [legend(names, left)]
    for number, column in enumerate(columns):
        top = height + 30
        for which, count in enumerate(column):
            top -= count * scale
            if count:
                fill, ink = COLORS[which % 8]
                parts.append(f'<rect x="{left + number * wide:.4g}" y="{top:.4g}" width="{max(wide - 0.5, 0.5):.3g}" '
                             f'height="{count * scale:.4g}" fill="{fill}"/>')
                if wide >= 24 and count * scale >= 12:
                    parts.append(text(left + (number + 0.5) * wide, top + count * scale / 2 + 4, count, fill=ink, anchor="middle"))
    for value, word in {most: "", **({budget: "budget"} if budget else {})}.items():
        y = height + 30 - value * scale
        parts += [f'<path d="M{left} {y:.4g} H{WIDTH}" stroke="{GRAY}" stroke-dasharray="6 4"/>',
                  text(left - 4, y + 4, value, anchor="end"), text(WIDTH - 4, y - 5, word, anchor="end")]
    return picture([*parts, axis(left, WIDTH, height + 30, len(columns), unit)], height + 64, title)


def line(series: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str, title: str) -> Svg:
    """Curves over common axes from 0, each with its last value at its end."""
    left, height, right = 54.0, 200.0, WIDTH - 54
    most_x, most_y = map(max, zip(*(point for points in series.values() for point in points)))
    parts = [legend(list(series), left), text(left, 30, f"{y_name}, up to {number_text(most_y)}", size=11)]
    for number, points in enumerate(series.values()):
        at = [(left + x / most_x * (right - left), height + 38 - y / most_y * height) for x, y in points]
        path = " ".join(f"{x:.4g},{y:.4g}" for x, y in at)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLORS[number % 8][0]}" stroke-width="2.5"/>')
        parts.append(text(at[-1][0] + 5, at[-1][1] + 4, number_text(points[-1][1]), weight=600))
    return picture([*parts, axis(left, right, height + 38, most_x, x_name)], height + 72, title)


def bars(rows: Sequence[tuple[str, float]], title: str, unit: str = "") -> Svg:
    """A bar for each name, as long as its number, with the number behind it."""
    left, most, parts = 10 + 6.8 * max(len(name) for name, _ in rows), max(value for _, value in rows), []
    for number, (name, value) in enumerate(rows):
        y, length = number * 26, value / most * (WIDTH - left - 130)
        parts += [text(left - 6, y + 16, name, anchor="end"), box(left, y + 2, max(length, 1), 20, COLORS[number % 8][0]),
                  text(left + length + 6, y + 16, f"{number_text(value)} {unit}", weight=600)]
    return picture(parts, len(rows) * 26, title)


def triangle(passes: Sequence[Sequence[int]], title: str) -> Svg:
    """A line for each pass over the model, a box for each position that it computes: new, or computed before."""
    left, seen, parts = 60.0, set[int](), [legend(["computed for the first time", "computed again"], 60)]
    side = min((WIDTH - left) / (max(map(max, passes)) + 1), 30.0)
    for number, positions in enumerate(passes):
        parts.append(text(left - 6, 28 + (number + 0.5) * side, f"pass {number + 1}", anchor="end"))
        for position in positions:
            at = left + position * side + 1, 25 + number * side, side - 2, side - 2
            parts.append(box(*at, COLORS[position in seen][0], position, COLORS[position in seen][1], size=11))
        seen.update(positions)
    return picture(parts, 30 + len(passes) * side, title)


def number_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"


def axis(left: float, right: float, y: float, most: float, name: str) -> str:
    """A line from 0 to `most` with four numbers below it and its name at the end."""
    values = [round(share * most) if most >= 4 else share * most for share in (0, 0.25, 0.5, 0.75, 1)]
    labels = [text(left + value / most * (right - left), y + 15, number_text(value),
                   anchor="end" if value == most else "middle", size=11) for value in values]
    name = text((left + right) / 2, y + 30, name, anchor="middle", size=11)
    return f'<path d="M{left:.4g} {y:.4g} H{right:.4g}" stroke="{GRAY}"/>{"".join(labels)}{name}'
