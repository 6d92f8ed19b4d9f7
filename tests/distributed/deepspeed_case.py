"""The tiny model, its batches, a plain twin, and DeepSpeed engines on this rank: what the checks are made of."""

import copy
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmtrain import distributed
from llmtrain.contracts import Engine, Shard, StepResult
from llmtrain.distributed import World
from llmtrain.engines.deepspeed import DeepSpeedEngine, DeepSpeedFrozen
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.decoder import Decoder
from llmtrain.models.loss_head import IGNORE_INDEX, linear_cross_entropy
from llmtrain.models.peft import Adapter
from llmtrain.recipe.schema import Recipe
from tests import adapters, tiny

CPU = torch.device("cpu")
VOCABULARY = 97  # so that parameters do not divide by the ranks
RANKS, MICROS = 2, 3  # micro-batches of a rank; one rank has all of them
SECONDS = 77
LR, CLIP = 1e-2, 1.0
# With a small eps Adam turns the last bits of a gradient near zero into a good part of a step.
ADAMW = {"kind": "adamw", "lr": LR, "eps": 1e-4, "weight_decay": 0.1, "clip_norm": CLIP}
Micro = tuple[Tensor, Tensor]
State = dict[str, Tensor]


class Case:
    """This rank's engines, all on the same tiny model."""

    def __init__(self, world: World, directory: Path):
        self.world, self.directory = world, directory

    def recipe(
        self, stage: int, *, precision: str = "fp32", zero: dict[str, Any] | None = None, **engine: Any
    ) -> Recipe:
        """Everything is sharded, however small, and buckets are smaller than the model."""
        settings = {
            "zero_optimization": {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 4000} | (zero or {})
        }
        name = f"{zlib.crc32(json.dumps(settings).encode())}.json"
        if self.world.is_main:
            (self.directory / name).write_text(json.dumps(settings))
        distributed.barrier()
        section = {
            "kind": "deepspeed",
            "zero_stage": stage,
            "timeout_seconds": SECONDS,
            "config": str(self.directory / name),
        }
        batch = {"sequences": 2 * RANKS * MICROS, "micro_sequences": 2}
        return tiny.recipe(batch=batch, optimizer=ADAMW, precision=precision, engine=section | engine)

    def engine(self, stage: int, *, seed: int = 0, tied: bool = False, **options: Any) -> DeepSpeedEngine:
        return DeepSpeedEngine(blueprint(seed, tied), self.recipe(stage, **options), self.world)

    def asked(self, adapter: dict[str, Any], stage: int, **options: Any) -> Recipe:
        """An adapter on the tiny pretrained model."""
        base = self.directory / "base"
        if self.world.is_main and not base.exists():
            adapters.pretrained(base, vocab_size=VOCABULARY)
        distributed.barrier()
        section = adapters.recipe(base, adapter, optimizer=ADAMW | options.pop("optimizer", {}))
        kept = ("model", "tokenizer", "adapter", "data", "optimizer")
        return self.recipe(stage, **options).model_copy(update={name: section.__dict__[name] for name in kept})

    def blueprint_with(self, adapter: dict[str, Any], stage: int, **options: Any) -> tuple[Blueprint, Recipe]:
        """The adapter put in before any weight is there."""
        asked = self.asked(adapter, stage, **options)
        return adapters.adapted(asked)[0], asked

    def tuned(self, stage: int, adapter: dict[str, Any], **options: Any) -> "Tuned":
        """The engine, and the same in one process."""
        asked = self.asked(adapter, stage, **options)
        (plan, made), (whole_plan, _) = adapters.adapted(asked), adapters.adapted(asked)
        return Tuned(DeepSpeedEngine(plan, asked, self.world), made, Plain(whole_plan))

    def mine(self, micros: list[Micro]) -> list[Micro]:
        share = len(micros) // self.world.size
        return micros[self.world.rank * share : (self.world.rank + 1) * share]

    def step(self, engine: Engine, micros: list[Micro], poison: float = 1.0) -> StepResult:
        total = counted(micros)
        mine = self.mine(micros)
        for index, micro in enumerate(mine):
            with engine.accumulate(index == len(mine) - 1):
                engine.backward(nll(engine.model, micro) * poison / total)
        return engine.step(LR)


class Tuned(NamedTuple):
    engine: DeepSpeedEngine
    adapter: Adapter
    plain: "Plain"


