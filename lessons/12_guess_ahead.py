# %% [markdown]
# # Lesson 12. Guess ahead
#
# > **The one idea.** A step that checks four guessed tokens reads the weights once, like a step that computes one. So
# > somebody cheap guesses, the model says what it would have said itself, and everything up to the first difference is
# > kept.
#
# Lesson 3 counted what a decode step does: it reads every weight to compute one position of each request. A batch
# shares that reading between requests. This lesson shares it between tokens of one request.

# %%
import torch

from minivllm import cost, viz, viz_bands
from minivllm.bench.shapes import SHAPES
from minivllm.config import ModelConfig
from minivllm.coursework import (
    course_workload,
    embedded_draft,
    embedded_model,
    guesses,
    next_token_logits,
    run_engine,
    taught_workload,
)
from minivllm.draft_model import DraftModelProposer
from minivllm.rejection_sampling import rejection_sample
from minivllm.sampler import draw, seed_keys
from minivllm.speculative import accepted_run
from minivllm.viz import show

# %% [markdown]
# ## What hurts
#
# Eight questions that the embedded model was taught to answer, all in one batch. The longest answer decides how many
# steps there are, and each of them gives a request one token, however easy that token is.

# %%
engine_args = {"num_blocks": 257, "block_size": 16, "max_model_len": 512, "dtype": "float64"}
engine_args |= {"enable_prefix_caching": False}
questions = taught_workload()
plain = run_engine(questions, ignore_eos=False, **engine_args)
print(f"{plain.stats.num_generated_tokens} tokens in {plain.stats.num_steps} steps")

# %% [markdown]
# ## The code
#
# The package has a second checkpoint, the draft: the same vocabulary and a tenth of the weights. Before each step it
# guesses the next four tokens of every request. They are scheduled behind the known token like a piece of a prompt, so
# the model samples at five positions instead of one. What counts of these five is one function.
#
# To write it before you read it: `python -m minivllm.learn start 12a` now, and come back.

# %%
show(accepted_run)

# %%
print(accepted_run([7, 8, 9, 10], [7, 8, 5, 10, 11]))
print(accepted_run([7, 8, 9, 10], [7, 8, 9, 10, 11]))
print(accepted_run([7, 8, 9, 10], [1, 8, 9, 10, 11]))

# %% [markdown]
# The last row shows why nothing is lost: a step whose guesses are all wrong still brings the token that it would have
# brought without them. And a guess is kept only if it *is* the token that the model draws. Lesson 4 made drawing a pure
# function of logits, seed and position, so this holds at every temperature.
#
# The draft is a model runner of its own on the same block tables. It first catches up with what has been said, then it
# decodes four times.

# %%
show(DraftModelProposer.propose)

# %% [markdown]
# ## The same questions again

# %%
guessed = run_engine(
    questions, ignore_eos=False, speculative_config={"num_speculative_tokens": 4}, **engine_args
)
assert guessed.token_ids == plain.token_ids, "guesses change when a token comes, and never which"
stats = guessed.stats
print(
    f"{stats.num_generated_tokens} tokens in {stats.num_steps} steps instead of {plain.stats.num_steps}"
)

# %% [markdown]
# Each line is a request, each column a step, and each number a count of tokens. The first step computes the prompts.

# %%
viz_bands.ribbons(
    [(f"request {name}", row) for name, row in guesses(guessed)],
    "step",
    "eight questions, four guesses in each step: what became of them",
)

# %% [markdown]
# The right end of an answer is gray: it ends in the middle of a run of guesses, and those behind the end were computed
# for nothing.
#
# ## The number
#
# How many tokens does a request get from a step? Its first token comes with its prompt, so that step does not count.

# %%
num_decodes = stats.num_scheduled_tokens - stats.num_draft_tokens - stats.num_prompt_tokens
per_step = (stats.num_generated_tokens - len(questions.requests)) / num_decodes
by_position = [count / stats.num_drafts for count in stats.num_accepted_tokens_per_pos]
viz.bars(
    [(f"guess {number} of a step", 100 * share) for number, share in enumerate(by_position, 1)],
    "Accepted, in percent of all steps with guesses",
    "%",
)

