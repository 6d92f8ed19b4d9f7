"""What a decoder ends in: the head that predicts tokens, or one that scores."""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from llmtrain.errors import InputError
from llmtrain.recipe.schema import ProcessReward, Recipe, RewardModel

WRONG, RIGHT = 0, 1  # outputs of a process reward model's head
SCORING_HEADS = ("score", "classifier")  # what transformers' architectures call them


@dataclass(frozen=True)
class Head:
    """A kind of head, and transformers' class that has it.

    Attributes:
        what: for messages.
        auto: transformers' class that opens such models.
        architectures: the model types that it knows.
        suffix: of the classes' names.
        task_type: what peft calls it.
        num_outputs: of the head; None for one to each token of the vocabulary.
    """

    what: str
    auto: Any
    architectures: Container[str]
    suffix: str
    task_type: str
    num_outputs: int | None = None

    @property
    def scores(self) -> bool:
        return self.num_outputs is not None

    def attribute(self, hf: PreTrainedModel) -> str | None:
        """The name of a scoring head in its model; None for the head that predicts tokens.

        Raises:
            InputError: the architecture has its head in a way of its own.
        """
        if not self.scores:
            return None
        children = dict(hf.named_children())
        for name in SCORING_HEADS:
            if name in children:
                return name
        raise InputError(f"{type(hf).__name__} has no head called score", where="model", remedy=_REMEDY)

    def check(self, config: PreTrainedConfig, where: str) -> None:
        """Raises InputError where transformers has no such class of the architecture, or it was saved as another."""
        if not self.scores:
            return
        own_code: dict[str, str] = config.to_dict().get("auto_map") or {}
        if config.model_type not in self.architectures and self.auto.__name__ not in own_code:
            raise InputError(
                f"transformers has no {self.auto.__name__} for {config.model_type!r}, and {self.what} is one",
                where=where,
                remedy=_REMEDY,
            )

    def configure(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Says in the configuration what the head's outputs are, as transformers' own forward reads it."""
        if not self.scores:
            return
        if self is PROCESS:
            config.id2label, config.label2id = {WRONG: "wrong", RIGHT: "right"}, {"wrong": WRONG, "right": RIGHT}
        else:
            config.num_labels = 1
            config.problem_type = "regression"  # so that a pipeline of transformers gives the score as it is
        # transformers reads the score at the last token that is not this one. Where padding is the token that ends an
        # answer that would be the one before it; without padding it takes rows one by one, unpadded.
        pad = tokenizer.pad_token_id
        config.get_text_config().pad_token_id = None if pad == tokenizer.eos_token_id else pad


_REMEDY = "choose an architecture that has one, such as llama, qwen3, mistral or gpt_neox"

CAUSAL = Head(
    "a causal language model", AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "ForCausalLM", "CAUSAL_LM"
)
OUTCOME = Head(
    "a reward model",
    AutoModelForSequenceClassification,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "ForSequenceClassification",
    "SEQ_CLS",
    1,
)
PROCESS = Head(
    "a process reward model",
    AutoModelForTokenClassification,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "ForTokenClassification",
    "TOKEN_CLS",
    2,
)
HEADS = (CAUSAL, OUTCOME, PROCESS)


def head_of(recipe: Recipe) -> Head:
    """Of the model that the recipe trains."""
    match recipe.algorithm:
        case RewardModel():
            return OUTCOME
        case ProcessReward():
            return PROCESS
    return CAUSAL


def saved_head(fields: dict[str, Any]) -> Head:
    """Of a saved model, by its config.json; of one that does not say it, or of an unknown kind, the causal one's."""
    architectures = fields.get("architectures") or [""]
    return next((head for head in HEADS if str(architectures[0]).endswith(head.suffix)), CAUSAL)


def head_in(hf: PreTrainedModel) -> Head:
    """Of a model that transformers opened."""
    return saved_head({"architectures": [type(hf).__name__]})


def adapter_head(fields: dict[str, Any]) -> Head:
    """Of the model that an adapter is for, by its adapter_config.json."""
    return next((head for head in HEADS if fields.get("task_type") == head.task_type), CAUSAL)
