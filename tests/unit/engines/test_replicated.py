"""The engine of one process, against torch's own pieces; DDP is proven in tests/truths."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtrain import engines
from llmtrain.contracts import Engine
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.loss_head import linear_cross_entropy
from tests import tiny

ADAMW = {"kind": "adamw", "lr": 1.0, "eps": 1e-8, "betas": [0.9, 0.95], "weight_decay": 0.1, "clip_norm": None}
LR = 1e-2


def engine(seed: int = 0, *, tied: bool = False, optimizer: dict[str, Any] | None = None, **overrides: Any) -> Engine:
    recipe = tiny.recipe(optimizer=ADAMW | (optimizer or {}), **overrides)
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    decoder = tiny.decoder(seed=seed, dtype=dtype, tie_word_embeddings=tied)
    return engines.prepare(Blueprint(decoder), recipe, tiny.ALONE)


def rows() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(5)
    while True:
        yield torch.randint(3, tiny.VOCABULARY, (2, 12), generator=generator)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    def nll(hidden: Tensor, head: nn.Linear) -> Tensor:
        return linear_cross_entropy(hidden[:, :-1].flatten(0, 1), head.weight, ids[:, 1:].flatten())

    loss: Tensor = model(ids, None, nll) / ids[:, 1:].numel()
    return loss


def train(engine: Engine, ids: Tensor, *, scale: float = 1.0) -> tuple[float, bool]:
    with engine.accumulate(last=True):
        engine.backward(scale * loss_of(engine.model, ids))
    return tuple(vars(engine.step(LR)).values())  # type: ignore[return-value]


def state(engine: Engine) -> dict[str, Tensor]:
    return {name: shard.local.clone() for name, shard in engine.state().items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("clip_norm", [None, 0.05, 1e6])
@pytest.mark.parametrize("tied", [False, True])
def test_steps_equal_torch_clipping_and_adamw(clip_norm: float | None, tied: bool) -> None:
    ours = engine(tied=tied, optimizer={"clip_norm": clip_norm})
    twin = tiny.decoder(tie_word_embeddings=tied)
    parameters = list(twin.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=(0.9, 0.95),
        foreach=False,
        fused=False,
    )
    batches = rows()
    for _ in range(4):
        ids = next(batches)
        grad_norm, applied = train(ours, ids)
        optimizer.zero_grad()
        loss_of(twin, ids).backward()
        expected = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if clip_norm is None else clip_norm)
        optimizer.step()
        assert applied
        assert grad_norm == pytest.approx(expected.item(), rel=1e-5)  # before clipping
        assert grad_norm > 0.05
    for (name, a), b in zip(ours.model.named_parameters(), parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_the_learning_rate_is_that_of_the_step() -> None:
    ours = engine()
    before = state(ours)
    with ours.accumulate(last=True):
        ours.backward(loss_of(ours.model, next(rows())))
    assert ours.step(0.0).applied
    weights = {name: tensor for name, tensor in state(ours).items() if name.startswith("model.")}
    assert_equal(weights, {name: before[name] for name in weights})


def test_gradients_accumulate_until_the_step() -> None:
    whole, parts = engine(), engine()
    ids = next(rows())
    train(whole, ids)
    for index in range(2):
        with parts.accumulate(last=index == 1):
            parts.backward(loss_of(parts.model, ids[index : index + 1]) / 2)
    parts.step(LR)
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
def test_a_step_that_is_not_finite_changes_nothing_and_says_so(bad: float, precision: str) -> None:
    ours, undisturbed = (engine(ema={"decay": 0.9}, precision=precision) for _ in range(2))
    batches = rows()
    first, second, third = (next(batches) for _ in range(3))
    train(ours, first)
    train(undisturbed, first)
    before = state(ours)
    grad_norm, applied = train(ours, second, scale=bad)
    assert not applied
    assert not torch.isfinite(torch.tensor(grad_norm))
    assert_equal(state(ours), before)
    # and nothing of the bad gradient is left for the next step
    assert train(ours, third)[1]
    train(undisturbed, third)
    assert_equal(state(ours), state(undisturbed))


# ---------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_state_goes_on_in_a_fresh_engine_bit_for_bit(precision: str, tied: bool) -> None:
    overrides: dict[str, Any] = {"ema": {"decay": 0.9}, "precision": precision, "tied": tied}
    whole, resumed = engine(seed=0, **overrides), engine(seed=1, **overrides)
    batches = rows()
    for _ in range(3):
        train(whole, next(batches))
    saved = state(whole)
    assert saved.keys() == resumed.state().keys()
    for name, shard in resumed.state().items():
        shard.local.copy_(saved[name])
    resumed.state_loaded()
    for _ in range(3):
        ids = next(batches)
        assert train(whole, ids) == train(resumed, ids)
    assert_equal(state(resumed), state(whole))


# ------------------------------------------------------------------------------------- averages


@pytest.mark.parametrize("tied", [False, True])
def test_exported_and_evaluated_are_the_averages(tied: bool) -> None:
    ours = engine(tied=tied, ema={"decay": 0.9})
    expected = {name: tensor.detach().clone() for name, tensor in ours.model.state_dict().items()}
    batches = rows()
    for n in (1, 2, 3):
        train(ours, next(batches))
        keep = min(0.9, (1 + n) / (10 + n))
        for name, weight in ours.model.state_dict().items():
            expected[name] = keep * expected[name] + (1 - keep) * weight
    own = {name: tensor.clone() for name, tensor in ours.model.state_dict().items()}
    exported = dict(ours.full_parameters())
    assert exported.keys() == own.keys()
    assert "hf.lm_head.weight" in exported  # the tied head has a name of its own
    for name in own:
        torch.testing.assert_close(exported[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
        assert not torch.equal(exported[name], own[name]), name
    with ours.evaluating():
        assert_equal(ours.model.state_dict(), exported)
    assert_equal(ours.model.state_dict(), own)


def test_exported_without_averages_are_the_weights() -> None:
    ours = engine()
    train(ours, next(rows()))
    assert_equal(dict(ours.full_parameters()), ours.model.state_dict())
    assert not any(tensor.requires_grad for _, tensor in ours.full_parameters())


def test_evaluating_is_without_gradients_and_dropout_and_ends() -> None:
    ours = engine(precision="bf16_autocast")
    assert ours.model.training
    with ours.evaluating():
        assert not ours.model.training
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert ours.model.training and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    with pytest.raises(KeyboardInterrupt), ours.evaluating():
        raise KeyboardInterrupt
    assert ours.model.training and torch.is_grad_enabled()


# ------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize(
    ("precision", "compute", "kept"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16_autocast", torch.bfloat16, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_what_is_computed_and_kept_in_which_precision(precision: str, compute: torch.dtype, kept: torch.dtype) -> None:
    ours = engine(precision=precision)
    seen: set[torch.dtype] = set()
    for module in ours.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    with ours.accumulate(last=True):
        loss = loss_of(ours.model, next(rows()))
        ours.backward(loss)
    assert seen == {compute}
    assert loss.dtype == torch.float32
    assert {parameter.dtype for parameter in ours.model.parameters()} == {kept}
    assert {parameter.grad.dtype for parameter in ours.model.parameters() if parameter.grad is not None} == {kept}
    assert all(parameter.grad is not None for parameter in ours.model.parameters())
    ours.step(LR)
    moments = {tensor.dtype for name, tensor in state(ours).items() if "exp_avg" in name}
    assert moments == {kept}


# --------------------------------------------------------------------------------------- around


def test_the_shards_are_whole_and_shared_by_the_replicas() -> None:
    shards = engine().state()
    for name, shard in shards.items():
        assert (shard.start, shard.replica, shard.replicas) == (0, 0, 1), name
        assert shard.shape == tuple(shard.local.shape), name


def test_a_frozen_model_answers_and_does_not_train() -> None:
    frozen = engines.prepare_frozen(Blueprint(tiny.decoder()), tiny.recipe(), tiny.ALONE)
    ids = next(rows())
    with frozen.evaluating():
        assert torch.equal(loss_of(frozen.model, ids), loss_of(tiny.decoder(), ids))
    assert not any(parameter.requires_grad for parameter in frozen.model.parameters())
    assert_equal(dict(frozen.full_parameters()), tiny.decoder().state_dict())


def test_it_says_what_runs() -> None:
    assert engine(precision="bf16_autocast").describe() == "single process on cpu, bf16_autocast"
