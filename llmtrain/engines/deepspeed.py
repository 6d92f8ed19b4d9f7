"""DeepSpeed ZeRO (arXiv 1910.02054), stages 0 to 3, by `deepspeed.initialize`."""

import copy
import logging
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.contracts import Shard, StepResult
from llmtrain.distributed import World
from llmtrain.engines import deepspeed_setup as setup
from llmtrain.engines import parts
from llmtrain.engines.deepspeed_gradients import OldGradients
from llmtrain.engines.deepspeed_state import ZeroState
from llmtrain.models.blueprint import Blueprint
from llmtrain.recipe.schema import Recipe

log = logging.getLogger(__name__)


def _gathered(deepspeed: ModuleType | None, tensor: Tensor) -> AbstractContextManager[object]:
    """Inside, a parameter that stage 3 has sharded is whole; all ranks enter. Nothing where `deepspeed` is None."""
    return nullcontext() if deepspeed is None else deepspeed.zero.GatheredParameters([tensor])


class DeepSpeedEngine:
    """A trainable model under ZeRO: optimizer (stage 1), gradients (2) and weights (3) sharded over the ranks.

    Stages 0 and 1 keep the gradients of all micro-batches and reduce them once, stages 2 and 3 keep
    only this rank's part and so reduce in every micro-batch: that is what these stages are. All
    reduce in float32. Stage 0 is DeepSpeed's data parallelism, which has neither a gradient norm nor
    a guard against one that is not finite: both are ours.
    """

    def __init__(self, blueprint: Blueprint, recipe: Recipe, world: World):
        options = setup.options_of(recipe)
        self.device = world.device
        self._stage, self._clip_norm, self._world = options.zero_stage, recipe.optimizer.clip_norm, world
        self._description = setup.describe(recipe, world)
        self._decoder = decoder = blueprint.decoder
        decoder.train()
        parts.prepare_layers(decoder, options)
        self._dtypes = {name: tensor.dtype for name, tensor in decoder.state_dict(keep_vars=True).items()}
        # Now, while shapes are whole: a shard of ZeRO-3 does not show them.
        shapes = {name: p.shape for name, p in decoder.named_parameters() if p.requires_grad}
        groups = parts.adamw_groups(shapes, recipe.optimizer)
        compute = setup.COMPUTE_DTYPE.get(recipe.precision, torch.float32)
        with setup.brought_up(recipe, world) as deepspeed:
            config = setup.configuration(deepspeed, recipe, world, decoder)
            originals = setup.materialise(deepspeed, blueprint, world, config, compute, groups)
            if self._stage == 0:
                self._adamw = parts.build_adamw(decoder, recipe.optimizer)
            else:
                self._adamw = setup.build_adamw(decoder, groups, recipe.optimizer)
            self._engine: Any
            self._engine, *_ = deepspeed.initialize(model=decoder, optimizer=self._adamw, config=copy.deepcopy(config))
            self._sharding = deepspeed if self._stage == 3 else None
        self._trained = [p for p in decoder.parameters() if p.requires_grad]
        self.model: nn.Module = self._engine
        if self._stage == 0:
            self._zero, self._old_gradients = None, None
            num_local, masters = sum(p.numel() for p in self._trained), [p.detach() for p in self._trained]
        else:
            self._zero = ZeroState(self._engine, decoder, originals, world)
            self._old_gradients = OldGradients(
                self._engine.optimizer,
                deepspeed.get_accelerator(),
                self._stage,
                options.offload_optimizer != "none",
                self._zero.runs_of_gradients(),
            )
            num_local = self._zero.num_elements()
            masters = [] if options.offload_optimizer == "nvme" else self._zero.flats
        setup.verify(self._engine, recipe, world, num_local, masters)
        log.info("engine: %s", self.describe())

    def describe(self) -> str:
        return self._description

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; precision is DeepSpeed's business."""
        if self._stage == 0:
            self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; the loss is a share of a sum, so the average is multiplied back.
        self._engine.backward(loss * self._world.size, scale_wrt_gas=False)

    def step(self, lr: float) -> StepResult:
        """Clips by the global norm and steps; a step whose norm is not finite changes nothing."""
        parts.set_learning_rate(self._adamw, lr)
        if self._old_gradients is None:
            return self._step_of_stage_0()
        self._old_gradients.forget()
        self._engine.step()
        return StepResult(float(self._engine.get_global_grad_norm()), bool(self._engine.was_step_applied()))

    def _step_of_stage_0(self) -> StepResult:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None], foreach=True)
        grad_norm, applied = norm.item(), bool(torch.isfinite(norm))
        if applied:
            if self._clip_norm is not None and grad_norm > self._clip_norm:
                torch.nn.utils.clip_grads_with_norm_(self._trained, self._clip_norm, norm, foreach=True)
            self._engine.step()
        self._engine.zero_grad()
        return StepResult(grad_norm, applied)

    @contextmanager
    def evaluating(self, averaged: bool = True) -> Iterator[None]:
        """Every rank runs the same number of forwards in here: stage 3 gathers weights in each. There is no EMA."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def full_parameters(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The float32 weights that the optimizer steps, whatever the forward computes in."""
        for name, tensor in parts.wanted(self._decoder, names):
            if self._zero is not None and isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                yield name, self._zero.whole(tensor, self.device).to(self._dtypes[name])
            else:
                with _gathered(self._sharding, tensor):
                    yield name, tensor.detach().to(self._dtypes[name])

    def state(self) -> dict[str, Shard]:
        if self._zero is not None:
            return self._zero.shards()
        rank, size = self._world.rank, self._world.size
        state = parts.trained_state(self._decoder, self._adamw)
        return {name: Shard(tensor, 0, tuple(tensor.shape), rank, size) for name, tensor in state}

    def state_loaded(self) -> None:
        if self._zero is not None:
            self._zero.loaded()


class DeepSpeedFrozen:
    """A model that is only asked: its weights sharded in stage 3, and whole on every rank below.

    Below stage 3 it is a plain module, since those stages shard what training needs and nothing else.
    """

    def __init__(self, blueprint: Blueprint, recipe: Recipe, world: World):
        self._decoder = decoder = blueprint.decoder
        self._device = world.device
        self._dtypes = {name: tensor.dtype for name, tensor in decoder.state_dict(keep_vars=True).items()}
        self._sharding: ModuleType | None = None
        self._autocast = "fp32"
        decoder.eval().requires_grad_(False)
        compute = setup.COMPUTE_DTYPE.get(recipe.precision, torch.float32)
        self.model: nn.Module = decoder
        stage = setup.options_of(recipe).zero_stage
        if stage < 3:
            setup.materialise(None, blueprint, world, {"zero_optimization": {"stage": stage}}, compute, [])
            decoder.requires_grad_(False)
            self._autocast = recipe.precision
            return
        with setup.brought_up(recipe, world) as deepspeed:
            self._sharding = deepspeed
            config = setup.configuration(deepspeed, recipe, world, decoder)
            config["zero_optimization"].pop("offload_optimizer", None)
            setup.materialise(deepspeed, blueprint, world, config, compute, [])
            decoder.requires_grad_(False)
            self.model, *_ = deepspeed.initialize(model=decoder, config=copy.deepcopy(config))
        self.model.eval()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Every rank runs the same number of forwards in here: stage 3 gathers weights in each."""
        with torch.no_grad(), parts.forward_precision(self._autocast, self._device):
            yield

    def full_parameters(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in parts.wanted(self._decoder, names):
            with _gathered(self._sharding, tensor):
                yield name, tensor.detach().to(self._dtypes[name])
