"""What DeepSpeed engines must do, run on real gloo ranks by test_deepspeed.py: one launch, many checks.

    torchrun --nproc-per-node 2 deepspeed_checks.py DIRECTORY [CHECK ...]

Writes DIRECTORY/results.json: for each check the empty string, or what went wrong.
"""

import functools
import gc
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from llmtrain import distributed
from llmtrain.engines import deepspeed_setup as setup
from llmtrain.engines.deepspeed import DeepSpeedEngine, DeepSpeedFrozen
from llmtrain.errors import InputError, TrainingError
from llmtrain.models.blueprint import Blueprint
from tests import adapters
from tests.distributed.deepspeed_adapters import adapters_in_layers, learning_rates, prompts
from tests.distributed.deepspeed_case import (
    CPU,
    LR,
    SECONDS,
    Case,
    Plain,
    assert_close,
    assert_trains_alike,
    batches,
    blueprint,
    gathered,
    in_bf16,
    nll,
    whole,
    write,
)


def equals_plain(case: Case, stage: int) -> None:
    assert_trains_alike(case, case.engine(stage), Plain(blueprint()))


def tied(case: Case, stage: int) -> None:
    engine = case.engine(stage, tied=True)
    assert_trains_alike(case, engine, Plain(blueprint(tied=True)))
    names = [name for name in engine.state() if "embed" in name or "lm_head" in name]
    assert all("embed" in name for name in names), names


def checkpointed(case: Case, stage: int) -> None:
    assert_trains_alike(case, case.engine(stage, activation_checkpointing="full"), Plain(blueprint()))


def cpu_offload(case: Case, stage: int) -> None:
    options = {"offload_optimizer": "cpu"} | ({"offload_parameters": "cpu"} if stage == 3 else {})
    engine = case.engine(stage, **options)
    assert "optimizer on cpu" in engine.describe()
    assert_trains_alike(case, engine, Plain(blueprint()))


def not_finite(case: Case, stage: int) -> None:
    """A gradient that is not finite, on one rank, changes nothing and leaves nothing behind."""
    engine, plain = case.engine(stage), Plain(blueprint())
    for number, micros in enumerate(batches(4)):
        if number in (0, 2):
            before = whole(engine)
            result = case.step(engine, micros, poison=float("nan") if case.world.rank == 1 else 1.0)
            assert not result.applied and not math.isfinite(result.grad_norm)
            assert_close(whole(engine), before, 0)
        else:
            assert case.step(engine, micros).applied
            plain.step(micros)
    assert_close(whole(engine), plain.model.state_dict(), 1e-6)
    assert all(step == 2 for name, step in gathered(engine.state()).items() if name.endswith(".step"))


def state_moves(case: Case, stage: int) -> None:
    """The state of `stage` goes on in every stage and in plain AdamW; in the same stage bit for bit."""
    first = case.engine(stage)
    steps = list(batches(6))
    for micros in steps[:3]:
        case.step(first, micros)
    state = gathered(first.state())
    for micros in steps[3:]:
        case.step(first, micros)
    expected = gathered(first.state())
    for other in range(4):
        engine = case.engine(other, seed=1)
        write(engine, state)
        assert_close(gathered(engine.state()), state, 0)
        for micros in steps[3:]:
            case.step(engine, micros)
        assert_close(gathered(engine.state()), expected, 0 if other == stage else 1e-5)
    plain = Plain(blueprint(seed=1))
    plain.load(state)
    for micros in steps[3:]:
        plain.step(micros)
    assert_close(plain.model.state_dict(), {name: expected[f"model.{name}"] for name in plain.model.state_dict()}, 1e-5)


def state_moves_of(case: Case, stage: int, **options: Any) -> None:
    """A fresh engine of the same kind goes on bit for bit, from any weights; and after no step at all."""
    first, second = case.engine(stage, **options), case.engine(stage, seed=1, **options)
    write(second, gathered(first.state()))
    assert_close(whole(second), whole(first), 0)
    one, other = batches(2)
    assert case.step(first, one) == case.step(second, one)
    third = case.engine(stage, seed=2, **options)
    write(third, gathered(first.state()))
    assert case.step(first, other) == case.step(third, other)
    assert_close(gathered(third.state()), gathered(first.state()), 0)


