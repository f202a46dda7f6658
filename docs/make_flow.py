"""Writes docs/images/flow.svg: the modules that a request passes, as boxes, and who calls whom, as arrows.

    python docs/make_flow.py

Every solid arrow is an import; tests/test_site.py checks that it is there, so the picture cannot show what the code does not do.
"""

from __future__ import annotations

from pathlib import Path

PICTURE = Path(__file__).parent / "images" / "flow.svg"
WIDTH, HEIGHT, BOX_WIDTH, BOX_HEIGHT = 940, 560, 172, 56
COLUMNS, ROWS = (4, 194, 384, 574, 764), (14, 104, 194, 300, 394, 488)

# name: (column, row, what it does, color)
BOXES = {
    "llm": (0, 0, "LLM.generate, LLM.chat", "#d9e6f7"),
    "serve.app": (1, 0, "routes, order of checks", "#d9e6f7"),
    "serve.service": (2, 0, "one engine, its names", "#d9e6f7"),
    "async_engine": (2, 1, "a thread, queues, streams", "#d9e6f7"),
    "engine": (1, 2, "schedule, run, update", "#fbe3bd"),
    "input_processor": (0, 3, "a prompt, checked", "#d5efe3"),
    "scheduler": (1, 3, "tokens for each request", "#d5efe3"),
    "model_runner": (2, 3, "a schedule, as tensors", "#d5efe3"),
    "step_sampler": (3, 3, "who samples, and how", "#d5efe3"),
    "output_processor": (4, 3, "tokens, as answers", "#d5efe3"),
    "request_queue": (0, 4, "who waits, in order", "#efe0f0"),
    "kv_cache": (1, 4, "block tables, prefix hits", "#efe0f0"),
    "model": (2, 4, "Qwen2, layer by layer", "#efe0f0"),
    "sampler": (3, 4, "logits to a token", "#efe0f0"),
    "detokenizer": (4, 4, "text, stop strings", "#efe0f0"),
    "block_pool": (1, 5, "numbered pages", "#efe0f0"),
    "attention": (2, 5, "through the block table", "#efe0f0"),
}
ARROWS = (  # who imports whom
    ("llm", "engine"), ("serve.app", "serve.service"), ("async_engine", "engine"),
    ("engine", "input_processor"), ("engine", "scheduler"), ("engine", "model_runner"), ("engine", "output_processor"),
    ("scheduler", "request_queue"), ("scheduler", "kv_cache"), ("model_runner", "model"), ("model_runner", "step_sampler"),
    ("step_sampler", "sampler"), ("output_processor", "detokenizer"), ("kv_cache", "block_pool"),
)
CALLS = (("serve.service", "async_engine"), ("model", "attention"))  # who calls whom through an interface: dashed


def box(name: str) -> str:
    column, row, text, color = BOXES[name]
    x, y, middle = COLUMNS[column], ROWS[row], COLUMNS[column] + BOX_WIDTH // 2
    return (f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="{color}" stroke="#888"/>'
            f'<text x="{middle}" y="{y + 24}" class="name">{name}</text><text x="{middle}" y="{y + 43}">{text}</text>')


def arrow(start: str, end: str, style: str = "") -> str:
    """From the lower edge of one box to the upper edge of another, or from side to side in one row."""
    (from_column, from_row, *_), (to_column, to_row, *_) = BOXES[start], BOXES[end]
    if from_row == to_row:
        x1, y1 = COLUMNS[from_column] + BOX_WIDTH, ROWS[from_row] + BOX_HEIGHT // 2
        x2, y2 = COLUMNS[to_column], y1
    else:
        shift = 30 * (to_column - from_column)
        x1, y1 = COLUMNS[from_column] + BOX_WIDTH // 2 + max(-60, min(60, shift)), ROWS[from_row] + BOX_HEIGHT
        x2, y2 = COLUMNS[to_column] + BOX_WIDTH // 2, ROWS[to_row]
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"{style} marker-end="url(#head)"/>'


def picture() -> str:
    dashed = ' stroke-dasharray="5 4"'
    arrows = [arrow(*ends) for ends in ARROWS] + [arrow(*ends, dashed) for ends in CALLS]
    body = "\n".join(arrows + [box(name) for name in BOXES])
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">
<title>The modules that a request passes</title>
<style>text {{ font: 12px system-ui, sans-serif; text-anchor: middle; fill: #333 }}
.name {{ font-weight: 600; font-size: 14px; fill: #111 }}
line {{ stroke: #888; stroke-width: 1.6 }}</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0,0 L8,4 L0,8 z" fill="#888"/></marker></defs>
{body}
</svg>
"""


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
