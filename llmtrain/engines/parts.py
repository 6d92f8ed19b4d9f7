"""What the engines share: precision, optimizer, averaged weights, compilation, one-process steps."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from llmtrain.errors import InputError
from llmtrain.models.decoder import Decoder
from llmtrain.recipe.schema import AdamW, EngineOptions

log = logging.getLogger(__name__)


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
    if options.activation_checkpointing:
        if not decoder.hf.supports_gradient_checkpointing:
            raise InputError(
                f"{type(decoder.hf).__name__} has no activation checkpointing in transformers",
                where="engine.activation_checkpointing",
                remedy="set it to false",
            )
        decoder.hf.activation_checkpointing_enable()
    if options.compile:
        for layer in decoder.layers():
            layer.compile()


def build_adamw(model: nn.Module, spec: AdamW) -> torch.optim.AdamW:
    """AdamW with the usual groups: matrices decay; biases, norms and other vectors do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    # The fused kernel reads and writes each value once, and keeps no temporaries.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=spec.lr,
        betas=(spec.betas[0], spec.betas[1]),
        eps=spec.eps,
        fused=True,
    )


class AveragedWeights:
    """Exponential moving average of a list of parameters, kept in float32 beside them.

    average <- decay * average + (1 - decay) * weight, after each applied step. Early on the decay is
    min(decay, (1 + n) / (10 + n)) after n steps, so that the random initial weights fade at once.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], decay: float):
        self.decay = decay
        self.parameters = [parameter for _, parameter in named]
        self.averages = {name: parameter.detach().float().clone() for name, parameter in named}
        self.num_updates = torch.zeros((), dtype=torch.int64)

    def by_parameter(self) -> dict[int, Tensor]:
        """The average of each parameter, by the parameter's id()."""
        return {id(p): average for p, average in zip(self.parameters, self.averages.values(), strict=True)}

    @torch.no_grad()
    def update(self) -> None:
        self.num_updates += 1
        n = int(self.num_updates)
        decay = min(self.decay, (1 + n) / (10 + n))
        averages = list(self.averages.values())
        torch._foreach_lerp_(averages, [p.detach().float() for p in self.parameters], 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the averaged weights inside; its own come back bit for bit."""
        with torch.no_grad():
            own = [parameter.detach().clone() for parameter in self.parameters]
            for parameter, average in zip(self.parameters, self.averages.values(), strict=True):
                parameter.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, own, strict=True):
                    parameter.copy_(value)


def flat_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, averaged: AveragedWeights | None
) -> dict[str, Tensor]:
    """Weights, optimizer state and averages under flat names, with no layout of any backend.

    `model.<name>`, `optimizer.<name>.{exp_avg,exp_avg_sq,step}`, `ema.<name>`, `ema_updates`.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    if averaged is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in averaged.averages.items()}
        tensors["ema_updates"] = averaged.num_updates
    return tensors


@torch.no_grad()
def load_flat_state(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averaged: AveragedWeights | None,
) -> None:
    """The inverse of `flat_state`."""
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if prefix + key in tensors]
        for key in keys:
            # The moments lie where the parameter does; fused AdamW wants its step there too.
            optimizer.state[parameter][key] = tensors[prefix + key].to(parameter.device, copy=True)
    if averaged is not None:
        for name, average in averaged.averages.items():
            average.copy_(tensors[f"ema.{name}"])
        averaged.num_updates.copy_(tensors["ema_updates"])
