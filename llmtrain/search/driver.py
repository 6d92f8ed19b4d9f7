"""The policy and the judge of a search, as models: all that knows of tokens, prompts and batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmtrain.evaluation.asking import Asked
from llmtrain.evaluation.scoring import Autoregressive, Span, score
from llmtrain.models.saved import Saved
from llmtrain.sampling.batched import Completion, Request, Sampling, TextGenerator, decode_after
from llmtrain.sampling.prompts import end_ids
from llmtrain.search.paths import Branch, Path
from llmtrain.search.scoring import Grader


class Policy:
    """The model that answers, and its questions.

    Args:
        saved: autoregressive, and not yet generated from: generators forget what its files say ends a completion.
        questions: each of a prompt that leaves room for an answer.
        batch_tokens: about so many positions are computed at once.
    """

    def __init__(self, saved: Saved, questions: Sequence[Asked], batch_tokens: int = 8192):
        self.saved, self.questions, self.batch_tokens = saved, questions, batch_tokens
        self.end_ids = frozenset(end_ids(saved))

    def generator(self, sampling: Sampling) -> TextGenerator:
        return TextGenerator(self.saved, sorted(self.end_ids), sampling, self.batch_tokens)


@dataclass
class Spent:
    """What a method took for a question: tokens that the policy generated, and tokens that the judge read."""

    generated: int = 0
    read: int = 0


class ModelDriver:
    """See `paths.Driver`. Each method has one of its own, whose account is then the method's.

    Args:
        sampling: of whole answers; a token's random number is a function of its seed, the question, the sample, the
            depth of the step and the place in it.
        grader: may be missing where nothing is scored.
        on_tokens: is told how many tokens more were generated.
    """

    def __init__(
        self,
        policy: Policy,
        sampling: Sampling,
        grader: Grader | None = None,
        on_tokens: Callable[[int], None] = lambda num: None,
    ):
        self.num_questions = len(policy.questions)
        self.spent = [Spent() for _ in policy.questions]
        self._policy, self._sampling, self._grader, self._on_tokens = policy, sampling, grader, on_tokens

    def extend(self, branches: Sequence[Branch]) -> list[Path]:
        assert self._grader is not None and self._grader.separator is not None
        requests = [
            Request(
                [*self._policy.questions[branch.path.question].ids, *branch.path.ids],
                branch.path.question,
                branch.sample,
                part=branch.depth + 1,
                limit=self._sampling.max_new_tokens - len(branch.path.ids),
            )
            for branch in branches
        ]
        stop = (*self._sampling.stop, self._grader.separator)
        return self._generated([branch.path for branch in branches], requests, stop)

    def values(self, paths: Sequence[Path]) -> list[float]:
        assert self._grader is not None
        scores, lengths = self._grader.score(
            [(self._policy.questions[path.question].shown, path.text) for path in paths]
        )
        for path, length in zip(paths, lengths, strict=True):
            self.spent[path.question].read += length
        return scores

    def log_probs(self, steps: Sequence[tuple[Path, Path]]) -> list[float]:
        spans = []
        for before, after in steps:
            prompt = self._policy.questions[after.question].ids
            ids = np.asarray([*prompt, *after.ids], dtype=np.int64)
            spans.append(Span(ids, np.arange(len(ids)) >= len(prompt) + len(before.ids), key=0))
        nats = score(Autoregressive(self._policy.saved), spans, self._policy.batch_tokens, lambda num: None)
        return [-float(number) for number in nats[:, 0]]

    def _generated(self, before: Sequence[Path], requests: Sequence[Request], stop: tuple[str, ...]) -> list[Path]:
        generator = self._policy.generator(replace(self._sampling, stop=stop))
        after: dict[int, Path] = {}

        def take(index: int, completion: Completion) -> None:
            after[index] = self._after(before[index], completion, generator)
            self.spent[before[index].question].generated += len(completion.ids)
            self._on_tokens(len(completion.ids))

        generator.generate(requests, take)
        return [after[index] for index in range(len(before))]

    def _after(self, path: Path, completion: Completion, generator: TextGenerator) -> Path:
        """The path with what was generated, decoded as a whole: a token may reach beyond the end of a step."""
        prompt, ids = self._policy.questions[path.question].ids, (*path.ids, *completion.ids)
        ended = ids[-1] in self._policy.end_ids
        text = decode_after(self._policy.saved.tokenizer, prompt, ids[:-1] if ended else ids)
        stops = [text.find(stop) for stop in self._sampling.stop if stop in text]
        if stops:
            return Path(path.question, ids, text[: min(stops)], "stop")
        if ended:
            return Path(path.question, ids, text, "stop")
        is_full = len(ids) >= self._sampling.max_new_tokens or not generator.fits([*prompt, *ids])
        return Path(path.question, ids, text, "length" if is_full else None)
