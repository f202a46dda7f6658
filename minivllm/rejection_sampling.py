"""Lesson 12. The other way to accept a draft: by chance, so that what comes out has the target's distribution.

Owns the textbook sampler (Leviathan et al., Chen et al., 2023), for engines whose noise is drawn from a generator and cannot be
asked for twice. minivllm does not use it: it knows the noise of each position, lets the target draw with it, and compares
(speculative.py). How often a draft q is accepted by a target p, for one token:

    drawn apart, kept if equal       sum p q             nobody does this
    drawn with one noise, if equal   at least o / (2 - o), where o = sum min(p, q)      here: the same answer as without drafts
    rejection sampling               o                   the most there can be: the same distribution, another answer

vLLM: v1/sample/rejection_sampler.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rejection_sample(target_probs: Tensor, draft_probs: Tensor, draft_token_ids: Tensor, generator: torch.Generator) -> list[int]:
    """The run of tokens that k drafts become: distributed as if the target (k+1, V) had drawn them one by one.

    Draft x at position i, which was drawn from draft_probs[i] (k, V), is kept with probability min(1, p[x] / q[x]). The first
    that is not kept is replaced by a draw from what the target has beyond the draft, max(p - q, 0), and ends the run; where all
    are kept, a draw from the last row of p comes on top.
    """
    run: list[int] = []
    for p, q, token_id in zip(target_probs, draft_probs, draft_token_ids.tolist()):
        chance = torch.rand((), generator=generator, dtype=p.dtype, device=p.device)
        if chance * q[token_id] >= p[token_id]:
            return [*run, draw_from((p - q).clamp(min=0), generator)]
        run.append(token_id)
    return [*run, draw_from(target_probs[-1], generator)]


def draw_from(weights: Tensor, generator: torch.Generator) -> int:
    """One index, each with a probability proportional to its weight (V,)."""
    return int(torch.multinomial(weights, 1, generator=generator))
