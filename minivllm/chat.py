"""From a conversation to a prompt: the checkpoint's chat template, rendered by transformers' own sandboxed Jinja.

Owns the checks of messages and the errors that say what is missing; both `LLM.chat` and the server call it.

    [{"role": "user", "content": "Hi"}]  ->  "<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n"  ->  token ids

A template is a program that came with the checkpoint. It runs in a sandbox, sees nothing but these messages, and may refuse
them (roles that do not alternate, say): its words are then the user's error and not the engine's failure. vLLM renders in
`renderers/`, where images and audio are taken out of the parts first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minivllm.exceptions import UnsupportedError, ValidationError


def render_chat(tokenizer: Any, messages: Sequence[Any], **given: Any) -> list[int]:
    """Token ids of a conversation; takes what `chat_text` takes, and raises what it raises."""
    text = chat_text(tokenizer, messages, **given)
    # The template writes its special tokens itself, so none are added here.
    return list(tokenizer.encode(text, add_special_tokens=False))


def chat_text(tokenizer: Any | None, messages: Sequence[Any], *, chat_template: str | None = None,
              tools: list[dict[str, Any]] | None = None, add_generation_prompt: bool = True,
              continue_final_message: bool = False, template_kwargs: dict[str, Any] | None = None) -> str:
    """The prompt that a template makes of a conversation; `template_kwargs` are further variables for it.

    Raises `ValidationError` that names the message, the template or the tokenizer at fault.
    """
    if tokenizer is None:
        raise ValidationError("chat needs a tokenizer, and this engine was started with skip_tokenizer_init=True",
                              parameter="messages")
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise ValidationError("this checkpoint has no chat template: pass one (--chat-template FILE, or chat_template=...), or use "
                              "completions with a prompt of your own", parameter="chat_template")
    if add_generation_prompt and continue_final_message:
        raise ValidationError("continue_final_message=True continues the last message, so add_generation_prompt must be False",
                              parameter="add_generation_prompt")
    checked = check_messages(messages)  # ours first: a template's own complaint is often a Python error
    try:
        return str(tokenizer.apply_chat_template(
            checked, chat_template=chat_template, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message, **template_kwargs or {}))
    except Exception as error:  # whatever a template raises is about these messages
        raise ValidationError(f"the chat template refused these messages: {error}", parameter="messages") from error


def check_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages with their text parts joined. Extra keys stay: some templates read them."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or len(messages) == 0:
        raise ValidationError("messages must be a list with at least one message", parameter="messages")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValidationError(f'messages[{index}] must be an object with a "role"', parameter="messages")
        content = message.get("content")
        if content is not None or "tool_calls" not in message:  # an assistant's tool call may come without text
            content = join_parts(content, index)
        checked.append({**message, "content": content})
    return checked


def join_parts(content: Any, index: int) -> str:
    """The text of a message's content: a string, or a list of text parts (joined by newlines, as vLLM does)."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValidationError(f'messages[{index}] needs a "content" string', parameter="messages")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UnsupportedError(f"messages[{index}] has a content part of type {kind!r}: this model reads text parts only",
                                   parameter="messages", value=kind)
        texts.append(part["text"])
    return "\n".join(texts)