# %%
assert (plain.stats.num_steps, stats.num_steps) == (60, 14), "steps"
assert round(per_step, 2) == 4.43, "tokens of a request for each step that it decodes in"
assert stats.num_accepted_tokens_per_pos == [54, 54, 54, 50] and stats.num_drafts == 56

# %% [markdown]
# **4.43 tokens a step instead of 1, with four guesses, and the tokens are the same.** The bound would be 5.
#
# The same holds when tokens are drawn. A seed gives the same answer with and without guesses.

# %%
for temperature in (0.8, 1.5):
    workload, runs = taught_workload(temperature), []
    for config in (None, {"num_speculative_tokens": 4}):
        runs.append(run_engine(workload, ignore_eos=False, speculative_config=config, **engine_args))
    assert runs[0].token_ids == runs[1].token_ids, "the same seed, the same tokens"
    pairs = zip(runs[0].token_ids, plain.token_ids)
    num_others = sum(drawn != greedy for drawn, greedy in pairs)
    print(
        f"temperature {temperature}: {runs[0].stats.num_steps} -> {runs[1].stats.num_steps} steps, equal answers, "
        f"of which {num_others} are not the greedy ones"
    )

# %% [markdown]
# ## What it costs
#
# Wrong guesses are computed and thrown away. These questions are what both models were taught. The course's workload
# is the opposite: prompts of random tokens, behind which neither model knows what it says. Here are 16 of its requests;
# the picture shows the first 8, and 12 steps.

# %%
strange, runs = course_workload(16), {}
for name, config in (("plain", None), ("guessed", {"num_speculative_tokens": 4})):
    runs[name] = run_engine(strange, speculative_config=config, **engine_args)
assert runs["guessed"].token_ids == runs["plain"].token_ids
viz_bands.ribbons(
    [(f"request {name}", row[:12]) for name, row in guesses(runs["guessed"])[:8]],
    "step",
    "random prompts: the same four guesses a step, the first 12 steps",
)

# %%
before, after = runs["plain"].stats, runs["guessed"].stats
print(f"{before.num_steps} -> {after.num_steps} steps")
print(f"{before.num_scheduled_tokens:,} -> {after.num_scheduled_tokens:,} positions")
print(f"accepted by position: {after.num_accepted_tokens_per_pos} of {after.num_drafts}")
assert (before.num_scheduled_tokens, after.num_rejected_positions) == (1897, 1131), "and thrown away"
assert (before.num_steps, after.num_steps) == (111, 71)

# %% [markdown]
# Still fewer steps, but 60 % more positions. Are positions dear? At batch size 1 they are nearly free, because the step
# waits for the weights. In a large batch the step waits for arithmetic, and then five positions cost five times one.
# This is the bound of lesson 3 for Qwen2.5-7B on an H200, with Qwen2.5-0.5B as its draft: tokens a second with guesses,
# in units of those without.

# %%
big, small = (ModelConfig.from_dict(SHAPES[name]) for name in ("qwen2.5-7b", "qwen2.5-0.5b"))


def seconds(config: ModelConfig, num_requests: int, positions: int) -> float:
    step = config, [positions] * num_requests, [512] * num_requests
    return cost.roofline_seconds(cost.flops(*step), cost.bytes_moved(*step), 790e12, 4.26e12)


def gain(num_requests: int, tokens: float) -> float:
    guessing = seconds(big, num_requests, 5) + 4 * seconds(small, num_requests, 1)
    return tokens * seconds(big, num_requests, 1) / guessing


# %%
sizes = [1, *range(16, 257, 16)]
strange_tokens = 1 + after.num_accepted_tokens / after.num_drafts
viz.line(
    {
        "as on the questions": [(n, gain(n, per_step)) for n in sizes],
        "as on random prompts": [(n, gain(n, strange_tokens)) for n in sizes],
        "without guesses": [(0, 1), (280, 1)],
    },
    "requests in the batch, contexts of 512",
    "times the tokens a second",
    "Qwen2.5-7B with a 0.5B draft: a bound, not a measurement",
)

# %%
assert [round(gain(n, per_step), 1) for n in (1, 32, 256)] == [3.5, 3.4, 0.9], "times as many tokens"

