"""Texts that a small model learns to continue without fault: a pattern of 3 to 8 letters, again and again.

Of real text a model that trains in minutes is never sure, so that writing several tokens at once only harms it, and
there is no telling whether what it writes is right. Here each token after two periods is certain, and found by who
has learnt to look for where it stood before; between masked tokens that is harder than beside known ones.
"""

import random
from pathlib import Path

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUM_LETTERS = 126  # with the tokens that begin and end a text a row of 128
STEPS = 700
RECIPE = """\
extends: quickstart
sequence_length: 128
batch: {{sequences: 32}}
tokenizer: {{kind: sentencepiece, vocab_size: 332}}   # a token for each letter with its space
data:
  train: [{{kind: text, paths: [{corpus}], document: line}}]
  packing: none
  validation_fraction: 0.01
samples: null
"""


def texts(num: int, seed: int) -> list[str]:
    chooser = random.Random(seed)
    patterns = [[chooser.choice(LETTERS) for _ in range(chooser.randint(3, 8))] for _ in range(num)]
    return [" ".join((pattern * NUM_LETTERS)[:NUM_LETTERS]) for pattern in patterns]


def write_recipe(directory: Path) -> Path:
    """A recipe that trains on them, and the corpus beside it."""
    corpus, recipe = directory / "patterns.txt", directory / "patterns.yaml"
    corpus.write_text("\n".join(texts(12_000, seed=0)) + "\n")
    recipe.write_text(RECIPE.format(corpus=corpus))
    return recipe
