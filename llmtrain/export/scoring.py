"""What the card of a model that scores says of its use: a program that needs transformers alone."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmtrain.data.tokenizer import document_frame
from llmtrain.models.heads import OUTCOME, RIGHT, Head
from llmtrain.models.reward import FILE, Reward


@dataclass(frozen=True)
class Scoring:
    """A model that scores, with the tokenizer that goes with it."""

    reward: Reward
    head: Head
    tokenizer: PreTrainedTokenizerBase

    @property
    def pipeline_tag(self) -> str:
        return "text-classification" if self.head is OUTCOME else "token-classification"


def how_to_score(scoring: Scoring, name: str, *, is_adapter: bool) -> str:
    """The section of the card.

    Args:
        name: of the directory.
        is_adapter: it is not whole, but an adapter in peft's layout.
    """
    is_outcome = scoring.reward.kind == "outcome"
    if is_outcome:
        text = (
            f"The score of an answer is read at its last token. `bias` in {FILE} is subtracted from it: the mean score "
            "of reference answers, so that theirs is 0. Scores of answers to one prompt can be compared."
        )
    else:
        text = (
            f"The probability that a step of an answer is right is read at the last token of the step and of the "
            f"separator behind it (in {FILE}): the softmax of two outputs, of which number {RIGHT} is for right."
        )
    if is_adapter:
        number = f"num_labels={scoring.head.num_outputs}"
        load = f"{scoring.head.auto.__name__}.from_pretrained(base, {number})"
        return f"## Scoring\n\n{text} Its base is loaded by `{load}`; the head is the adapter's."
    program = _outcome(scoring, name) if is_outcome else _process(scoring, name)
    return f"## Scoring\n\n{text}\n\n```python\n{program}```"


def _opening(scoring: Scoring, name: str, field: str) -> str:
    cls = scoring.head.auto.__name__
    return f"""import json
from pathlib import Path

import torch
from transformers import {cls}, AutoTokenizer

path = {name!r}  # this directory
tokenizer = AutoTokenizer.from_pretrained(path)
model = {cls}.from_pretrained(path).eval()
{field} = json.loads((Path(path) / "{FILE}").read_text())["{field}"]
"""


def _frame(scoring: Scoring, ids: str) -> str:
    """The ids of a plain text with what stands before and after one."""
    before, after = document_frame(scoring.tokenizer)
    return f"[{', '.join(map(str, [*before, f'*{ids}', *after]))}]"


def _outcome(scoring: Scoring, name: str) -> str:
    if scoring.tokenizer.chat_template is None:
        encode = "tokenizer.encode(prompt + answer, add_special_tokens=False)"
        body = f"    ids = {_frame(scoring, encode)}\n"
    else:
        body = """    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
"""
    return f"""{_opening(scoring, name, "bias")}

def score(prompt, answer):
{body}    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item() - bias


print(score("What is 2 + 3?", "5"))
"""


def _process(scoring: Scoring, name: str) -> str:
    if scoring.tokenizer.chat_template is None:
        before, _ = document_frame(scoring.tokenizer)
        text = "    text, place = prompt + answer, len(prompt)\n"
        ids, shift = _frame(scoring, "encoded.input_ids"), len(before)
    else:
        text = """    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    place = len(tokenizer.apply_chat_template(messages[:1], tokenize=False))
"""
        ids, shift = "encoded.input_ids", 0
    number = "number" if shift == 0 else f"number + {shift}"
    return f"""{_opening(scoring, name, "separator")}

def probabilities(prompt, steps):
    answer = "".join(step + separator for step in steps)
{text}    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = []  # of each step, the token that holds its last character
    for step in steps:
        place = text.index(step, place) + len(step)
        if text.startswith(separator, place):  # a template may strip the last one
            place += len(separator)
        tokens = enumerate(encoded.offset_mapping)
        ends.append(next({number} for number, (_, end) in tokens if end >= place))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([{ids}])).logits
    return logits[0, ends].float().softmax(-1)[:, {RIGHT}].tolist()


print(probabilities("What is 2 + 3 + 4?", ["2 + 3 = 5", "5 + 4 = 9"]))
"""
