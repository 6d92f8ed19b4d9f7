"""What is refused before DeepSpeed is there; what it does is checked in tests/distributed/test_deepspeed.py."""

import sys

import pytest

from llmtrain.engines import deepspeed_setup as setup
from llmtrain.errors import InputError
from tests import tiny


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    recipe = tiny.recipe(engine={"kind": "deepspeed", "zero_stage": 2})
    with (
        pytest.raises(InputError, match=r"(?s)engine.kind: .*pip install 'llmtrain\[deepspeed\]'"),
        setup.brought_up(recipe, tiny.ALONE),
    ):
        pass


def test_describe_says_what_lies_elsewhere() -> None:
    engine = {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}
    recipe = tiny.recipe(engine=engine, precision="bf16_mixed")
    expected = "deepspeed: ZeRO-3 over 1 rank on cpu, bf16_mixed, optimizer on cpu, weights on cpu"
    assert setup.describe(recipe, tiny.ALONE) == expected
