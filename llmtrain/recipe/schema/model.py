"""The model and its tokenizer."""

from typing import Annotated, Any, Literal

from pydantic import Field

from llmtrain.recipe.schema.base import PositiveInt, Section

AttentionKernel = Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2"]
ATTENTION = (
    "Attention kernel; auto is sdpa where the architecture has it, eager elsewhere. flex_attention and "
    "flash_attention_2 (with the flash-attn package) train on GPUs only."
)


class ModelFromConfig(Section):
    """A new model with random weights, of any decoder architecture that transformers knows."""

    kind: Literal["config"]
    architecture: str = Field(description="transformers' model type: llama, qwen3, mamba2, ...")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of that architecture's configuration (hidden_size, num_hidden_layers, rope_parameters, "
        "...). vocab_size defaults to the tokenizer's, max_position_embeddings to sequence_length.",
    )
    attention: AttentionKernel = Field("auto", description=ATTENTION)


class ModelFromPretrained(Section):
    """Weights from a local directory or from the Hugging Face hub."""

    kind: Literal["pretrained"]
    path: str = Field(description="Local directory, or a hub name such as HuggingFaceTB/SmolLM2-135M.")
    revision: str | None = Field(None, description="Hub branch, tag or commit.")
    trust_remote_code: bool = Field(False, description="Run model code that comes with the weights.")
    rope_parameters: dict[str, Any] | None = Field(
        None,
        description="Replaces the model's RoPE scaling, e.g. {rope_type: yarn, rope_theta: 10000.0, factor: 4.0}.",
    )
    quantization: Literal["none", "nf4", "fp4"] = Field(
        "none",
        description="Keep the frozen weights in 4 bits, by bitsandbytes (QLoRA, arXiv 2305.14314); needs an adapter.",
    )
    attention: AttentionKernel = Field("auto", description=ATTENTION)


class ModelFromGGUF(Section):
    """Weights from a GGUF file, dequantised: they are not bit for bit those they were made from."""

    kind: Literal["gguf"]
    file: str = Field(description="Path of the .gguf file.")
    attention: AttentionKernel = Field("auto", description=ATTENTION)


Model = Annotated[ModelFromConfig | ModelFromPretrained | ModelFromGGUF, Field(discriminator="kind")]


class SentencePieceTokenizer(Section):
    """Trained by sentencepiece on the training data, then used as a Hugging Face fast tokenizer."""

    kind: Literal["sentencepiece"]
    vocab_size: Annotated[int, Field(ge=270)] = Field(
        description="Size of the vocabulary, with the 256 byte-fallback pieces and the special tokens."
    )
    model_type: Literal["bpe", "unigram"] = Field("bpe", description="Segmentation algorithm.")
    special_tokens: list[str] = Field(
        default_factory=list, description="Further special tokens beside <unk>, <s>, </s> and <pad>."
    )
    max_bytes: PositiveInt = Field(
        20_000_000, description="Bytes of training text to learn from, sampled evenly over the documents."
    )


class ReadyTokenizer(Section):
    add_tokens: list[str] = Field(
        default_factory=list,
        description="New tokens, such as <|user|>; the model's embeddings grow by them, from the mean of the others.",
    )


class PretrainedTokenizer(ReadyTokenizer):
    """A tokenizer from a local directory or from the Hugging Face hub."""

    kind: Literal["pretrained"]
    path: str = Field(description="Local directory or hub name.")
    revision: str | None = Field(None, description="Hub branch, tag or commit.")


class ModelTokenizer(ReadyTokenizer):
    """The tokenizer that lies beside the pretrained model's weights."""

    kind: Literal["model"] = "model"


Tokenizer = Annotated[SentencePieceTokenizer | PretrainedTokenizer | ModelTokenizer, Field(discriminator="kind")]
