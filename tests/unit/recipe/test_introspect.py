from typing import Annotated, Literal

from llmtrain.recipe.introspect import below, dotted_keys, kind_of, kinds, literals, section_class, strip
from llmtrain.recipe.schema import (
    EMA,
    AutoEngine,
    DDPEngine,
    DeepSpeedEngine,
    Engine,
    FSDPEngine,
    Recipe,
    SingleEngine,
)


def test_strip() -> None:
    assert strip(Annotated[int, "bound"] | None) is int
    assert strip(Annotated[int | None, 0]) is int
    assert strip(int | str) == int | str


def test_kinds() -> None:
    assert kinds(Engine) == {
        "auto": AutoEngine,
        "single": SingleEngine,
        "ddp": DDPEngine,
        "fsdp": FSDPEngine,
        "deepspeed": DeepSpeedEngine,
    }
    assert kinds(EMA | None) == {}
    assert kinds(int) == {}
    assert kind_of(DDPEngine) == "ddp"


def test_below() -> None:
    assert section_class(below(Recipe, "ema")) is EMA
    assert set(kinds(below(below(Recipe, "data"), "train").__args__[0])) >= {"text", "python"}
    assert below(list[int], 3) is int
    assert below(dict[str, float], "x") is float
    assert below(Recipe, "no such key") is None
    assert below(int, "x") is None


def test_literals() -> None:
    assert literals(Literal["a", "b"] | None) == ("a", "b")
    assert literals(int) == ()


def test_dotted_keys() -> None:
    keys = set(dotted_keys(Recipe))
    assert {"name", "optimizer.lr", "schedule.decay_steps", "data.train.<index>.paths", "ema.decay"} <= keys
