"""What the embedded model knows about this engine, part one: the words.

Each entry is (names, definition). A definition is a plain sentence that also reads well alone, because the same text appears
in chats ("what is a slot?") and in running prose. The first name is the one used in articles; the others are what people type.
"""

MEMORY = (
    (("a block", "a KV block", "a cache block", "a KV cache block"),
     "A block is a fixed number of token slots in the KV cache, for example 16. The engine hands out memory one block at a "
     "time."),
    (("a block table", "the block table"),
     "A block table is the list of blocks that belong to one request. It maps each position of the request to a place in the "
     "KV cache."),
    (("the null block", "block 0", "a null block", "block zero"),
     "The null block is block 0. It is never handed out to a request, and padded tokens write into it so that they do no "
     "harm."),
    (("a KV cache", "the KV cache", "the key value cache", "KV caching"),
     "A KV cache keeps the keys and values of every token that was already computed, so that each step only computes the new "
     "tokens."),
    (("paged attention", "PagedAttention"),
     "Paged attention stores the KV cache in small blocks instead of one long row. Each request reads its blocks through a "
     "block table, "
     "so memory is not wasted."),
    (("a slot", "a KV slot", "a token slot"),
     "A slot is the place of one token in the KV cache. Its number is the block id times the block size plus the offset in "
     "the block."),
    (("a slot mapping", "the slot mapping", "slot_mapping"),
     "The slot mapping says, for each token of a step, which slot of the KV cache its key and value are written to."),
    (("the block pool", "a block pool", "BlockPool"),
     "The block pool owns all blocks of the KV cache. It knows which blocks are free, how often each block is used, and the "
     "hash of each full block."),
    (("the free queue", "the free list", "the free block queue"),
     "The free queue holds the blocks that no request uses. Blocks are taken from the left, and cached blocks return on the "
     "right."),
    (("a reference count", "reference counting", "the reference count of a block", "ref count"),
     "A reference count says how many block tables hold a block. When it falls to zero, the block returns to the free queue."),
    (("prefix caching", "prefix cache", "the prefix cache", "automatic prefix caching"),
     "Prefix caching reuses the blocks of a prompt that was seen before. Two requests with the same beginning share the same "
     "blocks, "
     "and the shared part is not computed again."),
    (("a prefix hit", "a cache hit", "a prefix cache hit"),
     "A prefix hit means that the first blocks of a new prompt are already in the cache, so the engine skips computing them."),
    (("a hash chain", "the hash chain", "the hash of a block", "a block hash"),
     "A hash chain names each full block by the hash of its tokens and of the block before it. Equal hashes therefore mean "
     "equal prefixes."),
    (("LRU eviction", "eviction", "LRU", "eviction of cached blocks", "block eviction"),
     "LRU eviction means that the cached block that was unused for the longest time is reused first. The tail of a sequence "
     "goes before its head."),
    (("fragmentation", "memory fragmentation"),
     "Fragmentation is memory that is reserved but not used. With blocks, only the last block of each request is partly "
     "empty."),
    (("a block size", "the block size", "block_size"),
     "The block size is the number of tokens in one block. It is 16 on a CPU and 64 on a GPU by default."),
    (("a shared block", "block sharing", "sharing blocks"),
     "A shared block belongs to more than one request. It is only read, and it is freed when its last owner is done."),
)

