"""What a student writes is answers to the prompts, of the rows that are drawn for it, and the same again."""

from contextlib import nullcontext
from pathlib import Path

import torch

from llmtrain.algorithms.distillation import distilled
from llmtrain.algorithms.judged import Around
from llmtrain.algorithms.on_policy import answered
from llmtrain.contracts import POLICY, MicroBatch
from llmtrain.data.loader import Loader
from llmtrain.recipe import schema
from llmtrain.recipe.batch import BatchPlan
from tests import tiny
from tests.distilling import Case, Frozen, case


def texts_of(micro: MicroBatch) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each row of a micro-batch that the student wrote; of an answer all but the last token."""
    ids, counted = micro.tensors["input_ids"], micro.tensors["counted"]
    texts = []
    for row in range(len(ids)):
        places = counted[counted // ids.shape[1] == row] % ids.shape[1]
        first, last = int(places.min()), int(places.max())
        assert places.tolist() == list(range(first, last + 1))
        texts.append((ids[row, : first + 1].tolist(), ids[row, first + 1 : last + 1].tolist()))
    return texts


def prompts_of(case: Case, step: int) -> list[list[int]]:
    """Of every document of the data's rows, by the template: up to where the first answer begins."""
    prompts = []
    for micro in case.loader.micro_batches(step):
        for ids, documents in zip(micro.tensors["input_ids"], micro.tensors["document_ids"], strict=True):
            for document in range(int(documents.max()) + 1):
                text = case.tokenizer.decode(ids[documents == document])
                before, opened, _ = text.partition("<|im_start|>assistant\n")
                prompts.append(case.tokenizer.encode(before + opened, add_special_tokens=False))
    return prompts


def test_the_student_answers_each_document_s_prompt(tmp_path: Path) -> None:
    distil = case(tmp_path, on_policy=1.0)
    batches = distil.made.micro_batches(0)
    texts = [text for micro in batches for text in texts_of(micro)]
    asked, expected = sorted(prompt for prompt, _ in texts), sorted(prompts_of(distil, 0))
    assert [distil.tokenizer.decode(ids) for ids in asked] == [distil.tokenizer.decode(ids) for ids in expected]
    assert len(texts) > 8  # more than rows
    assert all("targets" not in micro.tensors for micro in batches)
    for micro in batches:
        assert micro.tensors["input_ids"].numel() <= 4 * 96
        assert micro.weights[POLICY] == len(micro.tensors["counted"])
        assert micro.num_tokens == sum(len(prompt) + len(answer) for prompt, answer in texts_of(micro))


def test_answers_end_where_a_turn_does_and_their_end_is_learnt(tmp_path: Path) -> None:
    """The token that ends an answer is no input, and what predicts it counts."""
    micro = answered([([5, 6], [7, 1]), ([8], [9, 10, 11])], pad_id=0)
    assert micro.tensors["input_ids"].tolist() == [[5, 6, 7], [8, 9, 10]]
    assert micro.tensors["counted"].tolist() == [1, 2, 3, 4, 5]
    distil = case(tmp_path, on_policy=1.0, max_new_tokens=64)
    end = distil.tokenizer.convert_tokens_to_ids("<|im_end|>")
    lengths = []
    for micro in distil.made.micro_batches(0):
        for _, answer in texts_of(micro):
            assert end not in answer
            lengths.append(len(answer))
    assert len(set(lengths)) > 1


def test_the_share_of_rows_is_drawn_by_their_position(tmp_path: Path) -> None:
    whole, half = (case(tmp_path, on_policy=share) for share in (0.0, 0.5))
    kept = []
    for step in range(6):
        rows = {tuple(row.tolist()) for micro in whole.made.micro_batches(step) for row in micro.tensors["input_ids"]}
        mixed = half.made.micro_batches(step)
        ours = [micro for micro in mixed if "targets" in micro.tensors]
        left = {tuple(row.tolist()) for micro in ours for row in micro.tensors["input_ids"]}
        assert left <= rows
        kept.append(len(left))
        for micro in ours:
            assert micro.weights[POLICY] == len(micro.tensors["counted"])
            counted = (micro.tensors["targets"].flatten() >= 0).nonzero().squeeze(1)
            assert torch.equal(micro.tensors["counted"], counted)
    assert len(set(kept)) > 1 and 12 < sum(kept) < 36  # of 48


def same(one: list[MicroBatch], other: list[MicroBatch]) -> bool:
    held = [
        [{name: tensor.tolist() for name, tensor in micro.tensors.items()} for micro in each] for each in (one, other)
    ]
    return held[0] == held[1]


def test_a_step_replays_from_seed_step_and_position(tmp_path: Path) -> None:
    """Whatever was asked for before, and whatever state the generators of training are in."""
    distil = case(tmp_path, on_policy=0.7)
    first = [distil.made.micro_batches(step) for step in (0, 1)]
    torch.manual_seed(99)
    assert same(distil.made.micro_batches(1), first[1]) and same(distil.made.micro_batches(0), first[0])
    assert same(case(tmp_path, on_policy=0.7).made.micro_batches(1), first[1])
    with torch.no_grad():
        for parameter in distil.student.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    assert not same(distil.made.micro_batches(1), first[1])  # it is the student that writes


def test_each_document_has_random_numbers_of_its_own(tmp_path: Path) -> None:
    """An untrained student answers nearly evenly: no two answers begin alike but by chance."""
    distil = case(tmp_path, on_policy=1.0, max_new_tokens=16)
    texts = [text for step in range(2) for micro in distil.made.micro_batches(step) for text in texts_of(micro)]
    answers = [tuple(answer[:4]) for _, answer in texts if len(answer) >= 4]
    assert len(set(answers)) == len(answers) > 8


def test_what_is_written_leaves_the_compilation_of_layers_alone(tmp_path: Path) -> None:
    """Compiled again for every length of a text, they would soon be compiled for training no more."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    distil = case(tmp_path, on_policy=1.0, engine={"compile": True})
    assert distil.made.micro_batches(0)
    assert not torch._dynamo.utils.counters["frames"]


def test_answers_do_not_depend_on_the_micro_batch(tmp_path: Path) -> None:
    distil = case(tmp_path, on_policy=1.0)
    loader = Loader(distil.datasets.train, distil.datasets.order(distil.recipe.seed), 8, 1, rank=0, world_size=1)
    assert isinstance(distil.recipe.algorithm, schema.Distillation)
    template, found = distil.datasets.documents.chat_template, []
    for each, plan in ((distil.loader, BatchPlan(8, 4, 2, 1)), (loader, BatchPlan(8, 1, 8, 1))):
        teacher, decoder = Frozen(distil.teacher), distil.student
        around = Around(distil.engine, decoder, tiny.ALONE, tmp_path, nullcontext, teacher=teacher)
        made = distilled(distil.recipe, plan, each, [], distil.tokenizer, template, around)
        found.append(made.micro_batches(0))
    texts = [sorted(text for micro in batches for text in texts_of(micro)) for batches in found]
    assert texts[0] == texts[1] and len(found[0]) < len(found[1])
