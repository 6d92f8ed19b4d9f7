"""Which checkpoints stay; with real ones, saved one after the other."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint.manifest import checkpoints_in
from llmtrain.checkpoint.retention import best_of, remove_old
from llmtrain.errors import InputError
from llmtrain.recipe.schema import Best, Checkpoint
from tests.unit.checkpoint.states import contents, save, store_in

NAN = float("nan")


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in checkpoints_in(directory))


def kept(directory: Path, losses: Sequence[float], **spec: Any) -> list[int]:
    """Steps that are left of 1, 2, 3, ..., saved with these held-out losses."""
    store = store_in(directory, **spec)
    for step, loss in enumerate(losses, start=1):
        save(store, step, loss=loss, accuracy=-loss)
    return steps_in(directory)


def test_the_newest(tmp_path: Path) -> None:
    assert kept(tmp_path / "a", [0] * 5, keep=1) == [5]
    assert kept(tmp_path / "b", [0] * 5, keep=3) == [3, 4, 5]
    assert kept(tmp_path / "c", [0] * 2, keep=3) == [1, 2]


def test_every_so_many_steps_too(tmp_path: Path) -> None:
    assert kept(tmp_path, [0] * 8, keep=2, keep_every=3) == [3, 6, 7, 8]


@pytest.mark.parametrize(
    ("losses", "best", "expected"),
    [
        ([3, 1, 2, 4], {}, [2, 4]),
        ([3, 1, 2, 4], {"mode": "max"}, [4]),
        ([3, 5, 2, 4], {"mode": "max"}, [2, 4]),
        ([3, 5, 2, 4], {"metric": "accuracy"}, [3, 4]),
        ([1, 1, 2, 2], {}, [2, 4]),  # of equals the newer
        ([1, NAN, float("inf"), -float("inf")], {}, [1, 4]),  # what is not finite is never best
        ([NAN, NAN], {}, [2]),
        ([NAN, 1, NAN], {"mode": "max"}, [2, 3]),
    ],
)
def test_the_best_too(tmp_path: Path, losses: list[float], best: dict[str, str], expected: list[int]) -> None:
    assert kept(tmp_path, losses, keep=1, keep_best=best) == expected


def test_all_at_once(tmp_path: Path) -> None:
    assert kept(tmp_path, [5, 1, 3, 4, 2, 6, 7], keep=2, keep_every=4, keep_best={}) == [2, 4, 6, 7]


def test_a_figure_that_is_not_there_is_named(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep_best={"metric": "perplexty"})
    store.save(1, {}, contents(1))  # nothing evaluated yet
    with pytest.raises(
        InputError, match=r"checkpoint.keep_best.metric: there is no held-out figure 'perplexty'"
    ) as caught:
        store.save(2, {}, contents(2, loss=1.0, perplexity=2.0))
    assert "did you mean 'perplexity'?" in str(caught.value) and "use one of loss, perplexity" in str(caught.value)
    # One that is not finite is there all the same.
    store_in(tmp_path, keep_best={}).save(2, {}, contents(2, loss=NAN, perplexity=2.0))


def test_without_a_figure_none_is_best() -> None:
    best = Best(metric="loss", mode="min")
    assert best_of({}, best) is None
    assert best_of({Path("a"): {"accuracy": 1.0}}, best) is None
    assert best_of({Path("c"): {"loss": 2.0}, Path("b"): {"loss": 1.0}, Path("a"): {"loss": 1.0}}, best) == Path("b")


def test_a_broken_newer_one_does_not_push_out_the_whole_one(tmp_path: Path) -> None:
    whole = save(store_in(tmp_path, keep=1), 10)
    save(store_in(tmp_path, keep=2), 20).joinpath("manifest.json").unlink()
    store = store_in(tmp_path, keep=1)
    assert store.newest() == whole
    newer = save(store, 15)
    assert store.newest() == newer and not whole.exists()
    assert steps_in(tmp_path) == [15, 20]


def test_one_whose_tensors_are_broken_does_not_count_either(tmp_path: Path) -> None:
    """Its manifest is whole: only who read its files knows."""
    for step in (10, 20, 30):
        path = save(store_in(tmp_path, keep=9), step)
        if step > 10:
            file = path / "state-rank-00000.safetensors"
            file.write_bytes(file.read_bytes()[:-1])
    store = store_in(tmp_path, keep=2, keep_best={}, keep_every=20)
    assert store.newest() == tmp_path / "step-00000010"
    save(store, 12)
    assert steps_in(tmp_path) == [10, 12, 20, 30]
    save(store, 20)  # in the place of the broken one
    assert steps_in(tmp_path) == [12, 20, 30]
    save(store, 40)
    assert steps_in(tmp_path) == [20, 30, 40]
    save(store, 50)
    assert steps_in(tmp_path) == [20, 40, 50]  # what is broken goes when the newest ones are newer


def test_nothing_is_removed_where_none_is_whole(tmp_path: Path) -> None:
    for path in [save(store_in(tmp_path, keep=9), step) for step in (1, 2, 3)]:
        (path / "manifest.json").unlink()
    remove_old(tmp_path, Checkpoint(keep=1), set())
    assert steps_in(tmp_path) == [1, 2, 3]


def test_what_somebody_put_beside_them_stays(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep=1)
    shutil.copytree(save(store, 1), tmp_path / "step-00000001-before-the-fire")
    (tmp_path / "notes.txt").write_text("mine")
    save(store, 2)
    save(store, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.txt",
        "step-00000001-before-the-fire",
        "step-00000003",
    ]


def test_what_cannot_be_removed_is_said_and_does_not_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A link where a directory was: rmtree refuses it, for root too."""
    store = store_in(tmp_path, keep=1)
    elsewhere = save(store, 1).rename(tmp_path / "elsewhere")
    (tmp_path / "step-00000001").symlink_to(elsewhere)
    with caplog.at_level(logging.WARNING):
        save(store, 2)
        assert "old checkpoint" in caplog.text and "step-00000001 could not be removed" in caplog.text
        save(store, 3)
    assert ".removing-step-00000001, left by an interrupted save or removal, could not be removed" in caplog.text
    assert steps_in(tmp_path) == [3] and (elsewhere / "manifest.json").exists()