SCHEDULING = (
    (("the scheduler", "a scheduler"),
     "The scheduler decides in each step which requests run and how many tokens each of them computes. It serves running "
     "requests first."),
    (("a step", "an engine step", "one step", "step()"),
     "A step is one round of the engine: schedule, run the model, sample, update. Each step computes at least one token."),
    (("a token budget", "the token budget", "the budget"),
     "A token budget is the largest number of tokens that one step may compute. It is set by max_num_batched_tokens."),
    (("prefill", "the prefill phase", "prefilling", "a prefill"),
     "Prefill computes the tokens of the prompt and fills the KV cache with them. It handles many tokens at once."),
    (("decode", "decoding", "the decode phase", "a decode step"),
     "Decode produces the answer one token at a time. Each decode step reads the whole KV cache of the request and adds one "
     "token to it."),
    (("chunked prefill", "chunking", "prefill chunking"),
     "Chunked prefill splits a long prompt into pieces that fit the token budget, so that other requests can go on between "
     "the pieces."),
    (("continuous batching", "dynamic batching", "in-flight batching"),
     "Continuous batching lets requests join and leave the batch at every step. A short answer never has to wait for a long "
     "one."),
    (("static batching", "a static batch"),
     "Static batching runs a fixed group of requests until the longest one is done. Finished rows are padded, which wastes "
     "work."),
    (("preemption", "a preemption", "being preempted"),
     "Preemption takes the blocks away from the newest running request when memory is full. The request waits at the front of "
     "the queue and is computed again later."),
    (("recomputation", "recompute preemption", "recompute"),
     "Recomputation means that a preempted request computes its tokens again when it comes back. The prefix cache often makes "
     "this cheap."),
    (("the waiting queue", "the queue"),
     "The waiting queue holds requests that have not started yet. They are served in the order of arrival, and nobody "
     "overtakes."),
    (("a running request", "the running list"),
     "A running request owns blocks and gets tokens in each step until it is finished, preempted or aborted."),
    (("a request", "a Request"),
     "A request is one prompt with its sampling parameters. It knows its tokens and how many of them are already computed."),
    (("an abort", "aborting a request", "abort_request"),
     "An abort ends a request early, for example when the client goes away. Its blocks are freed at once."),
    (("a batch", "batching"),
     "A batch is the set of requests that the model computes together in one step. Larger batches use the hardware better."),
    (("the engine", "minivllm", "this engine", "LLMEngine"),
     "The engine is a small and readable version of vLLM in pure PyTorch. It schedules requests, runs the model and samples "
     "tokens."),
    (("vLLM",),
     "vLLM is a fast engine for serving language models. Its main ideas are paged attention and continuous batching, and "
     "minivllm teaches them."),
    (("the model runner", "ModelRunner"),
     "The model runner turns a schedule into tensors, runs the model and owns the memory of the KV cache."),
    (("num_computed_tokens",),
     "num_computed_tokens counts the tokens of a request whose keys and values are in the KV cache. A request works until it "
     "reaches num_tokens."),
    (("speculative decoding", "speculation", "spec decode"),
     "Speculative decoding lets a cheap draft guess several tokens, and the model checks them all in one step. Right guesses "
     "save time, and the output stays the same."),
    (("a draft model", "the draft model", "a draft"),
     "A draft model is a much smaller model with the same vocabulary. It guesses the next tokens, and the large model accepts "
     "or rejects them."),
    (("n-gram speculation", "n-gram speculative decoding", "prompt lookup"),
     "N-gram speculation guesses the next tokens by finding the last few tokens earlier in the text. It works best when the "
     "answer copies the prompt."),
    (("the acceptance rate", "an acceptance rate"),
     "The acceptance rate is the share of guessed tokens that the model accepts. The higher it is, the more time speculation "
     "saves."),
    (("a CUDA graph", "CUDA graphs", "cudagraphs"),
     "A CUDA graph records the GPU work of a step once and replays it with a single launch. It removes the cost of starting "
     "many small kernels."),
)

