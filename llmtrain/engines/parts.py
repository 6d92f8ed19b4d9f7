"""What the engines share: precision, optimizer, averaged weights, what is done to the layers, state names."""

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

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


def build_adamw(model: nn.Module, spec: AdamW) -> torch.optim.AdamW:
    """AdamW with the usual groups: matrices decay; biases, norms and other vectors do not.

    Its state is there from the beginning: moments of zero, after 0 steps.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    # The fused kernel reads and writes each value once, and keeps no temporaries.
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=spec.lr,
        betas=(spec.betas[0], spec.betas[1]),
        eps=spec.eps,
        fused=True,
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
    parameters = dict(decoder.named_parameters(remove_duplicate=False))
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad:
            yield f"model.{name}", parameter.detach()
            for key, value in optimizer.state[parameter].items():
                yield f"optimizer.{name}.{key}", value
    for name, tensor in decoder.state_dict(keep_vars=True).items():
        if name not in parameters:
            yield f"model.{name}", tensor
