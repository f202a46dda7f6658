"""Writes docs/api.md from the code that reads the bodies, so that the page cannot promise what the server does not do.

    python docs/make_api.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from minivllm.sampling_params import MAX_BAD_WORDS, MAX_N, MAX_STOP_STRINGS, SamplingParams
from minivllm.serve.fields import ACCEPTED, ADVICE, REFUSED
from minivllm.serve.prompts import MAX_PROMPTS
from minivllm.serve.protocol import ChatBody, CompletionBody, DetokenizeBody, GenerationBody, TokenizeBody
from minivllm.serve.sampling import COMPLETION_MAX_TOKENS

PAGE = Path(__file__).parent / "api.md"
HEAD = """<!-- Written by docs/make_api.py: change the code, then run it. -->
# The HTTP API

The server speaks OpenAI's API with vLLM's extras. Bodies are JSON (`Content-Type: application/json`); `null` means "left out"
everywhere. `/openapi.json` is the same for programs, and `/docs` shows it in a browser.

| Route | What it does |
|---|---|
| `POST /v1/completions` | a text goes on |
| `POST /v1/chat/completions` | a conversation goes on |
| `POST /tokenize`, `POST /detokenize` | text or a conversation to token ids, and back |
| `GET /v1/models` | one card for each served name |
| `GET /health`, `GET` or `POST /ping` | 200, or 503 once the engine has failed or the server is ending; no key needed |
| `GET /` | the [live page](live_page.md) in a browser; no key needed, what it then asks for does |
| `GET /trace` | the engine's flight records from now on, as server-sent events |
| `GET /control` | whether the engine may be held, and is |
| `POST /control/pause`, `/control/step`, `/control/resume` | hold it, if the server runs with `--step-control` |
| `GET /version`, `GET /metrics` | the version; numbers for Prometheus ([operations](operations.md)); no key needed |

An error is `{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}`: `param` names the field at fault and `code` is
the HTTP status. 400: a field is wrong; 401 (`{"error": "Unauthorized"}`): no valid key; 404: unknown model; 413: body too large;
503: busy, with `Retry-After`, or shutting down; 500: our failure. An error after the first chunk of a stream is an event of that
shape, then `[DONE]`.

A sampling field that is left out comes from the checkpoint's generation_config.json, unless the server runs with
`--generation-config none`; then from the default in the table.
"""
# what a type does not say; the checks are SamplingParams', sampling.py's and prompts.py's
LIMITS = {
    "prompt": f"a string, strings, token ids, or lists of token ids; at most {MAX_PROMPTS} prompts; not empty",
    "messages": "at least one; `content` is text or a list of text parts; other keys go to the template",
    "max_tokens": f"at least 1, at most the context; completions: {COMPLETION_MAX_TOKENS}, and 0 with `echo` scores the prompt; "
                  "chat: the rest of the context",
    "max_completion_tokens": "chat's newer name, which wins over `max_tokens`",
    "n": f"1 to {MAX_N:,}, times the number of prompts; needs a temperature above 0",
    "temperature": "0 to 2; 0 is greedy", "top_p": "above 0, at most 1", "top_k": "-1 or more; 0 and -1: all", "min_p": "0 to 1",
    "presence_penalty": "-2 to 2", "frequency_penalty": "-2 to 2", "repetition_penalty": "above 0",
    "seed": "64 bits; -1: none", "stop": f"a string or at most {MAX_STOP_STRINGS}, none empty",
    "stop_token_ids": "ids of the vocabulary", "allowed_token_ids": "ids of the vocabulary, not empty",
    "logit_bias": "{token id: -100 to 100}", "bad_words": f"at most {MAX_BAD_WORDS}",
    "min_tokens": "0 to `max_tokens`", "prompt_logprobs": "0 to `--max-logprobs` (20), not in a stream",
    "logprobs": "completions: 0 to `--max-logprobs` (20); chat: true or false",
    "top_logprobs": "0 to `--max-logprobs` (20), -1 for all if allowed; needs `logprobs`",
    "stream_options": "only with `stream`: `include_usage`, and with it `continuous_usage_stats`",
    "truncate_prompt_tokens": "-1 (as much as fits) or 1 to the context",
    "truncation_side": "`left` keeps the end, `right` the beginning",
    "cache_salt": "1 to 128 characters: shares cached prefixes with equal salts only",
    "request_id": "1 to 256 characters; the header X-Request-Id wins", "model": "a served name; left out: the served one",
    "tools": "shown to the template; with `tool_choice` \"none\" only, as nothing is parsed from the answer",
    "tool_choice": "`none`; `auto`, `required` and a name only without tools to choose from",
    "chat_template_kwargs": "further variables for the template; not those that other fields set",
    "add_special_tokens": "texts: true; conversations: false, since templates write them",
    "add_generation_prompt": "default true", "continue_final_message": "not together with `add_generation_prompt`",
    "echo": "the prompt (chat: the last message that is continued) in front of the answer",
    "tokens": "ids of the vocabulary", "return_token_strs": "the tokens as the vocabulary spells them",
    "return_token_ids": "adds ids to choices", "return_tokens_as_token_ids": "logprobs show `token_id:5`",
    "skip_special_tokens": "leaves them out of the text", "include_stop_str_in_output": "leaves the stop string in the text",
    "ignore_eos": "goes on behind the end-of-text tokens",
    "stream": "server-sent events, one chunk per choice and token",
}


def type_of(schema: dict[str, Any]) -> str:
    """A JSON schema in a word or two."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(type_of(one) for one in schema["anyOf"] if one != {"type": "null"}))
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {type_of(schema.get('items', {}))}"
    return str(schema.get("type") or ("object" if "$ref" in schema else "any"))


def default_of(name: str) -> str:
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    value = None if name in ("max_tokens", "logprobs") else defaults.get(name)
    return "" if value is None else str(value).lower()


def fields_table(model: type[BaseModel], names: list[str]) -> str:
    properties = model.model_json_schema()["properties"]
    rows = [f"| `{name}` | {type_of(properties[name])} | {default_of(name)} | {LIMITS[name]} |" for name in names]
    return "\n".join(["| Field | Type | Default | Limits and meaning |", "|---|---|---|---|", *rows])


def page() -> str:
    """The whole page."""
    parts, common = [HEAD], GenerationBody.model_fields
    for title, model in (("Fields of completions and of chat", GenerationBody), ("Completions only", CompletionBody),
                         ("Chat only", ChatBody), ("/tokenize", TokenizeBody), ("/detokenize", DetokenizeBody)):
        shown = [name for name in model.model_fields if not title.endswith("only") or name not in common]
        parts.append(f"## {title}\n\n{fields_table(model, shown)}\n")
    accepted = [f"| `{name}` | {why} |" for name, why in ACCEPTED.items()]
    parts.append("\n".join(["## Accepted, and without effect\n", "| Field | Why it changes nothing |", "|---|---|", *accepted, ""]))
    refused = [f"| `{name}` | {', '.join(f'`{value}`' for value in neutral)} | {ADVICE.get(name, '')} |"
               for name, neutral in REFUSED.items()]
    parts.append("## Refused by name\n\nThese would change the answer and are not implemented. Null and the values of the second "
                 "column ask for nothing and pass\n(`best_of` also when it equals `n`).\n")
    parts.append("\n".join(["| Field | Passes | Instead |", "|---|---|---|", *refused, ""]))
    parts.append("## Any other field\n\nis a 400 that names the nearest known field, as it is most likely a typing mistake. With "
                 "`--ignore-unknown-fields` it is\nlogged instead.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
