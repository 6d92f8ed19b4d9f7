"""Parameter-efficient fine-tuning: which small set of parameters is trained, and how it is put into the model.

All of them are the `peft` library's; what a kind does not name here, `kind: peft` reaches.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from llmtrain.recipe.schema.base import PositiveFloat, PositiveInt, Section

Targets = Annotated[
    str | list[str],
    Field(description="Modules to adapt: all-linear, a regular expression, or a list of name endings."),
]


class AdapterOptions(Section):
    """What every adapter can be told."""

    base: list[str] = Field(
        default_factory=list,
        description="Directories of adapters that are already in the model, frozen, in this order; the new one goes "
        "on top of them.",
    )


class LayerAdapter(AdapterOptions):
    """What adapters inside the layers can be told."""

    target_modules: Targets = Field("all-linear")
    modules_to_save: list[str] = Field(
        default_factory=list, description="Modules that are trained whole beside it, such as embed_tokens, lm_head."
    )


class LoRA(LayerAdapter):
    """Low-rank adaptation (arXiv 2106.09685)."""

    kind: Literal["lora"]
    r: PositiveInt = Field(16, description="Rank.")
    alpha: PositiveFloat = Field(32, description="Scale: the update is multiplied by alpha / r.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="On the adapter's input.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead (arXiv 2312.03732).")
    dora: bool = Field(False, description="Magnitude and direction apart (arXiv 2402.09353).")
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = Field(
        "default",
        description="default: B is zero. pissa (arXiv 2404.02948), olora (arXiv 2406.01775): from the weights' own "
        "SVD or QR, which are changed for it; the adapter is saved so that it fits the unchanged model.",
    )


class IA3(AdapterOptions):
    """Learnt scales of keys, values and the feed-forward's input (arXiv 2205.05638)."""

    kind: Literal["ia3"]
    modules_to_save: list[str] = Field(
        default_factory=list, description="Modules that are trained whole beside it, such as embed_tokens, lm_head."
    )
    target_modules: Targets | None = Field(None, description="Default: what peft has for the architecture.")
    feedforward_modules: list[str] | None = Field(
        None, description="Those of the targets whose input is scaled and not the output."
    )


class PromptLearning(AdapterOptions):
    num_virtual_tokens: PositiveInt = Field(20, description="Learnt vectors before the text.")


class PromptTuning(PromptLearning):
    """Learnt embeddings before the text (arXiv 2104.08691)."""

    kind: Literal["prompt_tuning"]
    init_text: str | None = Field(None, description="Begin with this text's embeddings; default: random ones.")


class PrefixTuning(PromptLearning):
    """Learnt keys and values before the text in every layer (arXiv 2101.00190); needs data.packing: none."""

    kind: Literal["prefix_tuning"]
    projection: bool = Field(False, description="Through an MLP, which is not kept afterwards.")
    encoder_hidden_size: PositiveInt | None = Field(None, description="Of that MLP; default: the model's.")


class PTuning(PromptLearning):
    """Learnt embeddings before the text, out of a small network (arXiv 2103.10385)."""

    kind: Literal["p_tuning"]
    encoder: Literal["mlp", "lstm"] = Field("mlp", description="What the network is.")
    encoder_hidden_size: PositiveInt | None = Field(None, description="Of the network; default: the model's.")


class OtherAdapter(AdapterOptions):
    """Any other tuner of peft that lives inside the layers: MISS (bone), LOHA, LOKR, OFT, BOFT, HRA, VERA, ..."""

    kind: Literal["peft"]
    type: str = Field(description="peft's name of it, such as MISS or LOHA.")
    config: dict[str, Any] = Field(default_factory=dict, description="Fields of its configuration in peft.")


Adapter = Annotated[LoRA | IA3 | PromptTuning | PrefixTuning | PTuning | OtherAdapter, Field(discriminator="kind")]
