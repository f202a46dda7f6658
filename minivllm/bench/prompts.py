"""From drawn token ids to what a server is sent: the ids themselves, or text that has as many tokens.

Owns the tokenizer of the bench. Text is found as vLLM finds it: decode, encode, and mend the length, since the tokens of a
decoded text are not always those that it was made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minivllm.bench.client import Prompt
from minivllm.bench.workload import BenchRequest, Source
from minivllm.exceptions import CheckpointError
from minivllm.weights import resolve_model

MOST_TRIES = 10


def load_tokenizer(tokenizer: str | None, model: str | None) -> Any:
    """The one that was named, else the model's if that is a folder here, else the embedded one."""
    from transformers import AutoTokenizer

    if tokenizer is None and model is not None and Path(model).is_dir():
        tokenizer = model
    source = str(resolve_model(None)) if tokenizer is None else tokenizer
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(f"no usable tokenizer in {source}: {error}: pass --tokenizer FOLDER") from error


def allowed_ids(tokenizer: Any) -> list[int]:
    """Every id but the special ones, which a server might read as the end of a turn."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return [token_id for token_id in range(len(tokenizer)) if token_id not in special]


def as_prompts(requests: Sequence[BenchRequest], tokenizer: Any, source: Source, send_token_ids: bool) -> list[Prompt]:
    """What is sent for each request, with the number of tokens that it really has."""
    prompts = []
    for request in requests:
        if send_token_ids:
            prompts.append(Prompt(request.prompt_token_ids, len(request.prompt_token_ids), request.max_tokens))
        else:
            text, num_tokens = text_of_length(request.prompt_token_ids, tokenizer, source)
            prompts.append(Prompt(text, num_tokens, request.max_tokens))
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
