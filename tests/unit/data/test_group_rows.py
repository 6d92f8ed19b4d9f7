"""Groups in rows and micro-batches: whole, each once, as a hand-made layout has them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from llmtrain.data.build import prepare_data
from llmtrain.data.cache import tokenised
from llmtrain.data.group_batches import GroupCollator, StepCollator
from llmtrain.data.group_rows import Group, GroupRows, GroupSettings, Layout, MismatchedRows, plan_groups
from llmtrain.data.groups import Judged
from llmtrain.data.loader import all_batches, evaluation_batches
from llmtrain.data.prepared import prepare_sources
from llmtrain.errors import InputError
from llmtrain.recipe.schema import Data, Recipe, Source
from tests.chats import sft_recipe, write_jsonl
from tests.judged import judged_recipe, labelled, preferences, stepwise

LENGTH = 96


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("groups")


def rows_of(
    directory: Path, rows: list[dict[str, Any]], layout: Layout = "shared", length: int = LENGTH, **more: Any
) -> GroupRows:
    from llmtrain.data.tokenizer import load_tokenizer

    sft_recipe(directory)  # makes the model and its tokenizer
    tokenizer = load_tokenizer(str(directory / "model"))
    file = write_jsonl(directory / "rows.jsonl", rows)
    source: Source = TypeAdapter(Source).validate_python({"kind": "jsonl", "paths": [str(file)]})
    usual = "steps" if "labels" in rows[0] else "labelled" if "label" in rows[0] else "compared"
    wanted = more.get("wanted", usual)
    mismatched = wanted == "labelled"
    documents = Judged(tokenizer, Data(train=[source]), wanted, "\n" if wanted == "steps" else None)
    halves = tokenised(source, documents, 0.0, directory / "cache")
    settings = GroupSettings(more.get("packing", "best_fit"), layout, length, mismatched)
    plan, _ = plan_groups(halves.train, halves.key, settings, directory / "cache")
    return GroupRows(halves.train, plan, ragged=settings.packing == "none", offset=more.get("offset", 0))


def every(rows: GroupRows) -> list[Group]:
    return [group for index in range(len(rows)) for group in rows[index]]


def test_each_group_is_whole_and_there_once(directory: Path) -> None:
    rows = rows_of(directory, preferences(40), offset=7)
    groups = every(rows)
    assert sorted(group.first for group in groups) == [7 + 2 * number for number in range(40)]
    assert all(len(group.answers) == 2 and min(map(len, group.answers)) > 1 for group in groups)
    assert len({group.prompt.tobytes() + group.answers[0].tobytes() for group in groups}) == 40
    assert {float(group.values[0, 1]) for group in groups} == {0.0, 0.5}
    lengths = rows.lengths(np.arange(len(rows)))
    by_count = [sum(len(g.prompt) + sum(map(len, g.answers)) for g in rows[index]) for index in range(len(rows))]
    assert lengths.tolist() == by_count and max(by_count) <= LENGTH


def test_mismatched_answers_are_those_of_the_next_other_prompt(directory: Path) -> None:
    rows = labelled(12)
    rows[5]["prompt"] = rows[4]["prompt"]
    made = rows_of(directory, rows, "separate")
    own = {group.first: group for group in every(made)}
    other = MismatchedRows(made)
    for index in range(len(other)):
        for group in other[index]:
            partner = (group.first + (2 if group.first == 4 else 1)) % 12
            num = len(group.answers[0])
            assert np.array_equal(group.prompt, own[group.first].prompt)
            assert np.array_equal(group.answers[0], own[partner].answers[0][:num])


def test_mismatched_answers_of_pairs_are_good_and_bad_as_often_as_the_datas(directory: Path) -> None:
    made = rows_of(directory, preferences(20), "separate", wanted="labelled")
    own = {tuple(group.answers[0]): bool(group.values[0, 0]) for group in every(made)}
    assert sum(own.values()) == 20 and len(every(made)) == 40
    other = MismatchedRows(made)
    found = [tuple(group.answers[0]) for index in range(len(other)) for group in other[index]]
    assert sorted(found) == sorted(own)


def test_every_row_once_over_all_ranks(directory: Path) -> None:
    rows = rows_of(directory, preferences(30))
    collator = GroupCollator("shared", LENGTH, 0)
    for world in (1, 2, 3):
        ranks = [list(all_batches([rows], 2, rank, world, collator)) for rank in range(world)]
        assert len({len(micros) for micros in ranks}) == 1
        weighty = [micro for micros in ranks for micro in micros if micro.weights["policy"]]
        numbers = torch.cat([micro.tensors["numbers"] for micro in weighty])
        assert sorted(numbers.tolist()) == list(range(60))
        assert sum(micro.weights["policy"] for micros in ranks for micro in micros) == 30


def test_a_micro_batch_without_weight_has_nothing_that_counts(directory: Path) -> None:
    rows = rows_of(directory, preferences(3), length=64)
    batches = evaluation_batches([rows], 1, 1, 1, 2, GroupCollator("shared", 64, 0))
    (filler,) = batches
    assert filler.weights == {"policy": 0.0} and filler.num_tokens == 0
    sizes = {name: len(tensor) for name, tensor in filler.tensors.items()}
    assert sizes.pop("input_ids") == sizes.pop("position_ids") == sizes.pop("segments") == 1
    assert set(sizes.values()) == {0}


def test_steps_in_rows(directory: Path) -> None:
    data = stepwise(20)
    rows = rows_of(directory, data, "separate")
    micro = StepCollator(LENGTH, 0).collate([rows[index] for index in range(len(rows))], np.arange(len(rows)), False)
    labels = [label for group in every(rows) for label in group.values[:, 0].tolist()]
    assert micro.tensors["labels"].tolist() == labels and len(labels) == sum(len(row["labels"]) for row in data)
    assert micro.weights == {"policy": float(len(labels))}
    judged = micro.tensors["input_ids"].flatten()[micro.tensors["counted"]]
    assert len(set(judged.tolist())) == 1  # the separator's token


# ------------------------------------------------------------------------------------ what cannot be


def recipe_of(directory: Path, rows: list[dict[str, Any]], kind: str, **data: Any) -> Recipe:
    recipe = judged_recipe(directory, kind)
    file = write_jsonl(directory / "given.jsonl", rows)
    section = recipe["data"] | {"train": [{"kind": "jsonl", "paths": [str(file)]}], "validation_fraction": 0.0} | data
    return Recipe.model_validate(recipe | {"data": section})


def prepare(directory: Path, recipe: Recipe) -> Any:
    from llmtrain.data.tokenizer import load_tokenizer

    return prepare_data(recipe, load_tokenizer(str(directory / "model")), directory / "cache")


def test_too_many_groups_that_teach_nothing(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    equal = {"prompt": "a", "chosen": "b", "rejected": "b"}
    good = preferences(9)
    why = r"3 of 12 groups .* \(3: their chosen and rejected answers are equal, the first is .*given.jsonl:10\)"
    with pytest.raises(InputError, match=why):
        prepare(directory, recipe_of(directory, [*good, *[equal] * 3], "dpo"))
    prepare(directory, recipe_of(directory, [*good, equal], "dpo", max_empty_share=0.2))
    assert "1 groups of answers were left out: their chosen and rejected answers are equal" in caplog.text


def test_what_teaches_nothing_is_counted_once_whichever_half_is_small(directory: Path) -> None:
    equal = {"prompt": "a", "chosen": "b", "rejected": "b"}
    rows = [*preferences(98, seed=3), equal, equal]  # 2 of 100, and more than a twentieth of what is held out
    prepare(directory, recipe_of(directory, rows, "dpo", validation_fraction=0.1))


def test_the_place_of_an_answer_of_a_pair_is_the_pair(directory: Path) -> None:
    rows = preferences(4)
    rows[2]["chosen"] = [{"role": "assistant", "content": "fox " * 200}]
    with pytest.raises(InputError, match=r"1: they do not fit in a row of 96 tokens.*given.jsonl:3"):
        prepare(directory, recipe_of(directory, rows, "kto"))


def test_equal_pairs_are_left_out_for_kto(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    equal = {"prompt": "a", "chosen": "b", "rejected": "b"}
    prepare(directory, recipe_of(directory, [*preferences(19, seed=5), equal], "kto"))
    assert "1 groups of answers were left out: their chosen and rejected answers are equal" in caplog.text
    assert "given.jsonl:20" in caplog.text


def test_groups_longer_than_a_row(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = preferences(4)
    rows[1]["rejected"] = rows[1]["chosen"]  # so that documents have other numbers than rows
    rows[2]["chosen"] = [{"role": "assistant", "content": "fox " * 200}]
    with pytest.raises(InputError, match=r"1: they do not fit in a row of 96 tokens.*given.jsonl:3") as told:
        prepare(directory, recipe_of(directory, rows, "dpo"))
    assert "raise sequence_length (the longest takes" in str(told.value.remedy)
    with pytest.raises(InputError, match="1: they do not fit"):  # read from the cache
        prepare(directory, recipe_of(directory, rows, "dpo"))
    prepare(directory, recipe_of(directory, rows, "dpo", max_empty_share=0.6))
    (warning,) = [text for text in caplog.messages if "do not fit" in text]
    assert "1 groups of answers were left out: they do not fit in a row of 96 tokens" in warning
    assert warning.endswith("given.jsonl:3")


def test_steps_that_hold_the_separator(directory: Path) -> None:
    rows = stepwise(8)
    rows[2]["completions"][0] += "\nfox"
    why = r"1: a step of theirs would be cut by algorithm.separator '\\n', the first is .*given.jsonl:3\)"
    with pytest.raises(InputError, match=why) as told:
        prepare(directory, recipe_of(directory, rows, "process_reward"))
    assert "or choose another algorithm.separator" in str(told.value.remedy)
    with pytest.raises(InputError, match="the corpus is empty") as told:
        prepare(directory, recipe_of(directory, rows[2:3], "process_reward"))
    assert "1, example 1 is the first: a step of theirs would be cut" in str(told.value.remedy)


def test_kto_needs_another_prompt(directory: Path) -> None:
    rows = [{"prompt": "a", "completion": f"b {i}", "label": i % 2 == 0} for i in range(6)]
    with pytest.raises(
        InputError, match="6: there is no other prompt whose answer a mismatch could be made of"
    ) as told:
        prepare(directory, recipe_of(directory, rows, "kto"))
    assert told.value.remedy == "give answers to other prompts"


@pytest.mark.parametrize(("label", "kind", "other"), [(True, "good", "bad"), (False, "bad", "good")])
def test_kto_needs_good_and_bad_answers(directory: Path, label: bool, kind: str, other: str) -> None:
    rows = [{"prompt": f"a {i}", "completion": "b", "label": label} for i in range(6)]
    recipe = recipe_of(directory, rows, "kto")
    with pytest.raises(InputError, match=f"all answers to train on are {kind}.*the first is .*given.jsonl:1") as told:
        prepare(directory, recipe)
    assert told.value.where == "data.train"
    assert str(told.value.remedy).startswith(f"add {other} answers (label {str(not label).lower()})")
    assert ("algorithm.kind sft" in str(told.value.remedy)) == label
    # One source may have the good ones, another the bad ones.
    others = write_jsonl(directory / "others.jsonl", [{**row, "label": not label} for row in rows])
    sources = [*recipe.data.model_dump()["train"], {"kind": "jsonl", "paths": [str(others)]}]
    prepare(directory, recipe_of(directory, rows, "kto", train=sources))


def test_kto_is_told_of_labels_that_are_numbers(directory: Path) -> None:
    rows = [{"prompt": f"a {i}", "completion": "b", "label": i % 2} for i in range(6)]
    with pytest.raises(InputError, match=r"given.jsonl:1: label is a number \(0\), not true or false") as told:
        prepare(directory, recipe_of(directory, rows, "kto"))
    assert told.value.remedy == "write true for a good answer, false for a bad one"


def test_kto_takes_preferences_as_two_answers(directory: Path) -> None:
    recipe = recipe_of(directory, preferences(6), "kto")
    from llmtrain.data.tokenizer import load_tokenizer

    prepared = prepare_sources(recipe, load_tokenizer(str(directory / "model")), directory / "cache")
    assert prepared.train[0].corpus.num_documents == 12