# %% [markdown]
# Guessing is for small batches. At 256 requests it loses even where nearly every guess is right. The ledger has the same
# comparison as a measurement, on an H200 with a 0.5B model: 2.8 times as many tokens for one request whose guesses are
# right nine times in ten, and a loss at 256. A second price: steps are made in turn, because the next guesses follow the
# tokens of this step, so the host's work is not hidden behind the device's (lesson 14).
#
# ## The other way to accept
#
# Textbooks and vLLM accept a guess by chance. Where the draft gives a token the probability q and the model p, it is
# kept with the probability min(1, p / q), and a refused one is replaced by a draw from what p has beyond q.
#
# To write it before you read it: `python -m minivllm.learn start 12c` now, and come back.

# %%
show(rejection_sample)

# %% [markdown]
# That is the most that can be accepted without changing the distribution. How much less is accepted by drawing both
# with one noise, as this engine does? Both models look at the same answers, at temperature 1.

# %%
models = [embedded_model().double(), embedded_draft().double()]
rates = {}
for name, run, work in (
    ("questions", plain, questions),
    ("random prompts", runs["plain"], strange),
):
    logits = [[], []]
    for request, answer in zip(work.requests, run.token_ids):
        known = request.prompt_token_ids + answer[:-1]
        for model, rows in zip(models, logits):
            rows.append(next_token_logits(model, known, len(answer)))
    rates[name] = [torch.cat(rows) for rows in logits]

# %%
table = []
for name, (target, draft) in rates.items():
    p, q, positions = target.softmax(-1), draft.softmax(-1), torch.arange(len(target))
    keys = [seed_keys(torch.full((len(target),), seed)) for seed in range(8)]
    same = [
        draw(target.float(), one, positions) == draw(draft.float(), one, positions) for one in keys
    ]
    for way, rate in (
        ("drawn apart", (p * q).sum(-1).mean()),
        ("one noise, as here", torch.stack(same).double().mean()),
        ("rejection sampling", torch.minimum(p, q).sum(-1).mean()),
    ):
        table.append((f"{name}: {way}", round(100 * float(rate), 1)))
viz.bars(table, "Guesses that are accepted, in percent", "%")

# %%
apart, noise, chance = (value for _, value in table[3:])
assert 35 < apart < 36 and 49 < noise < 52 < chance < 53, "percent, on random prompts"

# %% [markdown]
# One noise accepts nearly as many. What it gains is in the answers. With rejection sampling the distribution is that of
# the model, but a seed says something else for every draft. Here are 660 positions, one seed for each, and two drafts:
# the small model, and one to which all tokens are equal.

# %%
target, draft = rates["random prompts"]
p, answers = target.softmax(-1), []
for q in (draft.softmax(-1), torch.full_like(draft, 1 / draft.shape[1])):
    answers.append([])
    for position in range(len(p)):
        generator = torch.Generator().manual_seed(position)
        guess = torch.multinomial(q[position : position + 1], 1, generator=generator)[:, 0]
        pair = p[[position, position]], q[position : position + 1]
        answers[-1].append(rejection_sample(*pair, guess, generator)[0])
num_different = sum(one != other for one, other in zip(*answers))
print(f"rejection sampling: {num_different} of {len(p)} tokens depend on the draft")

# %%
assert 155 < num_different < 167, "tokens for which a seed says something else with another draft"

# %% [markdown]
# A quarter of the tokens. With one noise it is none of them: the runs above were compared, token by token.
#
# ## Your turn
#
# ```bash
# python -m minivllm.learn start 12a    # what counts of a verification
# python -m minivllm.learn start 12b    # a draft without a model: look it up in the text
# python -m minivllm.learn start 12c    # the textbook's sampler
# ```
#
# About 50 minutes for the three. The third one is judged by a chi-square test: a sampler that replaces a refused guess
# from p itself looks right, and is not.
#
# ## Questions
#
# 1. The bars of lesson 3 say that 64 requests do 47 operations a byte. What do they do with four guesses each?
# 2. The fourth guess is accepted less often than the first. Can it ever be accepted more often?
# 3. A block is full of guesses. Why must it not get a name (lesson 11) before the step is over?
#
# ## In vLLM
#
# `v1/spec_decode/draft_model.py` and `v1/spec_decode/ngram_proposer.py` guess, and `v1/sample/rejection_sampler.py`
# accepts by chance. Drafts there are placeholders in a step that is planned ahead, so guessing and CUDA graphs go
# together.
