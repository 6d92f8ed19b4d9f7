"""An adapter switched off for a while: the model is then the one that it was put into."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from llmtrain.errors import InputError
from llmtrain.models.peft import Adapter, layers


def check_switchable(adapter: Adapter) -> None:
    """Raises InputError where the model without the adapter is not the one that training began with."""
    if adapter.decoder.prompt is not None:
        raise InputError(
            "what the adapter puts before a text begins at random: without it the model is not the one that training "
            "began with",
            where="algorithm.reference",
            remedy="use reference: cached",
        )
    if layers.changes_base(adapter.config):
        raise InputError(
            f"init {adapter.config.init_lora_weights} changes the weights that the adapter is put on: without it the "
            "model is not the one that training began with",
            where="algorithm.reference",
            remedy="use reference: cached, or adapter.init: default",
        )


@contextmanager
def disabled(adapter: Adapter) -> Iterator[None]:
    """The decoder computes without its adapter inside; adapters of `adapter.base` stay, being part of the weights.

    Only peft's flags are set, not by its own methods: these freeze and thaw the adapter's parameters as well, which
    no backend expects of parameters that it holds.

    Raises:
        InputError: see `check_switchable`.
    """
    check_switchable(adapter)
    decoder = adapter.decoder
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    inside = [module for module in decoder.modules() if isinstance(module, kinds) and not module._disable_adapters]
    for module in inside:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in inside:
            module._disable_adapters = False
