"""What is asked of FSDP on real ranks; see test_fsdp.py, which starts them."""

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from llmtrain.contracts import Shard
from llmtrain.distributed import World, gather_objects
from llmtrain.engines.fsdp import FSDPEngine, FSDPFrozen, shard
from llmtrain.errors import TrainingError
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.decoder import Decoder
from tests import tiny
from tests.distributed.fsdp_adapters import (
    adapters_train_over_a_frozen_base,
    frozen_weights_are_kept_as_they_are_computed_with,
    layers_that_share_weights_are_refused,
    learning_rates_of_groups,
)
from tests.distributed.fsdp_case import (
    CPU,
    LR,
    QWEN3,
    Truth,
    assert_near,
    assert_same_state,
    batches,
    blueprint,
    compare,
    logits,
    loss_sum,
    num_counted,
    recipe,
    saved,
    step,
    whole,
)


def trains_as_one_process(relative: float = 1e-6, **overrides: Any) -> Callable[[World], None]:
    def check(world: World) -> None:
        compare(recipe(**overrides), world, relative=relative)

    return check


def bf16_mixed_is_near_float32_and_computes_in_bf16(world: World) -> None:
    engine = compare(recipe(precision="bf16_mixed"), world, relative=2e-2)
    for name, run in engine.state().items():
        assert run.local.dtype == torch.float32, name
    assert engine.describe().endswith("bf16_mixed")
    with engine.evaluating():
        assert logits(engine.model, next(batches())[0]).dtype == torch.bfloat16


def other_precisions(world: World) -> None:
    compare(recipe(precision="bf16_autocast"), world, relative=2e-2)
    asked = recipe(precision="bf16")
    engine = FSDPEngine(blueprint(asked), asked, world)
    for _, (ids, targets) in zip(range(2), batches(), strict=False):
        assert step(engine, ids, targets, world)[1]
    assert {tensor.dtype for name, tensor in engine.full_parameters()} == {torch.bfloat16}


def a_forward_without_backward_leaves_nothing_stale(**options: Any) -> Callable[[World], None]:
    """The next forward must gather what the optimizer wrote, in evaluation and outside of it."""

    def check(world: World) -> None:
        asked = recipe(engine=options)
        engine, truth = FSDPEngine(blueprint(asked), asked, world), Truth(whole(asked))
        ids, targets = next(batches())
        own = ids[world.rank :: world.size], targets[world.rank :: world.size]
        for index in range(4):
            if index in (0, 3):  # in between the next forward comes right after the step
                with engine.evaluating():
                    given = logits(engine.model, ids)
                torch.testing.assert_close(given, logits(truth.model, ids), rtol=1e-4, atol=1e-5)
            with engine.accumulate(last=True):
                engine.backward(loss_sum(engine.model, *own) / num_counted(targets))
            logits(engine.model, ids)  # of a rollout: it gathers what the optimizer is about to change
            engine.step(LR)
            truth.step(ids, targets)
        assert_near(engine, truth.model)
        assert all(isinstance(p, DTensor) for p in engine.model.parameters())

    return check


def a_step_that_is_not_finite_is_skipped_on_all_ranks(world: World) -> None:
    asked = recipe(ema={"decay": 0.9})
    engine = FSDPEngine(blueprint(asked), asked, world)
    source = batches()
    step(engine, *next(source), world)
    before = saved(engine)
    norm, applied = step(engine, *next(source), world, scale=float("nan") if world.rank == 0 else 1.0)
    assert not applied and norm != norm
    assert_same_state(engine, before)
    assert step(engine, *next(source), world)[1]
    assert all(p.grad is None for p in engine.model.parameters())


def averaged_weights(world: World) -> None:
    asked = recipe(ema={"decay": 0.9})
    engine, truth = FSDPEngine(blueprint(asked), asked, world), Truth(whole(asked))
    averages = {name: p.detach().clone() for name, p in truth.model.named_parameters()}
    for n, (ids, targets) in zip(range(1, 5), batches(), strict=False):
        step(engine, ids, targets, world)
        truth.step(ids, targets)
        for name, p in truth.model.named_parameters():
            averages[name].lerp_(p.detach(), 1 - min(0.9, (1 + n) / (10 + n)))
    own = copy.deepcopy(truth.model)
    truth.model.load_state_dict(averages)
    assert_near(engine, truth.model)
    ids = next(batches())[0]
    before = saved(engine)
    with engine.evaluating():
        torch.testing.assert_close(logits(engine.model, ids), logits(truth.model, ids), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(engine.model, ids), logits(own, ids), rtol=1e-4, atol=1e-5)
    engine.state_loaded()
    assert_same_state(engine, before)  # its own come back bit for bit


