"""Lesson 14. What torch.compile has made is kept between starts: 30 s of compiling happen once a machine, not once a start.

Owns the choice of one folder. torch keeps its compiled kernels in /tmp, which a reboot or a container's end empties. Here they go

    TORCHINDUCTOR_CACHE_DIR                  if it is set: torch's own variable, and Triton's kernels follow it
    MINIVLLM_CACHE_ROOT/torch_compile        (vLLM: VLLM_CACHE_ROOT)
    XDG_CACHE_HOME/minivllm/torch_compile    default: ~/.cache/minivllm/torch_compile

and where that cannot be written, to torch's default. A folder may serve any number of models and versions: torch names what it
keeps by a hash of all that it was made from.

Here the compiler is imported as well, and with it its workers begin: processes that turn Triton's code into the GPU's.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger("minivllm")
VARIABLE, WORKERS = "TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"
# torch would have one for each core. A function here has one to five kernels, and the first kernel of every worker takes longer:
# with 16 of them a cold start of 0.5B took 9 s more than with 5, and with 3 as long as with 5.
NUM_WORKERS = "4"


class CompileCache:
    """The folder, set up before anything is compiled or looked for. torch reads the variable whenever it needs it."""

    def __init__(self) -> None:
        os.environ.setdefault(WORKERS, NUM_WORKERS)  # torch reads it once, when the compiler is imported
        from torch._inductor import compile_fx  # noqa: F401 - two seconds, six from a slow disk
        from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

        if wished_folder() is None:
            try:
                os.environ[VARIABLE] = str(writable_folder())
            except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
                logger.warning("compiled kernels are kept in %s and may be lost: %s. Set MINIVLLM_CACHE_ROOT to a folder that can "
                               "be written", default_cache_dir(), error)
        self.folder = Path(cache_dir())
        self.num_before = self.num_compiled()

    def num_compiled(self) -> int:
        return len(list(self.folder.glob("fxgraph/*/*")))

    def describe(self) -> str:
        """The folder, and whether all that was compiled since lay there already."""
        added = self.num_compiled() - self.num_before
        return f"{self.folder} ({f'cold: {added} functions added' if added or not self.num_before else 'warm'})"


def wished_folder() -> str | None:
    """What torch's variable says, if somebody has set it. None for /tmp/torchinductor_USER: torch sets that itself when its
    compiler is imported, and processes that are started from there inherit it.
    """
    folder = os.environ.get(VARIABLE) or None
    return None if folder and Path(folder).absolute().match(f"{tempfile.gettempdir()}/torchinductor_*") else folder


def writable_folder() -> Path:
    """Make the folder that the environment names, and prove that files can be written there. Raises `OSError` if not."""
    root = os.environ.get("MINIVLLM_CACHE_ROOT")
    home = os.environ.get("XDG_CACHE_HOME")
    folder = Path(root or Path(home or Path.home() / ".cache") / "minivllm").expanduser().absolute() / "torch_compile"
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    return folder
