"""Adapters inside the layers of a decoder whose weights are not there yet.

peft makes an adapter for a module that has its weights; some of its initialisations read them (DoRA's
magnitudes), and some change them (PiSSA, OLoRA). So the adapter is put in twice: at once on the meta
device, which gives every engine the names and shapes, and again by peft itself in each unit, when the
unit's own weights are there.
"""

import copy
from collections.abc import Collection
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmtrain.errors import InputError
from llmtrain.models.heads import CAUSAL
from llmtrain.models.peft.config import CHANGING

NAME = "default"
# Beside the one that is trained, frozen and idle: what a changed base has to be counted from.
INITIAL = "initial"


def changes_base(config: PeftConfig) -> bool:
    return isinstance(config, LoraConfig) and str(config.init_lora_weights).lower().startswith(CHANGING)


def inject(hf: PreTrainedModel, config: PeftConfig, computed: torch.dtype) -> PeftModel:
    """Puts the adapter into the model and freezes the rest, on the device that torch makes tensors on.

    Args:
        computed: what weights are rounded to when they are computed with.
    """
    if config.task_type == CAUSAL.task_type:
        model = get_peft_model(hf, config, NAME, autocast_adapter_dtype=False)
    else:  # peft's own classes for these would save the head by another list than the configuration's
        config.base_model_name_or_path = hf.name_or_path
        model = PeftModel(hf, config, NAME, autocast_adapter_dtype=False)
        targets = config.to_dict().get("target_modules")
        if isinstance(targets, set | list):  # of all-linear peft takes the head of steps for one, which is saved whole
            config.target_modules = set(targets) - set(config.modules_to_save)
    if changes_base(config):
        _check_rank(hf, model)
        model.add_adapter(INITIAL, _plain(config))
        for key in model.base_model.targeted_module_names:
            _split_off_initial(hf.get_submodule(key), computed)
    return model


def _check_rank(hf: PreTrainedModel, model: PeftModel) -> None:
    for key in model.base_model.targeted_module_names:
        layer: Any = hf.get_submodule(key)
        rank, most = layer.r[NAME], min(layer.in_features, layer.out_features)
        if rank > most:
            raise InputError(
                f"{key} is {layer.out_features} x {layer.in_features}, which has no {rank} directions to begin with",
                where="adapter.r",
                remedy=f"use {most} or less, init: default, or target_modules without it",
            )


def _plain(config: PeftConfig) -> PeftConfig:
    """The same matrices, without values."""
    plain = copy.deepcopy(config)
    plain.init_lora_weights, plain.use_dora, plain.modules_to_save = False, False, None
    plain.trainable_token_indices, plain.ensure_weight_tying = None, False
    return plain


@torch.no_grad()
def _split_off_initial(layer: Any, computed: torch.dtype) -> None:
    """Keeps what a changed base has to be counted from, in numbers that no backend rounds any more."""
    base, (a, b) = layer.get_base_layer(), (layer.lora_A[NAME], layer.lora_B[NAME])
    rounded_a, rounded_b = (m.weight.to(computed).to(m.weight.dtype) for m in (a, b))
    rest = layer.scaling[NAME] * (b.weight @ a.weight - rounded_b @ rounded_a)
    base.weight.data += (rest.T if layer.fan_in_fan_out else rest).to(base.weight.dtype)
    for matrices, rounded in ((layer.lora_A, rounded_a), (layer.lora_B, rounded_b)):
        matrices[NAME].weight.data = rounded
        matrices[INITIAL].weight.data = rounded.clone()
        matrices[INITIAL].requires_grad_(False)


def obstacle(hf: PreTrainedModel, config: PeftConfig, computed: torch.dtype) -> str | None:
    """Why this adapter cannot be made unit by unit; None where it can. `hf` is on the meta device, and spoilt."""
    kind = config.peft_type.value
    cls: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    hooks = ("_pre_injection_hook", "_post_injection_hook")
    if cls.uses_shared_state or any(vars(BaseTuner)[hook] is not _inherited(cls, hook) for hook in hooks):
        return f"{kind} has weights that all layers share"
    try:
        with torch.device("meta"):
            model = inject(hf, copy.deepcopy(config), computed)
    except (NotImplementedError, RuntimeError) as error:  # an operation that wants values
        return f"peft does not make {kind} on the meta device: {error}"
    if model.base_model.targeted_parameter_names:
        return f"{kind} is put on parameters that are no modules"
    seen: set[Tensor] = set()
    for key in model.base_model.targeted_module_names:
        layer = hf.get_submodule(key)
        base = set(layer.get_base_layer().parameters())
        own = {tensor for tensor in (*layer.parameters(), *layer.buffers()) if tensor not in base}
        if own & seen:
            return f"{kind} has weights that several layers share"
        seen |= own
    return None


