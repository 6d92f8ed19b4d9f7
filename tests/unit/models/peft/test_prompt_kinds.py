"""Prompt learning puts causal text before a row: no way around the schema leads to it."""

import pytest
from peft import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from llmtrain.errors import InputError
from llmtrain.models.peft.config import peft_config
from tests import adapters, tiny

KINDS = sorted(
    kind.value for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(config, PromptLearningConfig)
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["masked_diffusion", "causal_lm"])
def test_adapter_kind_peft_takes_no_prompt_learning(
    kind: str, algorithm: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    asked = adapters.recipe(
        tmp_path_factory.getbasetemp(), {"kind": "peft", "type": kind.lower()}, algorithm={"kind": algorithm}
    )
    assert asked.adapter is not None
    with pytest.raises(InputError, match=f"{kind} cannot be trained here"):
        peft_config(asked.adapter, asked, tiny.decoder().hf)