def mixed(case: Case, stage: int) -> None:
    """Float32 weights, which begin unrounded, beside bf16 ones."""
    engine, plain = case.engine(stage, precision="bf16_mixed"), Plain(blueprint(), "bf16_mixed")
    assert_close(whole(engine), plain.model.state_dict(), 0)
    # More steps say less: one weight that rounds the other way to bf16 changes all gradients a little.
    assert_trains_alike(case, engine, plain, steps=1)
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    state_moves_of(case, stage, precision="bf16_mixed")


def autocast(case: Case, stage: int) -> None:
    engine, plain = case.engine(stage, precision="bf16_autocast"), Plain(blueprint(), "bf16_autocast")
    micros = next(batches(1))
    exact = Plain(blueprint()).step(micros)
    assert_trains_alike(case, engine, plain, steps=1)
    norm = case.step(case.engine(stage, precision="bf16_autocast"), micros).grad_norm
    assert abs(norm / exact - 1) > 1e-5, "nothing was computed in bf16"


def mixed_not_finite(case: Case, stage: int) -> None:
    engine = case.engine(stage, precision="bf16_mixed")
    micros = next(batches(1))
    before = gathered(engine.state())
    assert not case.step(engine, micros, poison=float("inf") if case.world.rank == 0 else 1.0).applied
    assert_close(gathered(engine.state()), before, 0)
    assert case.step(engine, micros) == case.step(case.engine(stage, precision="bf16_mixed"), micros)


def frozen(case: Case, stage: int) -> None:
    """Two that train and one that is asked, in one process, in turns."""
    policy, critic = case.engine(stage), case.engine(stage, seed=1)
    reference = DeepSpeedFrozen(blueprint(seed=2), case.recipe(stage), case.world)
    plain, plain_critic, plain_reference = (Plain(blueprint(seed=seed)) for seed in range(3))
    for micros in batches(2):
        for micro in case.mine(micros):
            with reference.evaluating():
                ours = nll(reference.model, micro)
                assert torch.allclose(ours, nll(plain_reference.model, micro), rtol=1e-6) and not ours.requires_grad
        assert case.step(policy, micros).applied and case.step(critic, micros).applied
        with policy.evaluating():
            nll(policy.model, case.mine(micros)[0])
        plain.step(micros)
        plain_critic.step(micros)
    assert_close(whole(policy), plain.model.state_dict(), 1e-6)
    assert_close(whole(critic), plain_critic.model.state_dict(), 1e-6)
    assert_close(whole(reference), plain_reference.model.state_dict(), 0)
    if stage == 3:
        kept = sum(p.ds_tensor.numel() for p in reference.model.parameters())
        assert kept < 0.55 * sum(p.ds_numel for p in reference.model.parameters())
        assert all(p.numel() == 0 for p in reference.model.parameters()), "weights stay whole after a forward"


def frozen_mixed(case: Case, stage: int) -> None:
    reference = DeepSpeedFrozen(blueprint(), case.recipe(stage, precision="bf16_mixed"), case.world)
    plain = in_bf16(Plain(blueprint()).model)
    micro = next(batches(1))[0]
    with reference.evaluating(), torch.no_grad():
        assert torch.equal(nll(reference.model, micro), nll(plain, micro))
    assert {tensor.dtype for tensor in whole(reference).values()} == {torch.float32}


def names(case: Case, stage: int) -> None:
    engine = case.engine(stage, tied=True)
    plain = Plain(blueprint(tied=True))
    assert [name for name, _ in engine.full_parameters()] == list(plain.model.state_dict())
    assert_close(whole(engine), plain.model.state_dict(), 0)


def round_robin(case: Case, stage: int) -> None:
    state_moves_of(case, stage, zero={"round_robin_gradients": True})
    assert_close(whole(case.engine(stage, zero={"round_robin_gradients": True})), whole(case.engine(0)), 0)


