"""A transformers decoder as the algorithms see it: one forward that ends in a head function."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from llmtrain.errors import InputError
from llmtrain.models.attention import Visible, as_mask
from llmtrain.models.inputs import Prefix, VirtualTokens, neftune_noise

T = TypeVar("T")
HeadFunction = Callable[[Tensor, nn.Linear], T]


def config_field(config: PreTrainedConfig, name: str) -> Any:
    """A field by the name that most architectures give it (GPT-2 says n_positions); None without one."""
    return config.to_dict().get(config.attribute_map.get(name, name))


class Decoder(nn.Module):
    """Backbone and head, in one forward: of a causal LM, or of a model that scores.

    The head runs inside this module's forward and through its own module, because FSDP and ZeRO
    gather sharded weights in a module's hooks: a head applied outside would see shards. What the
    head computes is the algorithm's business and is passed in, so that the whole logits are never
    built and every objective shares this one forward.

    A dropout that transformers puts before the head of a token classification is left out.

    Args:
        hf: the transformers model.
        head: the name of the module in it that scores; None for the head that predicts tokens.

    Attributes:
        hf: the transformers model.
        scoring_head: `head`.
        prompt: what prompt learning puts before every document; data and algorithms do not see it.
        neftune_alpha: size of the noise on the embeddings in training mode (NEFTune), or None.
        takes_positions: whether positions are told by position ids; others count tokens of the row, or have none.
    """

    PREFIX = "hf."  # of the transformers model's names in this module's

    def __init__(self, hf: PreTrainedModel, head: str | None = None):
        super().__init__()
        self.hf = hf
        self.scoring_head = head
        self.prompt: VirtualTokens | Prefix | None = None
        self.neftune_alpha: float | None = None
        # transformers isolates packed documents by restarted position ids only without a cache
        hf.config.use_cache = False
        self.takes_positions = "position_ids" in inspect.signature(hf.base_model.forward).parameters

    @property
    def tells_positions(self) -> bool:
        """Whether a token's position is what its position id says, wherever it stands in the row."""
        return self.takes_positions and not config_field(self.hf.config, "alibi")

    @property
    def head(self) -> nn.Linear:
        """The module that head functions are given; it may be one of peft's around it."""
        name = self.scoring_head
        module: Any = self.hf.get_output_embeddings() if name is None else self.hf.get_submodule(name)
        return cast(nn.Linear, module)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        head: HeadFunction[T] | None,
        visible: Visible | None = None,
        cache: Cache | None = None,
    ) -> T | Tensor:
        """Applies `head` to the hidden states.

        Args:
            input_ids: [B, T] token ids.
            position_ids: [B, T]; wherever they do not rise by one, a new document begins, and
                attention does not look behind it. None is one document a row. Ignored by
                architectures without positions (see `check_document_isolation`).
            head: called with hidden states [B, T, D] and the head's module. None gives the logits
                that transformers' own forward makes of one document a row, [B, T, outputs], or of the last token
                alone, [B, 1, outputs], where it classifies the whole: for checks.
            visible: what each token attends to, where that is not what is before it in its document
                (`models/attention.py`); `position_ids` are then positions and nothing else.
            cache: with `visible`: keys and values of the tokens before these, which it counts too. Those of
                these tokens are added.
        """
        if head is None:
            inputs, places = self._inputs(input_ids, None)
            logits: Tensor = self.hf(**inputs, use_cache=False).logits
            return logits.unsqueeze(1) if logits.dim() == 2 else _at(places, logits)
        inputs, places = self._inputs(input_ids, position_ids)
        # No attention mask: with one given, transformers no longer looks at the restarts. Causal
        # attention never sees padding on the right.
        mask = None
        if visible is not None:
            assert self.prompt is None, "the schema forbids it: a predicate counts the row's own tokens"
            kernel, (rows, length) = self.hf.config._attn_implementation, input_ids.shape
            cached = 0 if cache is None else cache.get_seq_length()
            mask = as_mask(kernel, visible, rows, length, input_ids.device, self._compute_dtype(), cached)
        if cache is not None:
            inputs["past_key_values"] = cache
        output = self.hf.base_model(**inputs, attention_mask=mask, use_cache=cache is not None)
        return head(_at(places, output.last_hidden_state), self.head)

    def _inputs(self, input_ids: Tensor, position_ids: Tensor | None) -> tuple[dict[str, Any], Tensor | None]:
        """What the transformers model is given; and where in its output the tokens are, if not where they were."""
        positions = position_ids if self.takes_positions else None
        inputs: dict[str, Any] = {} if positions is None else {"position_ids": positions}
        if isinstance(self.prompt, Prefix):
            inputs["past_key_values"] = self.prompt(input_ids.shape[0], self.hf.dtype)
            if positions is not None:
                inputs["position_ids"] = positions + self.prompt.num
        alpha = self.neftune_alpha if self.training else None
        if alpha is None and not isinstance(self.prompt, VirtualTokens):
            return {"input_ids": input_ids, **inputs}, None
        embeddings = self.hf.get_input_embeddings()(input_ids)
        if alpha is not None:
            embeddings = embeddings + neftune_noise(embeddings, position_ids, alpha)
        if not isinstance(self.prompt, VirtualTokens):
            return {"inputs_embeds": embeddings, **inputs}, None
        with_prompt = self.prompt(embeddings, position_ids)
        if positions is not None:
            inputs["position_ids"] = with_prompt.positions
        return {"inputs_embeds": with_prompt.embeddings, **inputs}, with_prompt.places

    def _compute_dtype(self) -> torch.dtype:
        kind = self.hf.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.hf.dtype

    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order: what is compiled, recomputed or sharded as a unit."""
        names = set(self.hf._no_split_modules or ())
        # Of a class or derived from it: a backend may have made the layer's class its own.
        layers = [m for m in self.hf.modules() if any(kind.__name__ in names for kind in type(m).__mro__)]
        if not layers:
            kind = type(self.hf).__name__
            unknown = f"transformers does not say what the layers of {kind} are"
            raise InputError(f"{kind} of this config has no layers" if names else unknown, where="model")
        return layers

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def num_matmul_parameters(self) -> int:
        """Parameters that multiply activations: all but an input embedding that is no head as well."""
        embedding, head = self._matrices()
        return self.num_parameters() - (0 if embedding is head else embedding.numel())

    def num_frozen_matmul_parameters(self) -> int:
        """Of these, the ones that are not trained: backward computes no gradient of theirs."""
        embedding, head = self._matrices()
        frozen = [parameter for parameter in self.parameters() if not parameter.requires_grad]
        only_looked_up = 0 if embedding is head or embedding.requires_grad else embedding.numel()
        return sum(parameter.numel() for parameter in frozen) - only_looked_up

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """Of the embedding and of the head; of an adapter that trains single rows, what they are put into."""
        modules = (self.hf.get_input_embeddings(), self.head)
        embedding, head = (
            m.weight if isinstance(m.weight, nn.Parameter) else max(m.parameters(), key=Tensor.numel) for m in modules
        )
        return embedding, head

    def attention_width(self) -> int:
        """Heads times their dimension, 0 without attention: what the attention FLOPs are counted from."""
        config = self.hf.config
        heads: int | None = config_field(config, "num_attention_heads")
        if not heads:
            return 0
        head_dim: int = config_field(config, "head_dim") or config_field(config, "hidden_size") // heads
        return heads * head_dim

    def num_layers(self) -> int:
        return len(self.layers())

    def max_length(self, default: int) -> int:
        """Tokens the model has positions for; `default` where it has no such limit."""
        longest: int | None = config_field(self.hf.config, "max_position_embeddings")
        return (longest or default) - (0 if self.prompt is None or longest is None else self.prompt.num)


def _at(places: Tensor | None, states: Tensor) -> Tensor:
    """The rows of `states` [B, T', D] at `places` [B, T]; all of them without places."""
    if places is None:
        return states
    return states.gather(1, places.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