SAMPLING = (
    (("sampling", "a sampler", "the sampler", "token sampling"),
     "Sampling picks the next token from the probabilities of the model. Temperature, top_k, top_p and min_p shape the "
     "choice."),
    (("temperature", "the temperature", "sampling temperature"),
     "Temperature divides the logits before sampling. A low temperature makes the output predictable, a high one makes it "
     "varied, and zero is greedy."),
    (("top_k", "top-k", "top k sampling"),
     "Top_k keeps only the k most likely tokens and drops the rest before sampling."),
    (("top_p", "top-p", "nucleus sampling"),
     "Top_p keeps the smallest set of likely tokens whose probabilities add up to p. It is also called nucleus sampling."),
    (("min_p", "min-p", "min p sampling"),
     "Min_p drops every token whose probability is less than p times that of the most likely token."),
    (("greedy decoding", "greedy", "greedy search", "temperature 0"),
     "Greedy decoding always takes the most likely token. It is what temperature 0 means, and it gives the same output each "
     "time."),
    (("a logit", "logits"),
     "A logit is the raw score of a token before softmax. The model gives one logit for each token of the vocabulary."),
    (("a logprob", "logprobs", "log probabilities", "a log probability"),
     "A logprob is the logarithm of the probability of a token. It is never above zero, and values near zero mean that the "
     "model was sure."),
    (("softmax", "the softmax"),
     "Softmax turns logits into probabilities that are positive and add up to one."),
    (("a repetition penalty", "the repetition penalty", "repetition_penalty"),
     "A repetition penalty lowers the logits of tokens that already appeared in the prompt or in the output. The value 1.0 "
     "turns it off."),
    (("a presence penalty", "presence_penalty"),
     "A presence penalty lowers the logit of every token that the output already contains, once for each such token."),
    (("a frequency penalty", "frequency_penalty"),
     "A frequency penalty lowers the logit of a token each time the output has used it."),
    (("EOS", "the EOS token", "an end of sequence token", "eos_token_id"),
     "EOS is the token that ends a sequence. When the model samples it, the request is finished with the reason stop."),
    (("a stop string", "stop strings", "a stop sequence"),
     "A stop string ends the answer as soon as it appears in the text. The stop string itself is cut off."),
    (("a seed", "the seed", "seeding"),
     "A seed makes sampling repeatable. The same request with the same seed gives the same tokens, whatever else is in the "
     "batch."),
    (("logit_bias", "a logit bias"),
     "Logit_bias adds a number to the logits of chosen tokens, which makes them more likely or less likely."),
    (("a finish reason", "finish_reason", "the finish reason"),
     "A finish reason says why an answer ended: stop for an end token or a stop string, length for the token limit, and abort "
     "for a client that went away."),
)

SERVING = (
    (("streaming", "token streaming"),
     "Streaming sends each piece of text as soon as it is ready, so that the reader does not wait for the whole answer."),
    (("TTFT", "time to first token", "the time to first token"),
     "TTFT is the time to first token: how long a client waits from sending a request to the first token of the answer."),
    (("inter token latency", "ITL", "inter-token latency"),
     "Inter token latency is the time between one token of an answer and the next."),
    (("TPOT", "time per output token"),
     "TPOT is the time per output token: the mean time for each token after the first one."),
    (("throughput", "token throughput"),
     "Throughput is the number of tokens that the engine produces per second over all requests together."),
    (("latency", "request latency"),
     "Latency is the time that one request takes. Larger batches raise throughput, but each request may take longer."),
    (("a metric", "metrics", "the metrics endpoint"),
     "A metric is a number that the server counts, such as running requests or cache usage. All metrics are listed at "
     "/metrics."),
    (("usage.cached_tokens", "cached_tokens", "cached tokens"),
     "Cached_tokens is the number of prompt tokens that came from the prefix cache and were not computed again."),
    (("a chat template", "the chat template", "ChatML"),
     "A chat template turns a list of messages into one prompt. This model uses ChatML, with a start and an end mark around "
     "each message."),
    (("a system prompt", "the system prompt", "a system message"),
     "A system prompt is the first message of a chat. It tells the model how to behave."),
    (("a detokenizer", "the detokenizer", "detokenization"),
     "A detokenizer turns token ids back into text. It holds back half of a character until the rest has arrived."),
)