def state_continues_bit_for_bit(**overrides: Any) -> Callable[[World], None]:
    def check(world: World) -> None:
        asked = recipe(ema={"decay": 0.9}, **overrides)
        first = FSDPEngine(blueprint(asked), asked, world)
        complete = set(first.state())
        source = batches()
        for _ in range(2):
            step(first, *next(source), world)
        assert set(first.state()) == complete
        kept, rest = saved(first), [next(source) for _ in range(2)]
        for batch in rest:
            step(first, *batch, world)
        other = asked.model_copy(update={"seed": 5})
        second = FSDPEngine(blueprint(other), other, world)
        with second.evaluating():
            logits(second.model, rest[0][0])  # a forward before the load leaves nothing stale either
        for name, run in second.state().items():
            run.local.copy_(kept[name])
        second.state_loaded()
        for batch in rest:
            step(second, *batch, world)
        assert_same_state(second, saved(first))

    return check


def shards_cover_the_whole(**overrides: Any) -> Callable[[World], None]:
    """Every element of every tensor is in just one run, but for replicas, at the place that is told."""

    def check(world: World) -> None:
        asked = recipe(architecture="qwen3", fields=QWEN3, **overrides)
        engine, truth = FSDPEngine(blueprint(asked), asked, world), whole(asked)
        step(engine, *next(batches()), world)
        truth.load_state_dict(dict(engine.full_parameters()))
        state = engine.state()
        expected = {f"model.{name}": p.detach() for name, p in truth.named_parameters()}
        names = {*expected}
        for name in list(expected):
            bare = name.removeprefix("model.")
            names |= {f"optimizer.{bare}.{key}" for key in ("exp_avg", "exp_avg_sq", "step")}
        assert state.keys() <= names
        for name, run in state.items():
            assert run.local.is_contiguous()
            if name in expected:
                flat = expected[name].flatten()
                assert torch.equal(flat[run.start : run.start + run.local.numel()], run.local.flatten()), name
        runs: list[dict[str, tuple[int, int, tuple[int, ...], int, int]]] = gather_objects(
            {name: (r.start, r.local.numel(), r.shape, r.replica, r.replicas) for name, r in state.items()}
        )
        assert {name for of_rank in runs for name in of_rank} == names
        assert any(set(of_rank) != names for of_rank in runs) is (world.size == 4 and asked.engine.shard_size is None)
        for name in names:
            pieces = [of_rank[name] for of_rank in runs if name in of_rank]
            shapes, replicas = {piece[2] for piece in pieces}, {piece[4] for piece in pieces}
            assert len(shapes) == len(replicas) == 1
            size, copies = torch.Size(shapes.pop()).numel(), replicas.pop()
            for replica in range(copies):
                end = 0
                for start, length, *_ in sorted(piece for piece in pieces if piece[3] == replica):
                    assert start == end
                    end += length
                assert end == size, name

    return check


def a_frozen_copy_beside_two_trained_models(world: World) -> None:
    """A reference, a policy and a critic whose head is one more module in the decoder."""
    asked = recipe()
    reference = FSDPFrozen(blueprint(asked), asked, world)
    policy = FSDPEngine(blueprint(asked), asked, world)

    def with_value_head() -> Decoder:
        decoder = tiny.decoder(seed=7, vocab_size=97)
        decoder.value = nn.Linear(32, 1)
        return decoder

    critic, truth = FSDPEngine(Blueprint(with_value_head()), asked, world), Truth(with_value_head())

    def value_loss(model: nn.Module, ids: Tensor) -> Tensor:
        # Only this rank's head is used of all that the root holds: lm_head has no gradient anywhere.
        loss: Tensor = model(ids, None, lambda hidden, head: model.value(hidden).square().sum())
        return loss

    ids, targets = next(batches())
    start = whole(asked)
    for _ in range(3):
        step(policy, ids, targets, world)
        with critic.accumulate(last=True):
            critic.backward(value_loss(critic.model, ids[world.rank :: world.size]) / 100)
        norm = critic.step(LR).grad_norm
        truth.optimizer.zero_grad()
        (value_loss(truth.model, ids) / 100).backward()
        for p in truth.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(truth.parameters, 0.5).item(), rel=1e-5)
        truth.optimizer.step()
        with reference.evaluating():
            assert torch.equal(logits(reference.model, ids), logits(start, ids))
    assert_near(critic, truth.model)
    assert_near(reference, start, relative=0)
    assert not any(p.requires_grad for p in reference.model.parameters())
    with pytest.raises(AssertionError):
        assert_near(policy, start)


