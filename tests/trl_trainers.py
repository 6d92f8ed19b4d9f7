"""TRL's trainers on groups of answers: one loss of theirs, with its gradients."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor

from llmtrain.models.decoder import Decoder
from tests import tiny
from tests.answers import Group

BEGIN, END = 0, 1  # most of their trainers take texts only, and put these around them where they are not there


def ended(groups: Sequence[Group], num_prompt: int | None = None) -> list[Group]:
    """The groups with <s> before the prompt, of which `num_prompt` tokens are kept, and </s> behind the answers."""
    return [
        group._replace(prompt=[BEGIN, *group.prompt][:num_prompt], answers=[[*answer, END] for answer in group.answers])
        for group in groups
    ]


def text(ids: Sequence[int]) -> str:
    """Of which every word is a token."""
    return " ".join(tiny.tokenizer().convert_ids_to_tokens(list(ids)))


def pair(group: Group) -> dict[str, str]:
    """A row of theirs; the space before an answer keeps it apart from the prompt."""
    better, worse = (f" {text(answer)}" for answer in group.answers)
    return {"prompt": text(group.prompt), "chosen": better, "rejected": worse}


def their_loss(
    trainer: Any, config: Any, decoder: Decoder, rows: Sequence[dict[str, Any]], directory: Path, **settings: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of all rows as one batch, and its gradients by our names.

    Args:
        trainer: one of TRL's classes.
        config: and the class of its arguments.
        decoder: whose weights a copy of is trained.
        settings: for the arguments; ref_model goes to the trainer, a decoder.
    """
    others = {}
    if "ref_model" in settings:
        others["ref_model"] = copy.deepcopy(settings.pop("ref_model").hf)
    arguments = config(
        output_dir=str(directory),
        per_device_train_batch_size=len(rows),
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_dropout=True,
        **settings,
    )
    made = trainer(
        model=copy.deepcopy(decoder.hf),
        args=arguments,
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tiny.tokenizer(),
        **others,
    )
    model = made.model.train()
    batch = made.data_collator([made.train_dataset[number] for number in range(len(rows))])
    loss = made.compute_loss(model, dict(batch))
    loss.backward()
    gradients = {f"hf.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def per_row(sums: tuple[Tensor, dict[str, Tensor]], num: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss sum and its gradients, divided once."""
    return sums[0] / num, {name: gradient / num for name, gradient in sums[1].items()}
