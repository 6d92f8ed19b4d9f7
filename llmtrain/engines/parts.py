"""What the engines share: precision, optimizer, averaged weights, what is done to the layers, state names."""

import fnmatch
import functools
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from llmtrain.errors import InputError
from llmtrain.models.decoder import Decoder
from llmtrain.recipe.schema import AdamW, EngineOptions

log = logging.getLogger(__name__)

# What selective activation checkpointing keeps: costly to compute again, small to keep.
_KEPT = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }
)


def forward_precision(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Autocast for bf16_autocast; the other precisions are those of the weights."""
    if precision == "bf16_autocast":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def prepare_layers(decoder: Decoder, options: EngineOptions) -> None:
    """Activation checkpointing and compilation, a decoder layer at a time.

    Layer by layer a model of any depth is compiled once, and the layers stay the units that are
    recomputed or sharded.
    """
    if options.activation_checkpointing != "none":
        if not decoder.hf.supports_gradient_checkpointing:
            raise InputError(
                f"{type(decoder.hf).__name__} has no activation checkpointing in transformers",
                where="engine.activation_checkpointing",
                remedy="set it to none",
            )
        settings: dict[str, Any] = {"use_reentrant": False}
        if options.activation_checkpointing == "selective":
            settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_or_recompute)
        decoder.hf.activation_checkpointing_enable(settings, offload=options.activation_offload)
    if options.compile:
        for layer in decoder.layers():
            layer.compile()


def _keep_or_recompute(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


class Group(NamedTuple):
    """Parameters with settings of their own in the optimizer.

    Attributes:
        names: in the decoder's order.
        lr_ratio: their learning rate over the recipe's.
    """

    names: list[str]
    lr_ratio: float
    weight_decay: float


def adamw_groups(trained: Mapping[str, Sequence[int]], spec: AdamW) -> list[Group]:
    """Who is decayed and at which rate: matrices are; biases, norms and other vectors are not.

    Args:
        trained: shape of each trained parameter, by its name in the decoder.

    Raises:
        InputError: a group of the recipe has no parameters.
    """
    members: dict[tuple[float, float], list[str]] = {}
    used: set[int] = set()
    for name, shape in trained.items():
        usual = spec.weight_decay if is_matrix(shape) else 0.0
        lr_ratio, weight_decay = 1.0, usual
        for index, group in enumerate(spec.groups):
            if fnmatch.fnmatchcase(name.removeprefix(Decoder.PREFIX), group.names):
                used.add(index)
                lr_ratio = group.lr_ratio
                weight_decay = usual if group.weight_decay is None else group.weight_decay
                break
        members.setdefault((lr_ratio, weight_decay), []).append(name)
    for index, group in enumerate(spec.groups):
        if index not in used:
            some = ", ".join(name.removeprefix(Decoder.PREFIX) for name in list(trained)[:3])
            raise InputError(
                f"no trained parameter is called {group.names}, or an earlier group has them all",
                where=f"optimizer.groups.{index}.names",
                remedy=f"correct the pattern; names are such as {some}",
            )
    return [Group(names, lr_ratio, weight_decay) for (lr_ratio, weight_decay), names in members.items()]


def is_matrix(shape: Sequence[int]) -> bool:
    """Two dimensions of more than one: IA3's scales are [1, D], and vectors."""
    return sum(size > 1 for size in shape) >= 2


def build_groups(groups: Sequence[Group], parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """As torch's optimizers take them; each keeps its `lr_ratio` for `set_learning_rate`."""
    return [
        {
            "params": [parameters[name] for name in group.names],
            "weight_decay": group.weight_decay,
            "lr_ratio": group.lr_ratio,
        }
        for group in groups
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


def build_adamw(model: nn.Module, spec: AdamW) -> torch.optim.AdamW:
    """AdamW in the groups of `adamw_groups`; the learning rate is set before each step.

    Its state is there from the beginning: moments of zero, after 0 steps.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = adamw_groups({name: parameter.shape for name, parameter in trained.items()}, spec)
    # The fused kernel reads and writes each value once, and keeps no temporaries.
    optimizer = torch.optim.AdamW(
        build_groups(groups, trained), lr=0.0, betas=(spec.betas[0], spec.betas[1]), eps=spec.eps, fused=True
    )
    # Made now and not in the first step: a checkpoint is loaded by writing into the state.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
    return optimizer


class AveragedWeights:
    """Exponential moving average of this rank's part of the weights, kept in float32 beside them.

    average <- decay * average + (1 - decay) * weight, after each applied step. Early on the decay is
    min(decay, (1 + n) / (10 + n)) after n steps, so that the random initial weights fade at once.

    Args:
        weights: by name, what this rank holds of each trained parameter; live, and no DTensors.
        decay: share kept of the average at each step.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        self.averages = {name: weight.float().clone() for name, weight in self.weights.items()}
        self.num_updates = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self) -> None:
        self.num_updates += 1
        n = int(self.num_updates)
        decay = min(self.decay, (1 + n) / (10 + n))
        averages = list(self.averages.values())
        if averages:  # of a small model a rank may hold nothing
            torch._foreach_lerp_(averages, [weight.float() for weight in self.weights.values()], 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the averaged weights inside; its own come back bit for bit."""
        with torch.no_grad():
            own = {name: weight.clone() for name, weight in self.weights.items()}
            for name, weight in self.weights.items():
                weight.copy_(self.averages[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(own[name])


def trained_state(decoder: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """(name in the checkpoint, live tensor) of trained weights, persistent buffers and optimizer state.

    `model.<name>`, `optimizer.<parameter>.{exp_avg,exp_avg_sq,step}`: see `contracts.Engine.state`.
    Weights that are not trained are the recipe's model's, and in no checkpoint.
    """
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad:
            yield f"model.{name}", parameter.detach()
            for key, value in optimizer.state[parameter].items():
                yield f"optimizer.{name}.{key}", value
    yield from ((f"model.{name}", tensor) for name, tensor in persistent_buffers(decoder))


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers of the state, and not what quantised layers put there beside their weights."""
    buffers = dict(module.named_buffers(remove_duplicate=False))
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in buffers:
            yield name, tensor


def wanted(model: nn.Module, names: Collection[str] | None) -> Iterator[tuple[str, Tensor]]:
    """The state of these names, live; all of it for None."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if names is None or name in names:
            yield name, tensor