def reductions_wait_for_the_last_micro_batch(world: World) -> None:
    """CommDebugMode counts the collectives that FSDP issues."""
    asked = recipe()
    engine = FSDPEngine(blueprint(asked), asked, world)
    ids, targets = next(batches())
    own = ids[world.rank :: world.size], targets[world.rank :: world.size]
    step(engine, ids, targets, world)
    units = 3  # two layers and the rest
    for last in (False, False, True):
        with CommDebugMode() as counts, engine.accumulate(last):
            engine.backward(loss_sum(engine.model, *own))
        ops = {str(operation).rpartition(".")[2]: count for operation, count in counts.get_comm_counts().items()}
        reduced = sum(count for name, count in ops.items() if "reduce" in name)
        gathered = sum(count for name, count in ops.items() if "gather" in name)
        assert reduced == (units if last else 0), ops
        assert gathered == units + 2, ops  # the layers once more for backward, the rest is kept
    engine.step(LR)


def no_rank_holds_the_whole_model(world: World) -> None:
    """Peak of resident memory while sharding, by the kernel's own high-water mark."""
    big = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 24}
    asked = recipe(fields=big)
    made = blueprint(asked)
    size = sum(p.numel() * 4 for p in made.decoder.parameters())
    assert size > 240 * 2**20
    seen: list[tuple[int, int]] = []

    def watch(layer: nn.Module, index: int) -> None:
        seen.append((index, sum(not p.is_meta for other in made.layers[index + 1 :] for p in other.parameters())))

    original = made.materialise

    def materialise(module: nn.Module, device: torch.device) -> None:
        original(module, device)
        if module in made.layers:
            watch(module, made.layers.index(module))

    made.materialise = materialise  # type: ignore[method-assign]
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins again at what is used now
    before = _memory("VmRSS")
    sharded = shard(made, asked, world)
    grown = _memory("VmHWM") - before
    assert seen == [(index, 0) for index in range(24)]  # later layers have no storage yet
    assert grown < size / world.size + 0.2 * size, f"{grown / 2**20:.0f} of {size / 2**20:.0f} MiB"
    assert sum(p.to_local().numel() for p in sharded.decoder.parameters()) * 4 <= size / world.size * 1.01


def _memory(field: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) * 1024


def asked_equals_runs(world: World) -> None:
    asked = recipe()
    made = blueprint(asked)
    sharded = shard(made, asked, world)
    sharded.check(made)
    for other, message in (
        (recipe(engine={"shard_size": 1}), "the ranks are .* and not"),
        (recipe(precision="bf16"), "is torch.float32 and not torch.bfloat16"),
    ):
        sharded._recipe = other
        with pytest.raises(TrainingError, match=f"engine fsdp does not run as asked: .*{message}"):
            sharded.check(made)
    sharded._recipe = asked
    made.layers[1] = nn.Linear(1, 1)
    with pytest.raises(TrainingError, match="layer 1 is no unit of its own"):
        sharded.check(made)


def names_are_the_decoders_own(world: World) -> None:
    asked = recipe(fields=tiny.LLAMA | {"tie_word_embeddings": True}, engine={"activation_checkpointing": "full"})
    engine, truth = FSDPEngine(blueprint(asked), asked, world), whole(asked)
    assert [name for name, _ in engine.full_parameters()] == list(truth.state_dict())
    assert {name for name in engine.state() if name.startswith("model.")} == {
        f"model.{name}" for name, _ in truth.named_parameters()
    }
    decoder = engine.model
    assert isinstance(decoder, Decoder) and isinstance(decoder, FSDPModule)
    assert decoder.num_layers() == 2
    assert decoder.hf.get_input_embeddings().weight is decoder.hf.get_output_embeddings().weight
    assert engine.describe() == f"fsdp: {world.size} ranks on cpu, fp32"


