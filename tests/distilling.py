"""A student, a teacher and conversations, put together as a run does."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from llmtrain import engines
from llmtrain.algorithms.distillation import Distilled, distilled
from llmtrain.algorithms.judged import Around
from llmtrain.contracts import Engine
from llmtrain.data.build import Datasets, cache_directory, prepare_data, prepare_tokenizer
from llmtrain.data.loader import Loader, evaluation_batches
from llmtrain.models.hub import open_model, open_other_model
from llmtrain.recipe import schema
from llmtrain.recipe.batch import BatchPlan
from tests import tiny
from tests.chats import sft_recipe

TEACHER = {
    "kind": "config",
    "architecture": "llama",
    # Far from even, and of another width and depth than the student.
    "config": tiny.LLAMA | {"hidden_size": 48, "num_hidden_layers": 1, "initializer_range": 0.3, "vocab_size": 420},
}


class Case(NamedTuple):
    """A student, a teacher and conversations."""

    recipe: schema.Recipe
    tokenizer: Any
    datasets: Datasets
    engine: Engine
    teacher: nn.Module
    made: Distilled
    loader: Loader

    @property
    def student(self) -> nn.Module:
        return self.engine.model


def case(directory: Path, *, engine: dict[str, Any] | None = None, **algorithm: Any) -> Case:
    """As `llmtrain.run` puts it together, in one process."""
    settings = {"kind": "distillation", "teacher": TEACHER, "max_new_tokens": 8} | algorithm
    batch = {"sequences": 8, "micro_sequences": 4}
    options = {"kind": "auto", "timeout_seconds": 60} | (engine or {})
    recipe = schema.Recipe.model_validate(sft_recipe(directory, algorithm=settings, batch=batch, engine=options))
    cache = cache_directory(recipe.data.cache_dir)
    tokenizer = prepare_tokenizer(recipe, cache).tokenizer
    datasets = prepare_data(recipe, tokenizer, cache)
    blueprint = open_model(recipe, tokenizer)
    assert isinstance(recipe.algorithm, schema.Distillation)
    teacher = engines.prepare_frozen(open_other_model(recipe.algorithm.teacher, recipe, tokenizer), recipe, tiny.ALONE)
    student = engines.prepare(blueprint, recipe, tiny.ALONE)
    loader = Loader(datasets.train, datasets.order(recipe.seed), 8, 4, rank=0, world_size=1)
    held_out = evaluation_batches(datasets.validation, 16, 4, rank=0, world_size=1)
    template = datasets.documents.chat_template
    plan, decoder = BatchPlan(8, 4, 2, 1), blueprint.decoder
    around = Around(student, decoder, tiny.ALONE, directory, nullcontext, teacher=teacher)
    made = distilled(recipe, plan, loader, held_out, tokenizer, template, around)
    return Case(recipe, tokenizer, datasets, student, teacher.model, made, loader)


class Frozen(NamedTuple):
    """A `FrozenModel` of a model that is there already."""

    model: nn.Module
    evaluating: Callable[[], Any] = torch.no_grad

    def full_parameters(self, names: Any = None) -> Any:
        yield from self.model.named_parameters()
