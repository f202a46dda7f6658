"""What becomes of the body fields that no request model reads: accepted, refused, or unknown.

Nothing is ignored in silence. A field of OpenAI's or vLLM's API that cannot change an answer here is accepted; one that
would, and is not implemented, is refused by name unless it holds a value that asks for nothing; any other name is a typing
mistake, and the error says what was probably meant.

    {"max_token": 5}  ->  400 "unknown field `max_token`: did you mean `max_tokens`?"
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from minivllm.engine_args import nearest_name
from minivllm.serve.errors import ApiError

logger = logging.getLogger("minivllm.serve")

# name -> why it changes nothing
ACCEPTED: dict[str, str] = {
    "user": "who asks does not matter to the model",
    "safety_identifier": "who asks does not matter to the model",
    "metadata": "nothing is stored",
    "store": "nothing is stored",
    "service_tier": "there is one tier",
    "moderation": "no moderation model runs",
    "prompt_cache_key": "the prefix cache finds equal prompts by itself",
    "prompt_cache_options": "the prefix cache finds equal prompts by itself",
    "prompt_cache_retention": "blocks stay cached until their room is needed",
    "prediction": "a hint for speed only",
    "parallel_tool_calls": "no tool call is parsed",
    "reasoning_effort": "Qwen2 has no reasoning mode",
    "include_reasoning": "Qwen2 has no reasoning mode",
    "thinking_token_budget": "Qwen2 has no reasoning mode",
    "length_penalty": "used by beam search only",
    "spaces_between_special_tokens": "fast tokenizers add none",
}

# name -> the values that ask for nothing, besides null
REFUSED: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "best_of": (1,),  # and n, see check_fields
    "use_beam_search": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "prompt_embeds": (),
    "priority": (0,),
    "logits_processors": ([],),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
    "max_repetition_pattern_size": (0,),
    "min_repetition_pattern_size": (0,),
    "repetition_min_count": (0,),
    "repetition_detection": (),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "modalities": (["text"],),
    "audio": (),
    "functions": (),
    "function_call": ("none",),
    "web_search_options": (),
    "verbosity": ("medium",),
    "documents": ([],),
    "chat_template": (),
}
ADVICE = {
    "chat_template": "start the server with --chat-template instead",
    "response_format": "only {\"type\": \"text\"} is: ask for the format in the prompt",
    "functions": "use `tools` with tool_choice \"none\"",
    "prompt_embeds": "send text or token ids as `prompt`",
}


def check_fields(extra: dict[str, Any], known: Iterable[str], *, n: int = 1, ignore_unknown: bool = False) -> None:
    """Raise `ApiError` for the first field that is refused or unknown. `known` are the fields that the request model reads."""
    for name, value in extra.items():
        if name in REFUSED:
            if value is not None and value not in REFUSED[name] and not (name == "best_of" and value == n):
                raise ApiError(f"`{name}` is not implemented: {ADVICE.get(name, 'leave it out')}", param=name)
        elif name not in ACCEPTED:
            if not ignore_unknown:
                meant = nearest_name(name[:100], [*known, *ACCEPTED, *REFUSED])
                raise ApiError(f"unknown field `{name[:100]}`{meant}", param=name[:100])
            logger.warning("ignored the unknown body field %r", name[:100])
