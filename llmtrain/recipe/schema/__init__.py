"""The recipe: every key a user may write, with its meaning, default and bounds.

Pure pydantic: importing this costs no torch. The reference in docs/recipe.md is generated from
the descriptions here. A section that comes in kinds is a union discriminated by `kind`.
"""

from llmtrain.recipe.schema.around import EMA, Best, Checkpoint, Evaluation, Logging, Samples, Watchdog
from llmtrain.recipe.schema.base import Section
from llmtrain.recipe.schema.data import (
    Data,
    HuggingFaceSource,
    JSONLSource,
    ParquetSource,
    PythonSource,
    Source,
    TextSource,
)
from llmtrain.recipe.schema.engine import (
    AutoEngine,
    DDPEngine,
    DeepSpeedEngine,
    Engine,
    EngineOptions,
    FSDPEngine,
    GroupOptions,
    SingleEngine,
    ZeroPlusPlus,
)
from llmtrain.recipe.schema.model import (
    Model,
    ModelFromConfig,
    ModelFromGGUF,
    ModelFromPretrained,
    ModelTokenizer,
    PretrainedTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from llmtrain.recipe.schema.recipe import Recipe
from llmtrain.recipe.schema.training import (
    WSD,
    AdamW,
    Batch,
    CausalLM,
    Constant,
    Cosine,
    Linear,
    Schedule,
    exceeding,
)

__all__ = [
    "EMA",
    "WSD",
    "AdamW",
    "AutoEngine",
    "Batch",
    "Best",
    "CausalLM",
    "Checkpoint",
    "Constant",
    "Cosine",
    "DDPEngine",
    "Data",
    "DeepSpeedEngine",
    "Engine",
    "EngineOptions",
    "Evaluation",
    "FSDPEngine",
    "GroupOptions",
    "HuggingFaceSource",
    "JSONLSource",
    "Linear",
    "Logging",
    "Model",
    "ModelFromConfig",
    "ModelFromGGUF",
    "ModelFromPretrained",
    "ModelTokenizer",
    "ParquetSource",
    "PretrainedTokenizer",
    "PythonSource",
    "Recipe",
    "Samples",
    "Schedule",
    "Section",
    "SentencePieceTokenizer",
    "SingleEngine",
    "Source",
    "TextSource",
    "Tokenizer",
    "Watchdog",
    "ZeroPlusPlus",
    "exceeding",
]
