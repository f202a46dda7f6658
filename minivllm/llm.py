"""The offline face: a list of prompts in, a list of answers out, in the same order.

Owns input forms, the progress bar and nothing else: it drives the same engine as the server through `add_request`,
`abort_request` and `step`. A script written for vLLM runs with only the import changed.

    with LLM() as llm:
        print(llm.generate("Once upon a time")[0].outputs[0].text)

All prompts of a call are queued before the first step, so the scheduler sees them all, and a thousand prompts are one
continuous batch and not a thousand calls. The order of the answers is that of the prompts, not that in which they end.

Between two calls: requests in the engine == requests in `_enqueued`. A call that fails or is interrupted takes its own along.

vLLM has the same face. There the engine runs in another process, and `LLM` asks it for one step's outputs at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from minivllm.chat import render_chat
from minivllm.engine import LLMEngine
from minivllm.engine_args import engine_config_from_kwargs
from minivllm.exceptions import ValidationError
from minivllm.input_processor import ProcessedInput
from minivllm.request import RequestOutput
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler_output import SchedulerStats


class LLM:
    """A model, ready to generate. `model=None` is the toy checkpoint inside the package.

    Takes vLLM's arguments by name. Those that minivllm lacks are accepted at the value that changes nothing and refused by
    name otherwise; `trust_remote_code` is accepted, and nothing remote is ever executed. Raises `ValidationError` for a
    wrong argument and `CheckpointError` for a wrong model folder.
    """

    def __init__(self, model: str | None = None, **kwargs: Any) -> None:
        self.engine = LLMEngine(engine_config_from_kwargs(model=None if model is None else str(model), **kwargs))
        self._num_requests = 0  # ids are these numbers, counted up from 0
        self._enqueued: list[str] = []  # queued, and not yet waited for

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Give weights, KV cache and trace file back; every later call raises `EngineDeadError`."""
        self.engine.close()

    def generate(self, prompts: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *,
                 use_tqdm: bool = True) -> list[RequestOutput]:
        """One `RequestOutput` per prompt, in the order given.

        `prompts` is a string, a list of token ids, {"prompt": ...}, {"prompt_token_ids": ...}, or a list of these;
        `sampling_params` one for all, a list of the same length, or None for the checkpoint's own defaults. Everything is
        checked before anything runs. If it is interrupted, the requests of this call are aborted and the engine lives on.
        """
        self.enqueue(prompts, sampling_params)
        return self.wait_for_completion(use_tqdm=use_tqdm)

    def chat(self, messages: list[Any], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *,
             use_tqdm: bool = True, chat_template: str | None = None, add_generation_prompt: bool = True,
             continue_final_message: bool = False, tools: list[dict[str, Any]] | None = None) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or several (a list of lists) through the chat template.

        Everything else is as in `generate`: the template makes the prompt, and the engine never knows that it was a conversation.
        A model without a template raises `ValidationError`, unless `chat_template` brings one.
        """
        conversations = messages if messages and isinstance(messages[0], list) else [messages]
        given = {"chat_template": chat_template or self.engine.chat_template, "tools": tools,
                 "add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        prompts = [{"prompt_token_ids": render_chat(self.engine.tokenizer, one, **given)} for one in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def enqueue(self, prompts: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None) -> list[str]:
        """Check and queue prompts without running them; returns their request ids. Either all are queued or none."""
        batch = _as_batch(prompts)
        params = self._as_params(sampling_params, len(batch))
        processor, clock = self.engine.input_processor, self.engine.clock
        request_ids = [str(self._num_requests + index) for index in range(len(batch))]
        inputs = [processor.process(request_id, prompt, one, arrival_time=clock(), final_only=True)
                  for request_id, prompt, one in zip(request_ids, batch, params)]
        self._add_all_or_none(inputs)
        self._num_requests += len(inputs)
        self._enqueued += request_ids
        return request_ids

    def _add_all_or_none(self, inputs: list[ProcessedInput]) -> None:
        """Queue checked requests. The scheduler may still refuse one, which can never fit into the pool; then none stays."""
        added: list[str] = []
        try:
            for processed in inputs:
                self.engine.add_processed(processed)
                added.append(processed.request_id)
        except BaseException:
            self.engine.abort_request(added)
            raise

    def wait_for_completion(self, *, use_tqdm: bool = True) -> list[RequestOutput]:
        """Run until every queued prompt has its answer; returns them in the order in which they were queued."""
        request_ids, self._enqueued = self._enqueued, []
        # A dict keeps the order in which keys came in: filled in any order, it gives the answers in the order of the prompts.
        finished: dict[str, RequestOutput | None] = dict.fromkeys(request_ids)  # None: still on its way
        num_left = len(request_ids)
        bar = _ProgressBar(num_left, enabled=use_tqdm)
        try:
            while num_left > 0:
                # Else this loop would turn for ever: a request that is neither here nor answered is our own mistake.
                assert self.engine.has_unfinished_requests(), "a queued request ends with an output or an error"
                for output in self.engine.step():
                    if output.finished and output.request_id in finished:  # not one that somebody gave the engine directly
                        finished[output.request_id] = output
                        num_left -= 1
                        bar.advance(output)
        except BaseException:  # Ctrl-C too: a notebook goes on with the same engine, and its blocks must be free
            self.engine.abort_request(request_ids)
            raise
        finally:
            bar.close()
        return [output for output in finished.values() if output is not None]

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer, or None after `skip_tokenizer_init=True`."""
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate(params=None)` uses: the checkpoint's generation_config over `SamplingParams`' defaults."""
        return SamplingParams(**self.engine.default_sampling_params)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks; False, and nothing done, while requests run."""
        return self.engine.reset_prefix_cache()

    @property
    def stats(self) -> SchedulerStats:
        """The engine's deterministic counters."""
        return self.engine.stats

    def _as_params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        """One `SamplingParams` for each prompt. They are not copied here: the input processor copies what it keeps."""
        if given is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise ValidationError(f"{count} prompts came with {len(given)} sampling_params: pass one for all, or one for each",
                                  parameter="sampling_params")
        return list(given)


def _as_batch(prompts: Any) -> list[Any]:
    """A list of prompts, whether one prompt or several were given. A list of ints is one prompt."""
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, (bytes, bytearray)):
        raise ValidationError(f"prompts must be a string, a list of token ids or a list of prompts, got {type(prompts).__name__}",
                              parameter="prompts")
    # [] is no prompt at all and not an empty one, so that generate([]) is [].
    is_one_prompt = len(prompts) > 0 and all(isinstance(item, int) for item in prompts)
    return [list(prompts)] if is_one_prompt else list(prompts)


class _ProgressBar:
    """tqdm over requests, with output tokens a second."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        self.bar = tqdm(total=total, desc="Processed prompts", unit="req", disable=not enabled, dynamic_ncols=True)
        self.num_tokens = 0

    def advance(self, output: RequestOutput) -> None:
        """One request more has ended; the rate counts whole answers, so it lags behind while long ones are on their way."""
        self.num_tokens += sum(len(answer.token_ids) for answer in output.outputs)
        elapsed = self.bar.format_dict["elapsed"] or 1e-9
        self.bar.set_postfix_str(f"output {self.num_tokens / elapsed:.1f} tokens/s", refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