def sub_groups(case: Case, stage: int) -> None:
    """Several flat tensors an optimizer group, and small parameters kept whole."""
    zero = {"sub_group_size": 1500, "stage3_param_persistence_threshold": 100}
    assert_trains_alike(case, case.engine(stage, zero=zero), Plain(blueprint()), steps=2)
    state_moves_of(case, stage, zero=zero)


def secondary_shards(case: Case, stage: int) -> None:
    plus = {"hpz_partition_size": 2}
    assert_trains_alike(case, case.engine(stage, zero_plus_plus=plus), Plain(blueprint()), steps=2)
    state_moves_of(case, stage, zero_plus_plus=plus)


def unused(case: Case, stage: int, **options: Any) -> None:
    """A parameter without a gradient in some micro-batches, or in all, gets nothing from the step before."""
    engine, plain = case.engine(stage, **options), Plain(blueprint())

    def without_head(model: nn.Module) -> Tensor:
        loss: Tensor = model(torch.tensor([[5, 6]]), None, lambda hidden, head: hidden.sum() / 10)
        return loss

    first, second = batches(2)
    case.step(engine, first)
    plain.step(first)
    with engine.accumulate(last=False):
        engine.backward(without_head(engine.model) / case.world.size)
    case.step(engine, second)
    without_head(plain.model).backward()
    plain.step(second)
    assert_close(whole(engine), plain.model.state_dict(), 1e-6)

    before = gathered(engine.state())
    with engine.accumulate(last=True):
        engine.backward(without_head(engine.model))
    engine.step(LR)
    after = gathered(engine.state())
    for moment, decay in (("exp_avg", 0.9), ("exp_avg_sq", 0.95)):
        name = f"optimizer.hf.lm_head.weight.{moment}"
        assert_close({name: after[name]}, {name: decay * before[name]}, 1e-6)


def unused_offloaded(case: Case, stage: int) -> None:
    unused(case, stage, offload_optimizer="cpu")


def layer_by_layer(case: Case, stage: int) -> None:
    """No rank holds more than a layer whole while the model is made."""

    original = Blueprint.materialise

    def watched(self: Blueprint, module: nn.Module, device: torch.device) -> None:
        wholes = [name for name, p in self.decoder.named_parameters() if not p.is_meta and p.numel()]
        assert not wholes, f"whole while {type(module).__name__} is made: {wholes}"
        original(self, module, device)

    plan = blueprint()
    plan.materialise = functools.partial(watched, plan)  # type: ignore[method-assign]
    DeepSpeedEngine(plan, case.recipe(stage, precision="bf16_mixed"), case.world)
    plan, asked = case.blueprint_with(adapters.KINDS["lora, dora"], stage, precision="bf16_mixed")
    plan.materialise = functools.partial(watched, plan)  # type: ignore[method-assign]
    DeepSpeedEngine(plan, asked, case.world)


