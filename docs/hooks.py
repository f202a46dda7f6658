"""What the site takes from the package as it is built: the viewer of the live page, for the recorded traces, and raw files.

mkdocs calls `on_post_build` when it has written the pages.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
VIEWER = DOCS.parent / "minivllm" / "serve" / "static"


def on_post_build(config: Any) -> None:
    site = Path(config["site_dir"])
    for file in VIEWER.iterdir():
        if file.suffix in (".js", ".css"):
            shutil.copy(file, site / "trace" / file.name)
    shutil.copytree(DOCS / "ledger", site / "ledger", dirs_exist_ok=True)
