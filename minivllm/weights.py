"""Find a checkpoint, and stream it into the model: every row of every parameter exactly once, or an error that names it.

Owns paths, files and names. Never computes. One load map says where each tensor of the files goes:

    model.layers.0.self_attn.q_proj.weight  ->  (qkv_proj.weight, rows 0:896)
    model.layers.0.self_attn.k_proj.weight  ->  (qkv_proj.weight, rows 896:1024)

Files are mapped, not read: a tensor is copied from the page cache straight into its rows, on the model's device and in its
type, so the process never holds more than the model and the pages of one shard.

    sum of the rows of all targets of a parameter == its rows, without gaps and without overlap

So a model that has loaded has no number left as the memory was; a wrong name in a file is an error and not a random layer.
Only safetensors are read. Pickled weights are programs, and a checkpoint is data. vLLM: model_executor/model_loader/, with more
formats, and loaders that stream from object stores.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import safetensors
import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from tqdm import tqdm

from minivllm.config import DTYPES, ModelConfig
from minivllm.exceptions import CheckpointError, ValidationError
from minivllm.model import Qwen2ForCausalLM

# The top level of a repository: configuration, tokenizer, chat template, weights. Some keep other formats in subfolders.
HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja")
HUB_IGNORED = ("*/*",)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # ours -> the files'
TIED_HEAD = "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")
PROGRESS_BAR_BYTES = 1_000_000_000  # a single file that is smaller is there before a bar could be read


# ---- Find ----


def resolve_model(name_or_path: str | os.PathLike[str] | None = None, revision: str | None = None) -> Path:
    """The folder of a checkpoint: None is the one inside the package, then a local folder, then an id on the Hugging Face hub.

    The hub's cache is asked first and is enough when HF_HUB_OFFLINE=1 or the network is away. MINIVLLM_USE_MODELSCOPE=1
    takes ids from ModelScope instead. Raises `CheckpointError` that says what to do.
    """
    if name_or_path is None:
        return _embedded_model()
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{name} is a file: give the folder that holds config.json and {WEIGHTS}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith((".", "~")):
        raise CheckpointError(f"{name!r} does not exist: give a model folder, or an id such as Qwen/Qwen2.5-0.5B-Instruct")
    if os.environ.get("MINIVLLM_USE_MODELSCOPE", "0").lower() in ("1", "true"):
        return _from_modelscope(name, revision)
    return _from_hub(name, revision)


def _embedded_model() -> Path:
    """By importlib.resources, because a learner's copy of this module lies elsewhere (exercises.py)."""
    folder = Path(str(importlib.resources.files("minivllm") / "tiny" / "model"))
    if not folder.is_dir():
        raise CheckpointError(f"the embedded checkpoint is missing from {folder}: reinstall minivllm, or name a model")
    return folder


def _from_hub(name: str, revision: str | None) -> Path:
    """The hub's client keeps whole snapshots and asks the hub whether there is a newer one; offline it takes the newest it has."""
    try:
        return Path(huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(HUB_PATTERNS), ignore_patterns=list(HUB_IGNORED)))
    except (OSError, HFValidationError) as error:  # every answer of the hub, and its silence, is an OSError
        at = f" at revision {revision}" if revision else ""
        cache = huggingface_hub.constants.HF_HUB_CACHE
        raise CheckpointError(
            f"{name}{at} is no local folder, is not in the hub's cache ({cache}), and cannot be downloaded "
            f"({type(error).__name__}: {' '.join(str(error).split())}). Check the name, unset HF_HUB_OFFLINE, log in "
            f"with `hf auth login` for a gated model, or download it elsewhere and pass the folder.") from error


def _from_modelscope(name: str, revision: str | None) -> Path:
    """The same files under the same ids, for those whom the hub does not reach."""
    try:
        import modelscope
    except ImportError as error:
        raise CheckpointError("MINIVLLM_USE_MODELSCOPE is set: pip install modelscope, or unset it") from error
    try:
        return Path(modelscope.snapshot_download(
            name, revision=revision, allow_patterns=list(HUB_PATTERNS), ignore_patterns=list(HUB_IGNORED)))
    except Exception as error:  # its errors have no common base
        raise CheckpointError(f"ModelScope cannot provide {name}: {type(error).__name__}: {error}") from error