class Plain:
    """The oracle: one process, torch's own pieces, the whole global batch.

    With bf16_mixed a bf16 copy of the weights computes, and its gradients add up in float32.
    """

    def __init__(self, plan: Blueprint, precision: str = "fp32"):
        plan.materialise(plan.decoder, CPU)
        self.model = plan.decoder.train()
        self.autocast, self.mixed = precision == "bf16_autocast", precision == "bf16_mixed"
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        matrices = [p for p in self.parameters.values() if p.ndim >= 2 and min(p.shape) > 1]
        others = [p for p in self.parameters.values() if p.ndim < 2 or min(p.shape) == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=LR, betas=(0.9, 0.95), eps=1e-4)

    def step(self, micros: list[Micro]) -> float:
        total = counted(micros)
        computing = in_bf16(self.model) if self.mixed else self.model
        for micro in micros:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
                loss = nll(computing, micro) / total
            loss.backward()
            for ours, theirs in zip(self.model.parameters(), computing.parameters(), strict=True) if self.mixed else ():
                if theirs.grad is None:
                    continue
                ours.grad = theirs.grad.float() if ours.grad is None else ours.grad + theirs.grad.float()
                theirs.grad = None
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), CLIP).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[f"model.{name}"])
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state[parameter] = {key: state[f"optimizer.{name}.{key}"].clone() for key in keys}


def in_bf16(model: nn.Module) -> nn.Module:
    """A copy with bf16 parameters; buffers, of which rotary angles are made, stay float32."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return copied


def blueprint(seed: int = 0, tied: bool = False) -> Blueprint:
    fields = tiny.LLAMA | {"vocab_size": VOCABULARY, "eos_token_id": 1, "tie_word_embeddings": tied}
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields), dtype=torch.float32)
    return Blueprint(Decoder(hf), seed)


def batches(num: int, seed: int = 3) -> Iterator[list[Micro]]:
    """Global batches of micro-batches, of which ever less counts."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        micros = []
        for index in range(RANKS * MICROS):
            ids, targets = (torch.randint(3, VOCABULARY, (2, 11), generator=generator) for _ in range(2))
            targets[torch.rand(targets.shape, generator=generator) < 0.15 * (index + 1)] = IGNORE_INDEX
            micros.append((ids, targets))
        yield micros


def counted(micros: list[Micro]) -> int:
    return sum(int((targets != IGNORE_INDEX).sum()) for _, targets in micros)


def nll(model: nn.Module, micro: Micro) -> Tensor:
    ids, targets = micro

    def head_loss(hidden: Tensor, head: nn.Linear) -> Tensor:
        return linear_cross_entropy(hidden.flatten(0, 1), head.weight, targets.flatten())

    loss: Tensor = model(ids, None, head_loss)
    return loss


def whole(engine: DeepSpeedEngine | DeepSpeedFrozen) -> State:
    return {name: tensor.clone() for name, tensor in engine.full_parameters()}


def gathered(shards: dict[str, Shard]) -> State:
    """Whole tensors out of all ranks' shards; every element must come, and copies must agree."""
    tensors: State = {}
    seen: State = {}
    ranks = distributed.gather_objects(shards)
    for of_rank in ranks:
        for name, shard in of_rank.items():
            if name not in tensors:
                tensors[name] = torch.zeros(shard.shape, dtype=shard.local.dtype)
                seen[name] = torch.zeros(shard.shape, dtype=torch.int64)
            place = slice(shard.start, shard.start + shard.local.numel())
            flat, times = tensors[name].view(-1), seen[name].view(-1)
            assert torch.all((times[place] == 0) | (flat[place] == shard.local.flatten())), f"{name}: copies differ"
            flat[place] = shard.local.flatten()
            times[place] += 1
            assert shard.replicas in (1, len(ranks)), name
    for name, times in seen.items():
        assert torch.all(times == times.max()) and times.max() >= 1, f"{name}: {times.unique().tolist()}"
    return tensors


def write(engine: DeepSpeedEngine, state: Mapping[str, Tensor]) -> None:
    shards = engine.state()
    assert {name for of_rank in distributed.gather_objects(list(shards)) for name in of_rank} == state.keys()
    for name, shard in shards.items():
        part = state[name].flatten()[shard.start : shard.start + shard.local.numel()]
        shard.local.copy_(part.view_as(shard.local))
    engine.state_loaded()


def assert_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float) -> None:
    """Relative norm of the difference, tensor by tensor."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for name, tensor in a.items():
        difference = (tensor.double() - b[name].double()).norm() / b[name].double().norm().clamp_min(1e-12)
        assert difference <= tolerance, f"{name}: {difference:.2e} > {tolerance}"


def assert_trains_alike(
    case: Case, engine: DeepSpeedEngine, plain: Plain, tolerance: float = 1e-6, steps: int = 4
) -> None:
    for micros in batches(steps):
        result, norm = case.step(engine, micros), plain.step(micros)
        assert result.applied
        assert abs(result.grad_norm / norm - 1) < max(tolerance, 2e-6), (result, norm)
    assert_close(whole(engine), plain.model.state_dict(), tolerance)
