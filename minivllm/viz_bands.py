"""Pictures made of bands: what each guess became, and what a sum is made of.

Owns two drawings that only the last lessons need; how things look is decided in viz.py. Never runs a model, and draws only numbers
that were counted or, from the ledger, measured.

    ribbons(rows, "step", title)      for each request and step: drafts accepted, the model's own token, drafts refused
    stacks(rows, names, "ms", title)  for each name a bar of several parts, with the sum behind it
"""

from __future__ import annotations

from collections.abc import Sequence

from minivllm.viz import COLORS, GRAY, UNUSED, WIDTH, Svg, axis, box, legend, number_text, picture, text

GUESS = ("draft accepted", "the model's own token", "draft refused")


def ribbons(rows: Sequence[tuple[str, Sequence[tuple[int, int, int]]]], unit: str, title: str) -> Svg:
    """A line for each request and a column for each step; in it as many units as tokens were computed, numbers in the bands."""
    left, height, columns = 70.0, 24.0, max(len(row) for _, row in rows)
    most = max(sum(cell) for _, row in rows for cell in row)
    wide = (WIDTH - left) / columns
    width, parts = (wide - 6) / most, [legend(GUESS[:2], left)]
    parts += [box(left + 290, 0, 12, 12, UNUSED), text(left + 307, 10, GUESS[2])]
    for number, (name, row) in enumerate(rows):
        y = 22 + number * height
        parts.append(text(left - 6, y + 15, name, anchor="end"))
        for column, cell in enumerate(row):
            x = left + column * wide + 3
            for which, count in enumerate(cell):
                fill, ink = COLORS[which] if which < 2 else (UNUSED, GRAY)
                if count:
                    parts.append(box(x, y + 2, count * width, height - 5, fill, count, ink, size=11))
                x += count * width
    bottom = 22 + len(rows) * height
    return picture([*parts, axis(left, WIDTH, bottom, columns, unit)], bottom + 34, title)


def stacks(rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], unit: str, title: str) -> Svg:
    """A bar for each row, whose parts have the colors of `names` and their numbers inside, and its sum behind it."""
    left, most = 16 + 6.8 * max(len(name) for name, _ in rows), max(sum(values) for _, values in rows)
    scale, parts, x, y = (WIDTH - left - 84) / most, list[str](), 4.0, 0.0
    for which, name in enumerate(names):  # the legend, in as many lines as it takes
        if x + 34 + 6.6 * len(name) > WIDTH:
            x, y = 4.0, y + 20
        parts += [box(x, y, 12, 12, COLORS[which % 8][0]), text(x + 17, y + 10, name)]
        x += 34 + 6.6 * len(name)
    for number, (name, values) in enumerate(rows):
        top, x = y + 26 + number * 30, left
        parts.append(text(left - 6, top + 17, name, anchor="end"))
        for which, value in enumerate(values):
            fill, ink = COLORS[which % 8]
            parts.append(box(x, top, value * scale, 24, fill, number_text(value), ink, size=11))
            x += value * scale
        parts.append(text(x + 6, top + 17, f"{number_text(sum(values))} {unit}", weight=600))
    return picture(parts, y + 26 + len(rows) * 30, title)
