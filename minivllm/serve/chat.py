"""POST /v1/chat/completions: a conversation goes on. Owns the shape of messages and of deltas."""

from __future__ import annotations

from typing import Any

from minivllm.request import RequestOutput
from minivllm.serve.answers import Answer, Delta, finish_fields
from minivllm.serve.logprobs import chat_logprobs, prompt_logprobs_json
from minivllm.serve.protocol import ChatBody


class ChatAnswer(Answer):
    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    body: ChatBody

    def role(self) -> str:
        """Who speaks: the assistant, or whoever's message is continued."""
        return self.body.messages[-1].role if self.body.continue_final_message else "assistant"

    def echoed(self) -> str:
        """With `echo`, the last message in front of the answer that continues it (vLLM's meaning of the field in chat)."""
        last = self.body.messages[-1]
        return last.content if self.body.echo and last.role == self.role() and isinstance(last.content, str) else ""

    def choice(self, index: int, output: RequestOutput, delta: Delta) -> dict[str, Any]:
        # The keys of null are vLLM's, so that code written against its answers finds them.
        message = {"role": self.role(), "content": self.echoed() + delta.text, "refusal": None, "annotations": None,
                   "audio": None, "function_call": None, "reasoning": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(delta), **finish_fields(delta),
                "token_ids": delta.token_ids if self.body.return_token_ids else None}

    def extras(self, output: RequestOutput) -> dict[str, Any]:
        return {"prompt_logprobs": prompt_logprobs_json(self.service.names, output.prompt_logprobs),
                "prompt_token_ids": output.prompt_token_ids if self.body.return_token_ids else None}

    def chunk_choices(self, index: int, output: RequestOutput, delta: Delta) -> list[dict[str, Any]]:
        """A token's chunk has `content` even when its text is empty or held back, so that clients can time tokens.

        The first one of a choice is preceded by a chunk that names the role: with the first output, not before it.
        """
        choices = []
        if delta.is_first:
            role: dict[str, Any] = {"index": index, "delta": {"role": self.role(), "content": ""}, "logprobs": None,
                                    "finish_reason": None}
            if self.body.return_token_ids:
                role["prompt_token_ids"] = output.prompt_token_ids
            choices.append(role)
        text = (self.echoed() if delta.is_first else "") + delta.text
        # an end without a token, an abort, has nothing to say but that
        content = {"content": text} if text or delta.token_ids else {}
        choice = {"index": index, "delta": content, "logprobs": self._logprobs(delta), **finish_fields(delta)}
        if self.body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        choices.append(choice)
        return choices

    def plain_choice(self, index: int, text: str) -> str:
        return f'{{"index":{index},"delta":{{"content":{text}}},"logprobs":null,"finish_reason":null,"stop_reason":null}}'

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if delta.logprobs is None:
            return None
        return chat_logprobs(self.service.names, delta.token_ids, delta.logprobs, self.body.top_logprobs or 0,
                             as_ids=bool(self.body.return_tokens_as_token_ids))