def _inherited(cls: type, name: str) -> Any:
    return next(vars(kind)[name] for kind in cls.__mro__ if name in vars(kind))


class Layers:
    """The adapter's tensors in a decoder's units: a `blueprint.Addition`.

    Args:
        model: peft's, around `hf`, injected on the meta device.
        computed: as for `inject`.
    """

    def __init__(self, hf: PreTrainedModel, model: PeftModel, computed: torch.dtype):
        self._hf, self._tuner, self._computed = hf, model.base_model, computed
        self._configs = dict(model.peft_config)
        self._keys = list(self._tuner.targeted_module_names)
        self._made: dict[Tensor, nn.Parameter] = {}

    @torch.no_grad()
    def fill(self, unit: Collection[nn.Module], device: torch.device) -> None:
        inside = set(unit)
        for key in self._keys:
            layer = self._hf.get_submodule(key)
            if layer in inside and any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers())):
                self._make(key, layer, device)
        for module in unit:
            if isinstance(module, ModulesToSaveWrapper):
                self._copy_module(module)
            elif isinstance(module, TrainableTokensWrapper):
                self._copy_rows(module)

    def _make(self, key: str, planned: Any, device: torch.device) -> None:
        """Has peft make the layer of this name for its base, which has its weights now."""
        parent_name, _, child = key.rpartition(".")
        parent = self._hf.get_submodule(parent_name)
        base = planned.get_base_layer()
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        setattr(parent, child, base)
        # In float32, whatever the frozen weights are kept in: peft gives the adapter their dtype.
        dtypes = {parameter: parameter.dtype for parameter in base.parameters() if parameter.is_floating_point()}
        for parameter in dtypes:
            parameter.data = parameter.data.float()
        for name, config in self._configs.items():
            target = self._hf.get_submodule(key)
            self._tuner._create_and_replace(config, name, target, child, parent, current_key=key)
        layer: Any = self._hf.get_submodule(key)
        if INITIAL in self._configs:
            _split_off_initial(layer, self._computed)
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
        unchanged = all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
        if INITIAL not in self._configs and not unchanged:
            raise changed_base(self._configs[NAME])
        plans = dict(planned.named_parameters())
        for name, parameter in layer.named_parameters():
            plan = plans.pop(name)
            assert parameter.shape == plan.shape
            if parameter.requires_grad or plan.requires_grad:
                parameter.data = parameter.data.to(plan.dtype)
            parameter.requires_grad_(plan.requires_grad)
        assert not plans, f"peft makes {key} otherwise the second time"
        layer.to(device)
        layer.train(planned.training)

    def _copy_module(self, wrapper: ModulesToSaveWrapper) -> None:
        """A module that is trained whole begins as the one it stands for; tied ones stay one."""
        for copied in wrapper.modules_to_save.values():
            sources = dict(wrapper.original_module.named_modules())
            for path, module in copied.named_modules():
                for name, parameter in module._parameters.items():
                    if parameter is None or not parameter.is_meta:
                        continue
                    if parameter not in self._made:
                        value = sources[path]._parameters[name]
                        assert value is not None
                        self._made[parameter] = nn.Parameter(
                            value.detach().to(parameter.dtype, copy=True), parameter.requires_grad
                        )
                    module._parameters[name] = self._made[parameter]
                for name, buffer in module._buffers.items():
                    if buffer is not None and buffer.is_meta:
                        value = sources[path]._buffers[name]
                        assert value is not None
                        module._buffers[name] = value.clone()

    def _copy_rows(self, wrapper: TrainableTokensWrapper) -> None:
        adapter: Any = wrapper.token_adapter
        for name, planned in list(adapter.trainable_tokens_delta.items()):
            if planned.is_meta:
                rows = adapter.base_layer.weight[adapter.token_indices[name]]
                adapter.trainable_tokens_delta[name] = nn.Parameter(rows.to(planned.dtype, copy=True))
                adapter.trainable_tokens_delta[name].requires_grad_(planned.requires_grad)
                adapter.trainable_tokens_original[name] = rows.clone()


def changed_base(config: PeftConfig) -> InputError:
    return InputError(
        f"{config.peft_type.value} with these settings changes the weights it is put on, so that what is learnt would "
        "not fit the unchanged model",
        where="adapter.config",
        remedy="choose another initialisation",
    )


def indivisible(hf: PreTrainedModel) -> set[type[nn.Module]]:
    """Classes of peft's layers in the model: they read weights of the modules inside without calling those."""
    kinds = (BaseTunerLayer, TrainableTokensWrapper)
    return {type(module) for module in hf.modules() if isinstance(module, kinds)}
