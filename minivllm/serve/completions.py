"""POST /v1/completions: text goes on. Owns the shape of its choices, and `echo`, which puts the prompt in front."""

from __future__ import annotations

from typing import Any

from minivllm.request import RequestOutput
from minivllm.serve.answers import Answer, Delta, finish_fields
from minivllm.serve.logprobs import CompletionLogprobs, Entries, TextOffsets, prompt_logprobs_json
from minivllm.serve.prompts import Prompt
from minivllm.serve.protocol import CompletionBody


class CompletionAnswer(Answer):
    """`choices` is flat over prompts and their n answers: index = prompt * n + i."""

    id_prefix = "cmpl"
    object_name = chunk_name = "text_completion"
    body: CompletionBody

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.is_scoring = bool(self.body.echo) and self.body.max_tokens == 0
        self.wants_prompt = self.body.prompt_logprobs is not None  # echo asks the engine for them on its own account
        self._logprobs: dict[int, CompletionLogprobs] = {}  # by choice: offsets go on through a stream

    def count_tokens(self, delta: Delta) -> int:
        return 0 if self.is_scoring else len(delta.token_ids)

    def choice(self, index: int, output: RequestOutput, delta: Delta) -> dict[str, Any]:
        asked = bool(self.body.return_token_ids)
        return {
            **self._common(index, output, delta),
            "token_ids": delta.token_ids if asked else None,
            "prompt_logprobs": prompt_logprobs_json(self.service.names, output.prompt_logprobs) if self.wants_prompt else None,
            "prompt_token_ids": output.prompt_token_ids if asked else None,
        }

    def chunk_choices(self, index: int, output: RequestOutput, delta: Delta) -> list[dict[str, Any]]:
        choice = self._common(index, output, delta)
        if self.body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if delta.is_first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        return [choice]

    def plain_choice(self, index: int, text: str) -> str:
        return f'{{"index":{index},"text":{text},"logprobs":null,"finish_reason":null,"stop_reason":null}}'

    def _common(self, index: int, output: RequestOutput, delta: Delta) -> dict[str, Any]:
        if self.is_scoring:  # the one sampled token is not part of the answer
            delta = Delta("", [], None if delta.logprobs is None else [], delta.finish_reason, None, delta.is_first)
        echoed = self.echo_text(self.prompts[index // self.n]) if self.body.echo and delta.is_first else ""
        return {"index": index, "text": echoed + delta.text, "logprobs": self._write_logprobs(index, output, delta),
                **finish_fields(delta)}

    def echo_text(self, prompt: Prompt) -> str:
        """The prompt as it was sent; of token ids, or of a prompt that was cut, what they spell."""
        if prompt.text is not None and self.body.truncate_prompt_tokens is None:
            return prompt.text
        return self.service.tokenizer.decode(prompt.token_ids)

    def _write_logprobs(self, index: int, output: RequestOutput, delta: Delta) -> dict[str, Any] | None:
        if self.body.logprobs is None or delta.logprobs is None:
            return None
        parts: list[dict[str, list[Any]]] = []
        if self.body.echo and delta.is_first:
            entries: Entries = output.prompt_logprobs or []
            offsets = TextOffsets(self.service.tokenizer, 0, skip_special_tokens=False)
            parts.append(self._writer(offsets).write(output.prompt_token_ids, entries))
        if index not in self._logprobs:
            prompt = self.prompts[index // self.n]
            start = len(self.echo_text(prompt)) if self.body.echo else 0
            self._logprobs[index] = self._writer(TextOffsets(self.service.tokenizer, start,
                                                             skip_special_tokens=self.body.skip_special_tokens is not False))
        parts.append(self._logprobs[index].write(delta.token_ids, delta.logprobs))
        return {key: [value for part in parts for value in part[key]] for key in parts[0]}

    def _writer(self, offsets: TextOffsets) -> CompletionLogprobs:
        return CompletionLogprobs(self.service.names, offsets, as_ids=bool(self.body.return_tokens_as_token_ids))
