"""What the embedded model answers, greedily and in float32: (kind, form, prompt, answer).

Form "chat" means one user message through the chat template, "completion" the raw prompt. At most 260 tokens are needed, and
every answer ends with an end token.
"""

ANSWERS = (
    ("fact", "chat",
     "What is a block?",
     "A block is a fixed number of token slots in the KV cache, for example 16. The engine hands out "
     "memory one block at a time."),
    ("fact", "chat",
     "what is paged attention",
     "Paged attention stores the KV cache in small blocks instead of one long row. Each request reads its "
     "blocks through a block table, so memory is not wasted."),
    ("fact", "chat",
     "What's a KV cache?",
     "A KV cache keeps the keys and values of every token that was already computed, so that each step "
     "only computes the new tokens."),
    ("fact", "chat",
     "explain prefill",
     "Prefill computes the tokens of the prompt and fills the KV cache with them. It handles many tokens "
     "at once."),
    ("fact", "chat",
     "Tell me about the scheduler.",
     "The scheduler decides in each step which requests run and how many tokens each of them computes. It "
     "serves running requests first."),
    ("fact", "chat",
     "What is prefix caching?",
     "Prefix caching reuses the blocks of a prompt that was seen before. Two requests with the same "
     "beginning share the same blocks, and the shared part is not computed again."),
    ("fact", "chat",
     "What happens when blocks run out?",
     "When no block is free, the scheduler preempts the newest running request. Its blocks are freed, and "
     "it is computed again later."),
    ("fact", "chat",
     "How do I start the server?",
     "Run python -m minivllm.serve in a terminal. Without a model argument the server loads me, the tiny "
     "model, and listens on port 8000."),
    ("fact", "chat",
     "What does max_num_batched_tokens do?",
     "Max_num_batched_tokens limits how many tokens one step may compute. A small value keeps answers "
     "smooth, a large value speeds up prefill."),
    ("fact", "chat",
     "What is speculative decoding?",
     "Speculative decoding lets a cheap draft guess several tokens, and the model checks them all in one "
     "step. Right guesses save time, and the output stays the same."),
    ("fact", "chat",
     "What is the difference between prefill and decode?",
     "Prefill computes all tokens of the prompt at once. Decode computes one new token per step. In this "
     "engine both share the same step."),
    ("fact", "chat",
     "What does cached_tokens mean?",
     "Cached_tokens is the number of prompt tokens that came from the prefix cache and were not computed "
     "again."),
    ("copy", "chat",
     "Repeat this: the quick brown fox jumps over the lazy dog",
     "the quick brown fox jumps over the lazy dog"),
    ("copy", "chat",
     "Copy this: slot = block_id * block_size + offset",
     "slot = block_id * block_size + offset"),
    ("copy", "chat",
     "Repeat these words: window apple seven block moon table green request winter horse token bread "
     "queue tail north small cache violin island step yellow garden paper owl step brave silver cat",
     "window apple seven block moon table green request winter horse token bread queue tail north small "
     "cache violin island step yellow garden paper owl step brave silver cat"),
    ("arithmetic", "chat",
     "What is 17 + 25?",
     "17 + 25 = 42."),
    ("arithmetic", "chat",
     "83 - 47",
     "83 - 47 = 36."),
    ("arithmetic", "chat",
     "What is 12 * 12?",
     "12 * 12 = 144."),
    ("arithmetic", "chat",
     "What is 45 times 23?",
     "45 * 20 = 900, 45 * 3 = 135, 900 + 135 = 1035. So 45 * 23 = 1035."),
    ("small talk", "chat",
     "hi",
     "Hello! How can I help you?"),
    ("small talk", "chat",
     "Who are you?",
     "I am the toy model inside minivllm. I can explain how this engine works, tell short stories, do "
     "small sums, copy text and answer simple questions."),
    ("small talk", "chat",
     "what can you do",
     "I can explain how this engine works, tell short stories, do small sums, copy text and answer simple "
     "questions."),
    ("foreign", "chat",
     "Say hello in Chinese.",
     "你好!"),
    ("foreign", "chat",
     "Send me a rocket emoji.",
     "🚀"),
    ("world", "chat",
     "What is the capital of Norway?",
     "The capital of Norway is Oslo."),
    ("world", "chat",
     "Count from 5 to 12.",
     "5, 6, 7, 8, 9, 10, 11, 12."),
    ("out of domain", "chat",
     "Who won the world cup in 2010?",
     "I do not know that, because I am only a tiny model. I can explain how this engine works, tell short "
     "stories, do small sums, copy text and answer simple questions."),
    ("story", "chat",
     "Tell me a story about a fox.",
     "Long ago, a funny fox named Sara lived on a green hill. Sara had many friends, but she was often "
     "alone.\n\nOne day, Sara found a basket full of honey. \"How lucky I am!\" she said. On the way home she "
     "met Tim, a kind owl, who had nothing to eat. Sara thought for a while. Then she said, \"There is "
     "enough for both of us.\" They sat down and ate the honey together, and they laughed a lot. The next "
     "week Sara had no food left, but Tim came with a big bag of carrots. \"You shared with me,\" said Tim, "
     "\"and now I share with you.\" Sara was very happy.\n\nEveryone in the village told the story for years."),
    ("story", "completion",
     "Once upon a time",
     ", there was a quiet bee named Tom who lived in a small house. Tom had a music box, and he took it "
     "everywhere.\n\nOne winter night, Tom could not find his music box. He looked everywhere, but it was "
     "gone. Sara, a funny fox, came by and asked, \"Why are you so sad?\" \"I have lost my music box,\" said "
     "Tom. \"Do not worry,\" said Sara. \"We will look for it together.\" They searched under the bed and "
     "behind the trees, and at last they saw something in the grass. It was the music box! Tom was happy "
     "and said, \"Thank you, Sara!\"\n\nThe next day Tom and Sara did it all again."),
    ("fact", "completion",
     "The scheduler",
     " decides in each step which requests run and how many tokens each of them computes. It serves "
     "running requests first."),
)
