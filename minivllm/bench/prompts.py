"""From drawn token ids to what a server is sent: the ids themselves, or text that has as many tokens.

Owns the tokenizer of the bench. Text is found as vLLM finds it: decode, encode, and mend the length, since the tokens of a
decoded text are not always those that it was made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minivllm.bench.client import Prompt
from minivllm.bench.workload import BenchRequest, Source
from minivllm.exceptions import CheckpointError, ValidationError
from minivllm.weights import resolve_model

MOST_TRIES = 10
EMBEDDED_NAME = "minivllm-tiny"  # what minivllm's own server calls the model inside the package (serve/args.py)


def load_tokenizer(name: str, local_only: bool = True) -> Any:
    """The tokenizer of a folder or a hub id, or the embedded one under its name. Raises `CheckpointError` if there is none.

    With `local_only` a hub id is looked for in the hub's cache and nowhere else: nobody waits for a network that was not asked for.
    """
    from transformers import AutoTokenizer

    source = str(resolve_model(None)) if name == EMBEDDED_NAME else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local_only)
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(f"no usable tokenizer in {source}: {error}") from error
    if not allowed_ids(tokenizer):  # what transformers makes of a folder with a config.json and no tokenizer's files
        raise CheckpointError(f"no usable tokenizer in {source}: its vocabulary is empty")
    return tokenizer


def named_tokenizer(name: str) -> Any:
    """The tokenizer that the user asked for. Raises `ValidationError` rather than take another one."""
    try:
        return load_tokenizer(name, local_only=False)
    except CheckpointError as error:
        raise ValidationError(f"{error}: pass a folder with tokenizer.json, or a hub id", parameter="tokenizer") from error


def tokenizer_of(model: str) -> tuple[Any, str]:
    """The model's tokenizer and its name, where this machine has it; else the embedded one and its."""
    try:
        return load_tokenizer(model), model
    except CheckpointError:
        return load_tokenizer(EMBEDDED_NAME), EMBEDDED_NAME


def allowed_ids(tokenizer: Any) -> list[int]:
    """Every id but the special ones, which a server might read as the end of a turn."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return [token_id for token_id in range(len(tokenizer)) if token_id not in special]


def as_prompts(requests: Sequence[BenchRequest], tokenizer: Any, source: Source, send_token_ids: bool,
               id_prefix: str = "") -> list[Prompt]:
    """What is sent for each request, with the number of tokens that it really has, and its number as request id."""
    prompts = []
    for number, request in enumerate(requests):
        if send_token_ids:
            content: str | list[int] = request.prompt_token_ids
            num_tokens = len(request.prompt_token_ids)
        else:
            content, num_tokens = text_of_length(request.prompt_token_ids, tokenizer, source)
        prompts.append(Prompt(content, num_tokens, request.max_tokens, f"{id_prefix}{number}"))
    return prompts


def text_of_length(token_ids: Sequence[int], tokenizer: Any, source: Source) -> tuple[str, int]:
    """A text that begins as these ids do and has as many tokens, and the number it has if ten tries were not enough."""
    wanted, current = len(token_ids), list(token_ids)
    for _ in range(MOST_TRIES):
        text = tokenizer.decode(current)
        current = tokenizer.encode(text, add_special_tokens=False)
        if len(current) == wanted:
            break
        current = current[:wanted] + source.draw(max(0, wanted - len(current)))
    return text, len(tokenizer.encode(text, add_special_tokens=False))
