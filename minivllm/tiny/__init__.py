"""The embedded checkpoint: a real Qwen2 model, small enough to travel inside the package, and the program that made it.

`model/` and `draft/` are ordinary Hugging Face folders, so every loader of such folders reads them. The model is a toy: it
knows this engine, short stories, small sums, copying and a few facts, because its training text says nothing else.

glossary, howto, world, smalltalk, stories, skills   what it is taught, as tables and small grammars
phrases, words                                       how people ask and vary it, and what they may want copied
corpus                                               mixes them into documents and packs those into rows of tokens
tokenizer, train, evaluate                           python -m minivllm.tiny.train --out DIR makes both folders anew
"""

from importlib.resources import files
from pathlib import Path


def checkpoint_path() -> Path:
    """The folder of the embedded model, in Hugging Face format."""
    return Path(str(files("minivllm.tiny") / "model"))


def draft_path() -> Path:
    """The folder of the draft: the same tokenizer, a tenth of the weights, for speculative decoding."""
    return Path(str(files("minivllm.tiny") / "draft"))
