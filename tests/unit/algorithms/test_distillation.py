"""Which teachers serve, and what is said of those that do not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.algorithms.distillation import check_teacher, check_tokenizer
from llmtrain.data.build import cache_directory, prepare_tokenizer
from llmtrain.errors import InputError
from llmtrain.models.hub import open_other_model
from llmtrain.recipe import schema
from tests import tiny
from tests.chats import sft_recipe, write_chat_model
from tests.distilling import TEACHER, Frozen


def asked(directory: Path, teacher: dict[str, Any], **overrides: Any) -> None:
    settings = {"kind": "distillation", "teacher": teacher}
    recipe = schema.Recipe.model_validate(sft_recipe(directory, algorithm=settings, **overrides))
    check_tokenizer(recipe, prepare_tokenizer(recipe, cache_directory(recipe.data.cache_dir)).tokenizer)


def test_a_teacher_of_the_same_tokenizer_serves(tmp_path: Path) -> None:
    write_chat_model(tmp_path / "teacher", vocab_size=448)
    asked(tmp_path, {"kind": "pretrained", "path": str(tmp_path / "teacher")})
    asked(tmp_path, TEACHER)


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    tiny.decoder().hf.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="another tokenizer.*has id") as found:
        asked(tmp_path, {"kind": "pretrained", "path": str(tmp_path / "other")})
    assert found.value.where == "algorithm.teacher"


def test_a_token_that_the_teacher_does_not_know_is_refused(tmp_path: Path) -> None:
    write_chat_model(tmp_path / "teacher")
    with pytest.raises(InputError, match=r"'<\|new\|>' has id \d+ in the student's and none in the teacher's"):
        asked(
            tmp_path,
            {"kind": "pretrained", "path": str(tmp_path / "teacher")},
            tokenizer={"kind": "model", "add_tokens": ["<|new|>"]},
        )


def test_a_teacher_that_was_made_for_shorter_rows_is_named(tmp_path: Path) -> None:
    write_chat_model(tmp_path / "teacher", max_position_embeddings=64)
    teacher = {"kind": "pretrained", "path": str(tmp_path / "teacher")}
    algorithm = {"kind": "distillation", "teacher": teacher}
    recipe = schema.Recipe.model_validate(sft_recipe(tmp_path, algorithm=algorithm))
    tokenizer = prepare_tokenizer(recipe, cache_directory(recipe.data.cache_dir)).tokenizer
    assert isinstance(recipe.algorithm, schema.Distillation)
    with pytest.raises(InputError, match="rows of 96 tokens, .* model of algorithm.teacher was made for 64") as found:
        open_other_model(recipe.algorithm.teacher, recipe, tokenizer, where="algorithm.teacher")
    assert found.value.where == "sequence_length"
    assert found.value.remedy is not None and found.value.remedy.startswith("use 64 or less, another model, or stretch")
    assert "algorithm.teacher.rope_parameters" in found.value.remedy


def test_a_diffusion_model_is_no_teacher(tmp_path: Path) -> None:
    from llmtrain.models.diffusion import Diffusion, save_diffusion

    write_chat_model(tmp_path / "teacher")
    save_diffusion(Diffusion("masked", 3, shift=False), tmp_path / "teacher")
    with pytest.raises(InputError, match="diffusion") as found:
        asked(tmp_path, {"kind": "pretrained", "path": str(tmp_path / "teacher")})
    assert found.value.where == "algorithm.teacher"


@pytest.mark.parametrize(
    ("architecture", "fields", "message", "where"),
    [
        ("granite", tiny.LLAMA | {"logits_scaling": 4.0}, "changes its logits after the head", "algorithm.teacher"),
        (
            "bert",
            {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
            "the teacher",
            "algorithm.teacher",
        ),
        ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 4}, "carries state from one", "data.packing"),
    ],
)
def test_a_teacher_is_asked_as_it_runs(
    architecture: str, fields: Any, message: str, where: str, tmp_path: Path
) -> None:
    """As the student is: a teacher whose logits are scaled would teach another distribution than its own."""
    teacher = {"kind": "config", "architecture": architecture, "config": fields}
    settings = {"kind": "distillation", "teacher": teacher}
    recipe = schema.Recipe.model_validate(sft_recipe(tmp_path, algorithm=settings))
    model = tiny.decoder(architecture, **fields).eval()
    with pytest.raises(InputError, match=message) as found:
        check_teacher(recipe, Frozen(model), model, torch.device("cpu"), 1)
    assert found.value.where == where and "the teacher: " in str(found.value)


def test_a_teacher_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        asked(tmp_path, {"kind": "gguf", "file": str(tmp_path / "none.gguf")})