MODELS = (
    (("a token", "tokens"),
     "A token is a piece of text with a number, often a word or a part of a word. The model reads and writes tokens."),
    (("a tokenizer", "the tokenizer", "tokenization"),
     "A tokenizer splits text into tokens and turns them into numbers. It can also turn the numbers back into the same text."),
    (("byte-level BPE", "BPE", "byte pair encoding"),
     "Byte-level BPE starts with the 256 bytes and merges the most frequent pairs into longer tokens. It can write any text "
     "without unknown tokens."),
    (("a vocabulary", "the vocabulary", "vocab size"),
     "A vocabulary is the list of all tokens that a model knows. My vocabulary has 4,096 tokens."),
    (("an embedding", "embeddings", "the embedding"),
     "An embedding is the list of numbers that stands for a token inside the model."),
    (("attention", "self-attention", "self attention"),
     "Attention lets each token look at the tokens before it. A query is compared with all keys, and the values are mixed by "
     "the scores."),
    (("a query", "queries, keys and values", "keys and values"),
     "A query asks what a token is looking for, a key says what a token offers, and a value is what it passes on."),
    (("GQA", "grouped query attention", "grouped-query attention"),
     "GQA is grouped query attention: several query heads share one key and value head, which makes the KV cache smaller."),
    (("RoPE", "rotary position embedding", "rotary embeddings"),
     "RoPE is rotary position embedding. It turns queries and keys by an angle that depends on the position, so that "
     "attention sees distances."),
    (("RMSNorm", "RMS norm", "root mean square norm"),
     "RMSNorm divides a vector by its root mean square and multiplies it by learned weights. It keeps the numbers in a "
     "healthy range."),
    (("SwiGLU", "the MLP", "a gated MLP"),
     "SwiGLU is the MLP of this model: a gate passes through a smooth function and multiplies another projection before the "
     "result is projected back."),
    (("tied embeddings", "weight tying", "tied weights"),
     "Tied embeddings use one matrix both to read tokens in and to score the next token. This saves memory in small models."),
    (("a transformer", "the transformer", "a decoder layer"),
     "A transformer is a stack of layers. Each layer mixes tokens by attention and then changes each token by an MLP."),
    (("safetensors", "a safetensors file"),
     "Safetensors is a file format for weights. It can be read fast and runs no code when it is loaded."),
    (("bfloat16", "bf16"),
     "Bfloat16 is a number format with 16 bits. It has the range of float32 with less precision, so weights take half the "
     "memory."),
    (("a causal mask", "causal masking", "the causal mask"),
     "A causal mask hides later tokens, so that each token only sees itself and the tokens before it."),
    (("a prompt", "the prompt"),
     "A prompt is the text that a request starts with. The engine computes it by prefill and then writes the answer."),
    (("inference", "model inference", "LLM inference"),
     "Inference means to run a trained model in order to get answers from it. This engine does inference only, it does not "
     "train."),
    (("a GPU", "GPUs"),
     "A GPU is a processor that does many calculations at the same time. It makes large models fast, but this engine also "
     "runs on a CPU."),
    (("PyTorch", "torch"),
     "PyTorch is a Python library for tensors and neural networks. The engine uses it for everything that it computes."),
    (("a tensor", "tensors"),
     "A tensor is a table of numbers with any number of dimensions. Weights, keys, values and logits are tensors."),
    (("a parameter", "weights", "the weights"),
     "A parameter is a number that the model learned in training. All parameters together are called the weights."),
    (("a position", "token positions"),
     "A position is the place of a token in its request, counted from zero. RoPE and the block table both use it."),
    (("a language model", "an LLM", "LLMs"),
     "A language model reads tokens and predicts the next one. By repeating this, it writes text."),
    (("Qwen2", "Qwen"),
     "Qwen2 is a family of language models. I have the same architecture, only much smaller."),
)

TOPICS = {
    "memory": MEMORY, "scheduling": SCHEDULING, "sampling": SAMPLING, "serving": SERVING, "models": MODELS,
}

# The way of one request, in the order in which it happens.
JOURNEY = (
    "A request arrives at the server as text.",
    "The chat template turns the messages into one prompt, and the tokenizer turns the prompt into tokens.",
    "The request joins the waiting queue.",
    "In the next step the scheduler looks for blocks that are already cached and allocates new ones for the rest.",
    "The prompt is computed in one step if it fits the token budget, or in several chunks if it does not.",
    "The keys and values of each token are written to the slots of its blocks.",
    "Attention reads them back through the block table.",
    "The last hidden state becomes a row of logits, and the sampler picks one token from it.",
    "The token is added to the request, and the detokenizer turns it into text.",
    "From now on the request decodes one token in each step, together with all other running requests.",
    "When a block is full, it gets a hash, so that later requests with the same beginning can share it.",
    "If no block is free, the newest running request is preempted and waits at the front of the queue.",
    "When the model samples an end token, the request is finished and its blocks return to the free queue.",
    "The blocks keep their content until they are needed again, so the next turn of the chat starts with a prefix hit.",
)
