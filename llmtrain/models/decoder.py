"""A transformers decoder as the algorithms see it: one forward that ends in a head function."""

import inspect
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

T = TypeVar("T")
HeadFunction = Callable[[Tensor, nn.Linear], T]


class Decoder(nn.Module):
    """Backbone and head of a causal LM, in one forward.

    The head runs inside this module's forward and through its own module, because FSDP and ZeRO
    gather sharded weights in a module's hooks: a head applied outside would see shards. What the
    head computes is the algorithm's business and is passed in, so that the whole logits are never
    built and every objective shares this one forward.
    """

    PREFIX = "hf."  # of the transformers model's names in this module's

    def __init__(self, hf: PreTrainedModel):
        super().__init__()
        self.hf = hf
        # transformers isolates packed documents by restarted position ids only without a cache
        hf.config.use_cache = False
        self._takes_positions = "position_ids" in inspect.signature(hf.base_model.forward).parameters

    def forward(self, input_ids: Tensor, position_ids: Tensor | None, head: HeadFunction[T]) -> T:
        """Applies `head` to the hidden states.

        Args:
            input_ids: [B, T] token ids.
            position_ids: [B, T]; wherever they do not rise by one, a new document begins, and
                attention does not look behind it. None is one document a row. Ignored by
                architectures without positions (see `check_document_isolation`).
            head: called with hidden states [B, T, D] and the head's module.
        """
        # No attention mask: with one given, transformers no longer looks at the restarts. Causal
        # attention never sees padding on the right.
        positions = {"position_ids": position_ids} if self._takes_positions else {}
        output = self.hf.base_model(input_ids=input_ids, attention_mask=None, use_cache=False, **positions)
        return head(output.last_hidden_state, self.hf.get_output_embeddings())

    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order: what is compiled, recomputed or sharded as a unit."""
        names = set(self.hf._no_split_modules or ())
        layers = [module for module in self.hf.modules() if type(module).__name__ in names]
        if not layers:
            raise ValueError(f"{type(self.hf).__name__} does not say what its layers are")
        return layers

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def num_matmul_parameters(self) -> int:
        """Parameters that multiply activations: all but an input embedding that is no head as well."""
        embedding, head = self.hf.get_input_embeddings().weight, self.hf.get_output_embeddings().weight
        return self.num_parameters() - (0 if embedding is head else embedding.numel())

    def attention_width(self) -> int:
        """Heads times their dimension, 0 without attention: what the attention FLOPs are counted from."""
        config = self.hf.config.to_dict()
        heads = config.get("num_attention_heads", 0)
        return heads * (config.get("head_dim") or config["hidden_size"] // heads) if heads else 0

    def num_layers(self) -> int:
        return len(self.layers())

    def max_length(self, default: int) -> int:
        """Tokens the model has positions for; `default` where it has no such limit."""
        return self.hf.config.to_dict().get("max_position_embeddings") or default
