"""A small complete recipe, and the type of the fixture that writes it."""

from collections.abc import Callable
from pathlib import Path

MINIMAL = """\
name: minimal
sequence_length: 128
steps: 100
batch: {sequences: 8}
model:
  kind: config
  architecture: llama
  config: {hidden_size: 64, num_hidden_layers: 2}
tokenizer: {kind: sentencepiece, vocab_size: 300}
data:
  train:
    - {kind: text, paths: [a.txt]}
algorithm: {kind: causal_lm}
optimizer: {lr: 1e-3}
schedule: {kind: cosine, warmup_steps: 5}
"""

Write = Callable[..., Path]
