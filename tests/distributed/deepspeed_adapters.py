"""What adapters must do under DeepSpeed: checks of deepspeed_checks.py, in a launch of their own."""

import torch

from llmtrain import distributed
from tests import adapters
from tests.distributed.deepspeed_case import LR, Case, Tuned, assert_close, batches, gathered, whole, write

# Of each way that peft's layers read their weights, which matters where these are sharded.
ADAPTERS = ("lora", "lora, dora", "lora, whole embeddings", "lora, on the embedding", "ia3", "VBLORA")
PROMPTS = ("prompt_tuning", "p_tuning, lstm", "prefix_tuning")


def adapters_in_layers(case: Case, stage: int) -> None:
    for kind in ADAPTERS if stage == 3 else ADAPTERS[2:3] + ADAPTERS[:1]:
        tuned = case.tuned(stage, adapters.KINDS[kind])
        trains_as_plain(case, tuned, kind)
        if kind == "lora":
            second = case.tuned(stage, adapters.KINDS[kind]).engine
            write(second, gathered(tuned.engine.state()))
            micros = next(batches(1, seed=9))
            assert case.step(second, micros) == case.step(tuned.engine, micros)


def prompts(case: Case, stage: int) -> None:
    for kind in PROMPTS if stage == 3 else PROMPTS[:1]:
        trains_as_plain(case, case.tuned(stage, adapters.KINDS[kind]), kind)


def trains_as_plain(case: Case, tuned: Tuned, kind: str) -> None:
    engine, adapter, plain = tuned
    trained = {f"model.{name}" for name in plain.parameters}
    for micros in batches(3):
        result, norm = case.step(engine, micros), plain.step(micros)
        assert abs(result.grad_norm / norm - 1) < 2e-6, (kind, result, norm)
    assert_close(whole(engine), plain.model.state_dict(), 3e-6)
    state = {name for of_rank in distributed.gather_objects(list(engine.state())) for name in of_rank}
    assert {name for name in state if name.startswith("model.")} == trained, "frozen weights are in the state"
    assert {name for name, _ in engine.full_parameters(adapter.names)} == adapter.names


def learning_rates(case: Case, stage: int) -> None:
    """Groups of their own; their state goes on without them."""
    groups = [
        {"names": "*lora_B*", "lr_ratio": 4.0},
        {"names": "*down_proj*", "lr_ratio": 0.5, "weight_decay": 0.0},
    ]
    engine, _, plain = case.tuned(stage, adapters.LORA, optimizer={"groups": groups})
    settings = []
    for name, parameter in plain.parameters.items():
        lr, decay = (LR * 4, 0.1) if "lora_B" in name else (LR / 2, 0.0) if "down_proj" in name else (LR, 0.1)
        settings.append({"params": [parameter], "lr": lr, "weight_decay": decay})
    plain.optimizer = torch.optim.AdamW(settings, betas=(0.9, 0.95), eps=1e-4)
    for micros in batches(3):
        case.step(engine, micros)
        plain.step(micros)
    assert_close(whole(engine), plain.model.state_dict(), 3e-6)
    other = case.tuned(stage, adapters.LORA).engine
    state = gathered(engine.state())
    write(other, state)
    assert_close(gathered(other.state()), state, 0)