def loss_scale(case: Case, stage: int) -> None:
    """The scaler of fp16, which no CPU has, put into a float32 engine: its state moves with the rest."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    def scaled(seed: int) -> DeepSpeedEngine:
        engine = case.engine(stage, seed=seed)
        assert engine._zero is not None
        engine._zero._fp16 = True
        engine.model.optimizer.loss_scaler = DynamicLossScaler(2.0**8, 2, 1.0, 2, False)
        return engine

    first, second = scaled(0), scaled(1)
    for number, micros in enumerate(batches(3)):
        case.step(first, micros, poison=math.inf if number < 2 else 1.0)
    assert first.model.optimizer.loss_scaler.cur_scale == 2.0**7
    write(second, gathered(first.state()))
    assert vars(second.model.optimizer.loss_scaler) == vars(first.model.optimizer.loss_scaler)
    for micros in batches(3, seed=9):
        assert case.step(first, micros) == case.step(second, micros)


def deadlines(case: Case, stage: int) -> None:
    case.engine(stage)
    for group in distributed_c10d._world.pg_map:
        assert group._get_backend(CPU).options._timeout.total_seconds() == SECONDS, group


def asked_equals_runs(case: Case, stage: int) -> None:
    engine = case.engine(stage)
    flats = engine._zero.flats
    setup.verify(engine.model, case.recipe(stage), case.world, engine._zero.num_elements(), flats)
    for other in (
        case.recipe(3 - stage),
        case.recipe(stage, precision="bf16_mixed"),
        case.recipe(stage, offload_optimizer="cpu"),
    ):
        with pytest.raises(TrainingError, match="was asked for"):
            setup.verify(engine.model, other, case.world, engine._zero.num_elements(), flats)


def user_settings(case: Case, stage: int) -> None:
    with pytest.raises(InputError, match=r"json: zero_optimization.stage: 1 contradicts engine.zero_stage: 2 "):
        case.engine(stage, zero={"stage": 1})
    with pytest.raises(InputError, match=r"(?s)json: DeepSpeed .* refuses .*allgather_bucket_size"):
        case.engine(stage, zero={"allgather_bucket_size": "large"})
    assert case.engine(stage, zero={"reduce_bucket_size": 1234}).model.zero_reduce_bucket_size() == 1234


def nvme(case: Case, stage: int) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    options = {"offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme_path": str(case.directory / "nvme")}
    if AsyncIOBuilder().is_compatible():
        engine = case.engine(stage, **options)
        assert_trains_alike(case, engine, Plain(blueprint()))
        state_moves_of(case, stage, **options)
        return
    with pytest.raises(InputError, match=r"^engine.offload_optimizer: .*\n.*libaio"):
        case.engine(stage, **options)


STAGES = (0, 1, 2, 3)
CHECKS: dict[str, tuple[Callable[[Case, int], None], tuple[int, ...]]] = {
    check.__name__: (check, stages)
    for check, stages in (
        (equals_plain, STAGES),
        (tied, STAGES),
        (checkpointed, (1, 3)),
        (adapters_in_layers, STAGES),
        (prompts, STAGES),
        (learning_rates, STAGES),
        (cpu_offload, (1, 2, 3)),
        (not_finite, STAGES),
        (state_moves, STAGES),
        (mixed, (1, 2, 3)),
        (mixed_not_finite, (1, 2, 3)),
        (frozen, STAGES),
        (frozen_mixed, (2, 3)),
        (names, STAGES),
        (round_robin, (1, 2)),
        (sub_groups, (3,)),
        (unused, (1, 2, 3)),
        (unused_offloaded, (1, 2, 3)),
        (layer_by_layer, (3,)),
        (loss_scale, (2,)),
        (deadlines, (1, 2, 3)),
        (asked_equals_runs, (1, 2)),
        (user_settings, (2,)),
        (nvme, (3,)),
        # Their effects outlast them in DeepSpeed's globals.
        (secondary_shards, (3,)),
        (autocast, STAGES),
    )
}


def run(names: Iterable[str], directory: Path, results: dict[str, str]) -> None:
    """The checks of these names in one process group."""
    with distributed.joined("cpu", SECONDS) as world:
        for name, stage in [(check, stage) for check in names for stage in CHECKS[check][1]]:
            problem = ""
            try:
                CHECKS[name][0](Case(world, directory), stage)
            except (AssertionError, pytest.fail.Exception):
                problem = traceback.format_exc()
            results[f"{name}[{stage}]"] = "".join(distributed.gather_objects(problem))
            if world.is_main:
                (directory / "results.json").write_text(json.dumps(results))


def main(directory: Path, names: list[str]) -> None:
    results: dict[str, str] = {}
    if "RANK" in os.environ:
        run([name for name in CHECKS if not names or name in names], directory, results)  # in their order
    else:
        # One process without a launcher, as several runs in one: each has a process group of its own.
        for name in names:
            run([name], directory, results)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage several times an engine
    main(Path(sys.argv[1]), sys.argv[2:])
    # Some sixty engines leave hundreds of process groups to the interpreter's end, where gloo was seen to abort once
    # ("terminate called without an active exception"). With what real runs end is tested by real runs.
    sys.stdout.flush()
    os._exit(0)
