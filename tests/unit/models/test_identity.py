"""Whether the weights that a recipe's model begins with are still the same."""

from pathlib import Path

import pytest
import torch

from llmtrain.models.identity import weights_identity
from llmtrain.recipe.loading import load_recipe
from tests.runs import write_recipe
from tests.saved import write_model


@pytest.mark.parametrize("pickled", [False, True])
def test_it_is_of_the_content_of_the_weights(pickled: bool, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    weights = model / "model.safetensors"
    if pickled:
        weights.unlink()
        weights = model / "pytorch_model.bin"
        torch.save({"weight": torch.zeros(3)}, weights)
    file = write_recipe(tmp_path, model={"kind": "pretrained", "path": str(model)}, tokenizer={"kind": "model"})
    recipe = load_recipe(file).recipe

    def found() -> str:
        return weights_identity(recipe, tmp_path / "cache")

    before, content = found(), weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content)
    (model / "other").mkdir()
    (model / "other" / weights.name).write_bytes(b"of another model")
    (model / "training_args.bin").write_bytes(b"no weights")
    assert found() == before
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert found() != before
