"""A decoder whose weights are not there yet, so that no rank ever holds the whole of a big model.

A unit is a decoder layer, or the rest: embeddings, last norm, head. An engine materialises one unit
after another and shards each before it asks for the next. Random weights are drawn unit by unit from
(seed, unit), whatever the engine, so that every engine on any number of ranks begins from the same.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, initialization

from llmtrain.errors import TrainingError
from llmtrain.models.decoder import Decoder
from llmtrain.models.weights import WeightFiles

# What writes every element of the tensor it is given, and reads none of them.
_FILLS = frozenset({"normal_", "uniform_", "zero_", "fill_", "copy_"})
_KEEP = "_is_hf_initialized"  # transformers' own mark on a tensor that its initialisation leaves alone


@dataclass(frozen=True)
class _Unit:
    """A decoder layer, or the decoder without its layers."""

    index: int  # 0 is the rest, the layers count from 1
    root: nn.Module
    # each module with the model whose `_init_weights` is for it, children before parents
    modules: list[tuple[nn.Module, PreTrainedModel]]


class Addition(Protocol):
    """What is put into a decoder before its weights are there, such as an adapter."""

    def fill(self, unit: Collection[nn.Module], device: torch.device) -> None:
        """Gives what was added to the modules of `unit` its values on `device`; their own weights are there.

        Random numbers are drawn from torch's global generators, which are seeded by (seed, unit).
        """
        ...


class Blueprint:
    """A decoder, and what its weights are made of.

    Parameters and buffers on the meta device are given storage and values by `materialise`; those
    that are real already, as all are in a model that was built whole, are moved.

    Args:
        decoder: on the meta device, or real.
        seed: of the weights that are drawn at random.
        files: where the weights are read from, by the transformers model's names; None draws them.

    Attributes:
        decoder: its parameters and buffers are on the meta device until they are materialised.
        layers: the decoder layers in order, none inside another: what can be materialised alone.
        additions: what was put in; each gives its tensors their values when a unit's own weights are there.
        new_rows: rows of the embeddings that are those of new tokens, and began as the mean of the rows before.
        indivisible: classes of modules whose forward reads the weights of modules inside them without
            calling those: a backend that gathers weights module by module has to gather theirs as one.
    """

    def __init__(self, decoder: Decoder, seed: int = 0, files: WeightFiles | None = None):
        self.decoder = decoder
        self._seed, self._files = seed, files
        self.additions: list[Addition] = []
        self.new_rows = range(0)
        self.indivisible: set[type[nn.Module]] = set()
        self.layers = _outermost(decoder.layers())
        self._units = _units(decoder, self.layers)
        self._done: set[int] = set()
        self._borrowed = _borrowed(decoder.hf)
        # Taken now: adapters that are put in later change the names.
        self._in_files: dict[Tensor, str] = {}
        if files is not None:
            state = decoder.hf.state_dict(keep_vars=True)
            self._in_files = {tensor: name for name, tensor in state.items() if name in files}
        self._planned = {tensor for tensor in _tensors(decoder.modules()) if tensor.is_meta}

    @torch.no_grad()
    def materialise(self, module: nn.Module, device: torch.device) -> None:
        """Puts a decoder layer on `device`, or the whole decoder with what is not there yet.

        Raises:
            TrainingError: weights stayed without a value.
        """
        if module is self.decoder:
            wanted = self._units
        else:
            wanted = [unit for unit in self._units if unit.root is module]
            assert wanted, "a decoder is materialised by its layers, or whole"
        for unit in wanted:
            if unit.index not in self._done:
                self._materialise(unit, device)
                self._done.add(unit.index)

    @property
    def is_empty(self) -> bool:
        """Whether weights are missing still."""
        return any(tensor.is_meta for tensor in _tensors(self.decoder.modules()))

    def build_whole(self) -> None:
        """Gives everything its values now, on the CPU; `materialise` then only moves it."""
        if self.is_empty:
            self.materialise(self.decoder, torch.device("cpu"))
            self._done.clear()

    def obstacle(self) -> str | None:
        """Why this model cannot be made on the meta device; None where it can.

        transformers can only fill what its `_init_weights` knows. The initialisation is run on the
        meta device, where it costs nothing, to see which tensors it writes: each unit has to fill all
        of its own, but for those that are read from files, and nothing else.
        """
        for name, module in self.decoder.named_modules():
            if _holds_meta({key: value for key, value in vars(module).items() if not key.startswith("_")}):
                return f"{name} keeps a tensor that is neither a parameter nor a buffer"
        name_of = {tensor: name for name, tensor in _named_tensors(self.decoder)}
        filled: dict[Tensor, int] = {}
        for unit in self._units:
            for tensor in _tensors(self._modules(unit)):
                if filled.setdefault(tensor, unit.index) != unit.index:
                    return f"{name_of[tensor]} is shared by several layers"
        for unit in self._units:
            own = {tensor for tensor, index in filled.items() if index == unit.index}
            read = {tensor for tensor in own if tensor in self._in_files}
            writes = _Writes(own - read)
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=[]), writes:
                    self._initialise(unit, own - read, read)
            except RuntimeError as error:  # an operation that wants values
                return f"{type(unit.root).__name__} is not initialised on the meta device: {error}"
            for tensor, name in name_of.items():
                if tensor in own and not writes.knows(tensor):
                    return f"{name} has a value that only the model's constructor knows"
                if writes.wrote(tensor) and (tensor in read or tensor not in own):
                    return f"{name} is written by the initialisation of another part"
        return None

    def _modules(self, unit: _Unit) -> Iterator[nn.Module]:
        """The unit's modules, with those that were put in since."""
        if unit.root is not self.decoder:
            yield from unit.root.modules()
            return
        below = {module for other in self._units if other is not unit for module in other.root.modules()}
        yield from (module for module in self.decoder.modules() if module not in below)

    def _materialise(self, unit: _Unit, device: torch.device) -> None:
        modules = list(self._modules(unit))
        made: dict[Tensor, Tensor] = {}
        for module in modules:
            all_slots: list[dict[str, Any]] = [module._parameters, module._buffers]
            for slots in all_slots:
                for name, tensor in slots.items():
                    if tensor is None:
                        continue
                    if not tensor.is_meta:
                        tensor.data = tensor.data.to(device)
                        continue
                    if tensor not in self._planned:
                        continue  # an addition's
                    if tensor not in made:  # tied weights are one tensor, and stay one
                        made[tensor] = _real(tensor, device)
                    slots[name] = made[tensor]
        if made:
            self._give_values(unit, modules, made, device)
        if self.additions:
            with self._drawing((unit.index, 1), device, torch.float32):
                for addition in self.additions:
                    addition.fill(modules, device)
        for module in self._modules(unit):
            left = [name for name, tensor in _own_tensors(module) if tensor.is_meta]
            assert not left, f"{left[0]} was put in on the meta device: nothing is known of it"

    def _give_values(
        self, unit: _Unit, modules: list[nn.Module], made: dict[Tensor, Tensor], device: torch.device
    ) -> None:
        names = {self._in_files[tensor]: real for tensor, real in made.items() if tensor in self._in_files}
        if self._files is not None:
            self._files.read_into(names)
        read = set(names.values())
        drawn = set(made.values()) - read
        # What was real before is as it should be: it stands with what was read. Additions have none yet.
        kept = read | {tensor for tensor in _tensors(modules) if tensor not in drawn}
        with self._drawing((unit.index,), device, self.decoder.hf.dtype):  # as while transformers builds a model
            self._initialise(unit, drawn, kept)
        if any(bool(tensor.isnan().any()) for tensor in drawn if tensor.is_floating_point()):
            raise TrainingError(f"{type(unit.root).__name__} has weights without a value after its initialisation")

    @contextmanager
    def _drawing(self, what: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Iterator[None]:
        """Random numbers by (seed, what) on the CPU and on `device`, leaving the generators as they were."""
        seed = np.random.SeedSequence(self._seed, spawn_key=what).generate_state(1, np.uint64)[0]
        devices = [] if device.type == "cpu" else [device]
        before = torch.get_default_dtype()
        with torch.random.fork_rng(devices=devices, device_type=device.type):
            torch.manual_seed(int(seed))
            torch.set_default_dtype(dtype)
            try:
                yield
            finally:
                torch.set_default_dtype(before)

    def _initialise(self, unit: _Unit, wanted: set[Tensor], kept: set[Tensor]) -> None:
        """transformers' initialisation of `wanted`; `kept` are left as they are."""
        with initialization.guard_torch_init_functions(), _left_alone(kept):
            for module, model in unit.modules:
                # One that has nothing to be filled is passed over, as from_pretrained does: some
                # scale what they find.
                if any(tensor in wanted for tensor in _tensors(module.modules())):
                    # A tied head has the embedding's values: when transformers ties them, both are drawn.
                    borrowed = [getattr(module, name) for name in self._borrowed.get(module, ())]
                    with _left_alone(borrowed):
                        model._init_weights(module)


def _outermost(layers: list[nn.Module]) -> list[nn.Module]:
    inside = {module for layer in layers for module in layer.modules() if module is not layer}
    return [layer for layer in layers if layer not in inside]


def _units(decoder: Decoder, layers: list[nn.Module]) -> list[_Unit]:
    """The layers, and last the rest."""
    unit_of = {module: index for index, layer in enumerate(layers, start=1) for module in layer.modules()}
    units = [_Unit(index, root, []) for index, root in enumerate([decoder, *layers])]
    for module, model in _initialisation_order(decoder.hf, decoder.hf):
        units[unit_of.get(module, 0)].modules.append((module, model))
    return [*units[1:], units[0]]


def _initialisation_order(module: nn.Module, model: PreTrainedModel) -> Iterator[tuple[nn.Module, PreTrainedModel]]:
    """Children before parents, each by the innermost transformers model around it, as transformers does."""
    for child in module.children():
        yield from _initialisation_order(child, child if isinstance(child, PreTrainedModel) else model)
    yield module, model


def _borrowed(model: PreTrainedModel) -> dict[nn.Module, list[str]]:
    """Which tensors of a module are another's, that it is tied to."""
    borrowed: dict[nn.Module, list[str]] = {}
    for name in model.all_tied_weights_keys:
        owner, _, attribute = name.rpartition(".")
        borrowed.setdefault(model.get_submodule(owner), []).append(attribute)
    return borrowed


@contextmanager
def _left_alone(tensors: Iterable[Tensor]) -> Iterator[None]:
    """transformers' initialisation passes over these."""
    marked = [tensor for tensor in tensors if _KEEP not in vars(tensor)]
    for tensor in marked:
        setattr(tensor, _KEEP, True)
    try:
        yield
    finally:
        for tensor in marked:
            delattr(tensor, _KEEP)


def _tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Parameters and buffers of the modules themselves, tied ones as often as they are used."""
    for module in modules:
        yield from (tensor for _, tensor in _own_tensors(module))


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for slots in (module._parameters, module._buffers):
        yield from ((name, tensor) for name, tensor in slots.items() if tensor is not None)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _real(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor like the one on the meta device, of NaN where it can be: what is forgotten shall be seen."""
    real = torch.empty_like(tensor, device=device)
    if real.is_floating_point():
        real.fill_(torch.nan)
    if isinstance(tensor, nn.Parameter):
        real = nn.Parameter(real, requires_grad=tensor.requires_grad)
    vars(real).update(vars(tensor))
    return real


def _holds_meta(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_meta
    if isinstance(value, dict):
        return any(_holds_meta(item) for item in value.values())
    return isinstance(value, list | tuple) and any(_holds_meta(item) for item in value)


class _Writes(TorchDispatchMode):
    """While it is on: which tensors of the meta device are written, and whose values are unknown.

    Args:
        unknown: tensors whose values are not there.
    """

    def __init__(self, unknown: Iterable[Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._unknown = {_storage(tensor) for tensor in unknown}
        self._written: set[int] = set()
        self._alive: list[Tensor] = []  # so that no storage is taken for one that was freed

    def wrote(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._written

    def knows(self, tensor: Tensor) -> bool:
        return _storage(tensor) not in self._unknown

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        values = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        values |= kwargs or {}
        changed = [
            values[argument.name]
            for argument in func._schema.arguments
            if argument.is_write and _holds_meta(values.get(argument.name))
        ]
        read = [value for value in tree_leaves(values) if _holds_meta(value)]
        if name in _FILLS:
            read = [value for value in read if value is not changed[0]] if changed else read
        unknown = "empty" in name or not all(self.knows(value) for value in read)
        for value in changed:
            self._written.add(_storage(value))
        for value in [*changed, *(value for value in tree_leaves(result) if _holds_meta(value))]:
            self._alive.append(value)
            if unknown:
                self._unknown.add(_storage(value))
            elif name in _FILLS and value.numel() * value.itemsize == value.untyped_storage().nbytes():
                self._unknown.discard(_storage(value))
        return result


def _storage(tensor: Tensor) -> int:
    """Tells storages apart: views and `.data` share that of their parameter."""
    return int(tensor.untyped_storage()._cdata)
