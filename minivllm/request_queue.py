"""Lesson 9. The door of the scheduler: who is let in, and the queue in which they wait.

Owns the order of waiting and the one refusal that keeps the queue from ever being blocked: a request is let in only if the
engine, empty, could run it to its end. So the first in the queue always gets its turn, and nobody needs to overtake it.

    add_request ->  [ preempted | first come | ... | last come ]  -> admitted from the left
                      ^ back to the front, oldest first         any of them may leave from the middle (abort)

vLLM: vllm/v1/core/sched/request_queue.py, which has a priority queue as well.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from minivllm.exceptions import ValidationError
from minivllm.request import Request


class RequestQueue:
    """Waiting requests in order. Any of them can leave from the middle in O(1), so an abort is as cheap among 10,000.

    An OrderedDict by id, as the block pool's free queue: a deque would search for the one that leaves.
    """

    def __init__(self) -> None:
        self._requests: OrderedDict[str, Request] = OrderedDict()

    def append(self, request: Request) -> None:
        self._requests[request.request_id] = request

    def appendleft(self, request: Request) -> None:
        self.append(request)
        self._requests.move_to_end(request.request_id, last=False)

    def peek(self) -> Request:
        return next(iter(self))

    def remove(self, request: Request) -> None:
        del self._requests[request.request_id]

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def __len__(self) -> int:
        return len(self._requests)


def check_can_finish(request: Request, max_model_len: int, num_slots: int) -> None:
    """Raise `ValidationError` for a request that could not finish even alone, given `max_model_len` and the pool's KV slots.

    The last token needs no slot: it is sampled, never computed. Nothing else can keep a request from ending: alone, it has
    the whole budget and every block, and the tokens it has already sampled are counted in.
    """
    prompt = request.num_prompt_tokens
    if prompt == 0:
        raise ValidationError("the prompt is empty: give at least one token", parameter="prompt", value=[])
    if prompt >= max_model_len:
        raise ValidationError(
            f"the prompt has {prompt} tokens and max_model_len is {max_model_len}, one of which must be left to generate: "
            f"shorten the prompt to {max_model_len - 1} tokens or raise max_model_len", parameter="prompt", value=prompt)
    num_positions = min(prompt + (request.max_tokens or max_model_len), max_model_len) - 1
    if num_positions <= num_slots:
        return
    needs = (f"a prompt of {prompt} tokens with max_tokens={request.max_tokens} needs KV cache for {num_positions} positions "
             f"and the pool holds {num_slots}")
    more = "or give the engine more blocks (num_blocks, kv_cache_memory_bytes)"
    if prompt > num_slots:
        raise ValidationError(f"{needs}: shorten the prompt to {num_slots} tokens, {more}", parameter="prompt", value=prompt)
    raise ValidationError(f"{needs}: ask for at most max_tokens={num_slots + 1 - prompt}, {more}", parameter="max_tokens",
                          value=request.max_tokens)