# ---- Load ----


class Target(NamedTuple):
    """Where one tensor of the files goes: these rows of this parameter."""

    parameter: Tensor
    rows: slice

    @property
    def view(self) -> Tensor:
        """These rows, not a copy: writing to them writes the parameter."""
        return self.parameter[self.rows]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.view.shape)


def load_map(model: Qwen2ForCausalLM) -> dict[str, Target]:
    """Checkpoint name -> (parameter, rows), for every tensor that must be in the files. Together they cover each row once.

    A tied `lm_head` is no parameter of its own and is not in the map.
    """
    config = model.config
    kv_rows = config.num_key_value_heads * config.head_dim
    rows = {"q_proj": config.num_attention_heads * config.head_dim, "k_proj": kv_rows, "v_proj": kv_rows,
            "gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
    targets = {}
    for name, parameter in model.named_parameters():
        module, start = name.split(".")[-2], 0  # "model.layers.0.self_attn.qkv_proj.weight" -> "qkv_proj"
        # A fused matrix is its parts, one below the other, in the order of FUSED; any other is one part, all of its rows.
        for part in FUSED.get(module, (module,)):
            stop = start + rows.get(part, parameter.shape[0])
            targets[name.replace(module, part)] = Target(parameter, slice(start, stop))
            start = stop
    return targets


def load_model(folder: str | os.PathLike[str], dtype: str | torch.dtype = "auto",
               device: torch.device | str = "cpu") -> Qwen2ForCausalLM:
    """The model of a folder, with its weights. Raises `CheckpointError` unless files and model agree tensor by tensor.

    All names and shapes are compared before the first byte of weights is read.
    """
    folder = Path(folder)
    config = ModelConfig.from_folder(folder)
    shards = {file: read_header(file) for file in find_weight_files(folder)}  # in the order in which they are read
    model = Qwen2ForCausalLM(config, dtype=resolve_dtype(dtype, config, device), device=device)
    targets = load_map(model)
    check_headers(folder, shards, targets, config.tie_word_embeddings)
    is_quiet = len(shards) == 1 and sum(file.stat().st_size for file in shards) < PROGRESS_BAR_BYTES
    with tqdm(desc="Loading weights", total=len(targets), unit=" tensors", disable=is_quiet) as progress:
        for file in shards:
            with open_shard(file) as shard:
                for name in filter(targets.__contains__, shards[file]):  # the known extras are left out
                    targets[name].view.copy_(shard.get_tensor(name))  # converts to the parameter's type, and goes to its device
                    progress.update()
    if config.tie_word_embeddings:
        _check_tied_head(shards, targets["model.embed_tokens.weight"].parameter)
    return model


def load_dummy_model(config: ModelConfig, dtype: str | torch.dtype = "auto", device: torch.device | str = "cpu",
                     seed: int = 0) -> Qwen2ForCausalLM:
    """Random weights in the true shape, for `load_format="dummy"`: text depends on their values, speed hardly.

    Norms are 1, so that numbers neither vanish nor overflow on their way through the layers.
    """
    model = Qwen2ForCausalLM(config, dtype=resolve_dtype(dtype, config, device), device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02, generator=generator)
    return model


def resolve_dtype(requested: str | torch.dtype, config: ModelConfig, device: torch.device | str) -> torch.dtype:
    """The type to compute in. "auto" is float32 on a CPU, where half types are slow, and the checkpoint's own elsewhere.

    vLLM's "auto" turns a float32 checkpoint into a half type. Here it stays what it is: exactness is a promise.
    """
    if isinstance(requested, torch.dtype):
        return requested
    if requested not in DTYPES:
        choices = ", ".join(DTYPES)
        raise ValidationError(f"dtype must be one of {choices}, got {requested!r}", parameter="dtype", value=requested)
    if requested != "auto":
        return getattr(torch, requested)
    if torch.device(device).type == "cpu":
        return torch.float32
    if config.torch_dtype is None:
        raise ValidationError('config.json names no dtype for dtype="auto" to follow: pass one, such as dtype="bfloat16"',
                              parameter="dtype", value="auto")
    return getattr(torch, config.torch_dtype)


# ---- Files ----


def find_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the one, else those of the index (transformers' order, where both are there)."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _indexed_files(folder / INDEX)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise CheckpointError(f"{folder} has only pickled weights (.bin), which may run code when they are read. Convert them: "
                              f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors")
    found = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
    raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}; it holds {found}")


def _indexed_files(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        # `.name` cuts any folder off: an index that came with a checkpoint must not name a file outside of it.
        names = sorted({Path(name).name for name in weight_map.values()})  # shards lie beside their index
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} cannot be read as an index of shards: {error!r}") from error
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(f"{index.parent} lacks {_some(absent)}, of {len(names)} shards in its index: download again")
    return [index.parent / name for name in names]


@contextmanager
def open_shard(file: Path) -> Iterator[Any]:
    """Map a safetensors file. Whatever is wrong with it becomes a `CheckpointError` that names it.

    A download that broke off is found here: the header says how long the file must be.
    """
    try:
        with safetensors.safe_open(file, framework="pt") as shard:
            yield shard
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no complete safetensors file ({error}): download it again") from error


Header = dict[str, tuple[tuple[int, ...], str]]  # tensor name -> (shape, dtype)


def read_header(file: Path) -> Header:
    """Names, shapes and types of a shard's tensors, without their data: kilobytes of a file of gigabytes."""
    with open_shard(file) as shard:
        slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118  (a shard is no dict)
        return {name: (tuple(piece.get_shape()), piece.get_dtype()) for name, piece in slices.items()}


def check_headers(folder: Path, shards: dict[Path, Header], targets: dict[str, Target], is_tied: bool) -> None:
    """Raise one `CheckpointError` with everything that is missing, unexpected, given twice, wrongly shaped or not a float.

    Two extras are known and harmless: RoPE's frequencies, which old checkpoints carry, and the head of a tied model
    (`_check_tied_head` looks at its values).
    """
    seen = Counter(name for header in shards.values() for name in header)
    wrong = {"lacks": [name for name in targets if name not in seen],
             "gives more than once": [name for name, times in seen.items() if times > 1]}
    unexpected = [name for name in seen if name not in targets and not name.endswith("rotary_emb.inv_freq")]
    wrong["has, beyond what its config describes,"] = [name for name in unexpected if not (is_tied and name == TIED_HEAD)]
    given = {name: entry for header in shards.values() for name, entry in header.items() if name in targets}
    wrong["has in the wrong shape"] = [f"{name} {shape} instead of {targets[name].shape}"
                                       for name, (shape, _) in given.items() if shape != targets[name].shape]
    wrong["has in a type other than " + "/".join(FLOATS)] = [
        f"{name} ({dtype})" for name, (_, dtype) in given.items() if dtype not in FLOATS]
    if problems := [f"{problem} {_some(names)}" for problem, names in wrong.items() if names]:
        raise CheckpointError(f"{folder} {'; it '.join(problems)}. Are config.json and the weights of one model, and complete?")


def _check_tied_head(shards: dict[Path, Header], embedding: Tensor) -> None:
    """A tied model's head is the embedding. A head of its own in the files must be equal (else transformers unties them)."""
    for file in (file for file, header in shards.items() if TIED_HEAD in header):
        with open_shard(file) as shard:
            head = shard.get_tensor(TIED_HEAD)
        # In the embedding's type: a float32 head beside a bfloat16 model is the same head.
        if head.shape != embedding.shape or not torch.equal(head.to(embedding), embedding):
            # Which of the two the model was trained with nobody can tell, and text from the wrong one would look almost right.
            raise CheckpointError(f"{file}: {TIED_HEAD} differs from model.embed_tokens.weight, though config.json says "
                                  f"tie_word_embeddings=true: one of the two is wrong; set it to false to use both")


def _some(names: Sequence[str], limit: int = 10) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