def hybrid_groups(world: World) -> None:
    asked = recipe(engine={"shard_size": 2})
    engine = compare(asked, world)
    assert engine.describe() == "fsdp: 2 x 2 ranks (replicate x shard) on cpu, fp32"
    mesh = next(engine.model.parameters()).device_mesh  # type: ignore[attr-defined]
    assert mesh.mesh_dim_names == ("replicate", "shard")
    for group in mesh.get_all_groups():
        assert group._get_backend(CPU).options._timeout == timedelta(seconds=60)  # and not torch's half hour
    run = engine.state()["model.hf.lm_head.weight"]
    assert isinstance(run, Shard)
    assert (run.start, run.replica, run.replicas) == (49 * 32 * (world.rank % 2), world.rank // 2, 2)


def groups_are_made_once(world: World) -> None:
    """A communicator costs memory on every GPU: neither models nor layers may each have their own."""
    for engine in ({"shard_size": 2}, {"reshard_after_forward": 2}):
        asked = recipe(engine=engine, fields=tiny.LLAMA | {"num_hidden_layers": 4})
        FSDPEngine(blueprint(asked), asked, world)
        before = len(dist.distributed_c10d._world.pg_map)
        FSDPEngine(blueprint(asked), asked, world)
        assert len(dist.distributed_c10d._world.pg_map) == before


CHECKS: dict[int, dict[str, Callable[[World], None]]] = {
    2: {
        "plain": trains_as_one_process(),
        "clipping_off": trains_as_one_process(optimizer={"clip_norm": None}),
        "clipping_hard": trains_as_one_process(optimizer={"clip_norm": 0.01}),
        "tied_embeddings": trains_as_one_process(fields=tiny.LLAMA | {"tie_word_embeddings": True}),
        "gpt2": trains_as_one_process(
            architecture="gpt2",
            fields={"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        ),
        "qwen3": trains_as_one_process(architecture="qwen3", fields=QWEN3),
        "cpu_offload": trains_as_one_process(engine={"cpu_offload": True}),
        "kept_after_forward": trains_as_one_process(engine={"reshard_after_forward": False}),
        "prefetch": trains_as_one_process(engine={"prefetch": 2}),
        "shards_of_one": trains_as_one_process(engine={"shard_size": 1}),
        "checkpointing_full": trains_as_one_process(engine={"activation_checkpointing": "full"}),
        "checkpointing_selective": trains_as_one_process(engine={"activation_checkpointing": "selective"}),
        "bf16_mixed": bf16_mixed_is_near_float32_and_computes_in_bf16,
        "other_precisions": other_precisions,
        "adapters": adapters_train_over_a_frozen_base,
        "adapters_bf16_mixed": frozen_weights_are_kept_as_they_are_computed_with,
        "learning_rates": learning_rates_of_groups,
        "shared_by_layers": layers_that_share_weights_are_refused,
        "stale": a_forward_without_backward_leaves_nothing_stale(),
        "stale_when_kept": a_forward_without_backward_leaves_nothing_stale(reshard_after_forward=False),
        "not_finite": a_step_that_is_not_finite_is_skipped_on_all_ranks,
        "averaged": averaged_weights,
        "state": state_continues_bit_for_bit(),
        "state_offloaded": state_continues_bit_for_bit(engine={"cpu_offload": True}),
        "cover": shards_cover_the_whole(),
        "several_models": a_frozen_copy_beside_two_trained_models,
        "reductions": reductions_wait_for_the_last_micro_batch,
        "memory": no_rank_holds_the_whole_model,
        "asked_equals_runs": asked_equals_runs,
        "names": names_are_the_decoders_own,
    },
    4: {
        "plain": trains_as_one_process(),
        "qwen3": trains_as_one_process(architecture="qwen3", fields=QWEN3),
        "hybrid": hybrid_groups,
        "hybrid_bf16_mixed": trains_as_one_process(engine={"shard_size": 2}, precision="bf16_mixed", relative=2e-2),
        "resharded_to_two": trains_as_one_process(engine={"reshard_after_forward": 2}),
        "stale_when_resharded_to_two": a_forward_without_backward_leaves_nothing_stale(reshard_after_forward=2),
        "stale_hybrid": a_forward_without_backward_leaves_nothing_stale(shard_size=2),
        "averaged": averaged_weights,
        "state": state_continues_bit_for_bit(architecture="qwen3", fields=QWEN3),
        "state_hybrid": state_continues_bit_for_bit(engine={"shard_size": 2}),
        "cover": shards_cover_the_whole(),
        "cover_hybrid": shards_cover_the_whole(engine={"shard_size": 2}),
        "groups": groups_are_made_once,
    },
}
SLOW: dict[str, Callable[[World], None]] = {"compiled": trains_as_one_process(engine={"compile": True}, relative=1e-5)}
