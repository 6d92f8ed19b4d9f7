"""`llmtrain search`, as a user runs it, on tiny models."""

import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from llmtrain.models.diffusion import Diffusion, save_diffusion
from llmtrain.models.reward import Reward
from llmtrain.models.scorer import load_scorer
from llmtrain.search import curve
from llmtrain.search.driver import ModelDriver
from llmtrain.search.paths import Branch
from tests import scorers, tiny
from tests.saved import INTERRUPTIONS, CommandLine, Done, assert_refused, interrupt, kept_in, write_model

SEPARATOR = " w9"
CHAT_TEMPLATE = (  # with a word that the policy does not have
    "{% for message in messages %}w100 {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}w100 {% endif %}"
)
METHODS = ["best-of-n", "vote", "weighted-vote", "beam", "mcts"]


def write_scorer(directory: Path, kind: str, *, chat: bool = True, **fields: Any) -> Path:
    """A tiny reward model, whose words are more than the policy's."""
    reward = Reward("outcome", 0.5) if kind == "outcome" else Reward("process", separator=SEPARATOR)
    scorers.write(directory, kind, reward, vocab_size=128, **fields)
    tokenizer = tiny.tokenizer(128)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("search")
    write_model(directory / "policy")
    for kind in ("outcome", "process"):
        write_scorer(directory / kind, kind)
    return directory


@pytest.fixture
def llmtrain(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Path
) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    for name in ("policy", "outcome", "process"):
        Path(name).symlink_to(models / name)
    return CommandLine(capfd)


def write_task(rows: Sequence[dict[str, Any]] | None = None, **settings: Any) -> None:
    """Questions that ask for the last of the words w3 to w9, which a random model says often."""
    rows = rows or [{"question": f"w{3 + number % 90} w7", "answer": f"w{3 + number % 6}"} for number in range(6)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"kind": "exact_match", "data": "rows.jsonl", "prompt": "{question}", "extract": r"w[3-9]\b"}
    Path("task.yaml").write_text(json.dumps(task | {"max_new_tokens": 10} | settings))


def table(done: Done) -> dict[tuple[str, int], list[float]]:
    """Accuracy, standard error, tokens, scorer tokens and rows of each method with each budget."""
    assert done.code == 0, done.err
    header, *lines = (line.split("\t") for line in done.out.splitlines())
    assert header == ["method", "budget", "accuracy", "stderr", "tokens", "scorer tokens", "rows"]
    return {(method, int(budget)): [float(number) for number in numbers] for method, budget, *numbers in lines}


FILES = ("--output", "out.json", "--samples", "rows.out", "--picture", "curve.svg")


@pytest.mark.parametrize("chat", [False, True])
def test_all_methods(llmtrain: CommandLine, chat: bool) -> None:
    write_task(chat=chat)
    done = llmtrain("search", "policy", "task.yaml", "--scorer", "process", "--budgets", "4,1", "--width", 2, *FILES)
    figures = table(done)
    assert list(figures) == [
        ("greedy", 1),
        *((method, budget) for method in METHODS[:3] for budget in (1, 4)),
        *((method, budget) for budget in (1, 4) for method in METHODS[3:]),
    ]
    assert all(0 <= row[0] <= 1 and row[-1] == 6 for row in figures.values())
    for method in METHODS[:3]:
        assert figures[method, 4][2] == pytest.approx(4 * figures["vote", 1][2], rel=0.01)
        assert figures[method, 4][2] <= 4 * 10
    for method in ("beam", "mcts"):
        assert 0 < figures[method, 4][2] <= 4 * 10 and figures[method, 4][3] > 0
    assert figures["vote", 4][3] == 0 < figures["best-of-n", 4][3]

    out = json.loads(Path("out.json").read_text())
    assert out["scorer"]["kind"] == "process" and out["scorer"]["aggregate"] == "product"
    points = {(point["method"], point["budget"]): point for point in out["points"]}
    for key, row in figures.items():
        assert points[key]["accuracy"]["value"] == pytest.approx(row[0], abs=1e-3)
        assert points[key]["tokens"]["value"] == pytest.approx(row[2], abs=0.1)
    assert ElementTree.parse("curve.svg").getroot().tag.endswith("svg")
    assert all(f">{name}<" in Path("curve.svg").read_text() for name in ["greedy", *METHODS])
    check_rows([json.loads(line) for line in Path("rows.out").read_text().splitlines()], points)


def check_rows(rows: list[dict[str, Any]], points: dict[tuple[str, int], Any]) -> None:
    """The rows of --samples give the figures again."""
    assert [row["row"] for row in rows] == list(range(6))
    for row in rows:
        assert len(row["samples"]) == 4
        for sample in row["samples"]:
            assert sample["correct"] == (sample["answer"] in row["right"]) and 0 <= sample["score"] <= 1
    of = {(said["method"], said["budget"]): [] for said in rows[0]["methods"]}
    for row in rows:
        for said in row["methods"]:
            of[said["method"], said["budget"]].append(said)
    for key, point in points.items():
        right = [said["accuracy"] if "accuracy" in said else said["correct"] for said in of[key]]
        assert point["accuracy"]["value"] == pytest.approx(sum(right) / 6)
    best = [max(row["samples"], key=lambda sample: sample["score"])["correct"] for row in rows]
    assert points["best-of-n", 4]["accuracy"]["value"] == pytest.approx(sum(best) / 6)
    every = [sample["correct"] for row in rows for sample in row["samples"]]
    assert points["best-of-n", 1]["accuracy"]["value"] == pytest.approx(sum(every) / len(every))


def test_the_same_seed_gives_the_same_in_batches_of_any_size(llmtrain: CommandLine) -> None:
    write_task()
    command = ("search", "policy", "task.yaml", "--scorer", "process", "--budgets", "4", "--width", 2)
    first = llmtrain(*command, "--picture", "a.svg")
    again = llmtrain(*command, "--picture", "b.svg", "--batch-tokens", 60)
    other = llmtrain(*command, "--seed", 1)
    assert table(first) == table(again) != table(other)
    assert Path("a.svg").read_bytes() == Path("b.svg").read_bytes()


def test_methods_that_fit_the_reward_model(llmtrain: CommandLine) -> None:
    write_task()
    command = ("search", "policy", "task.yaml", "--budgets", 2, "--limit", 3)
    assert {method for method, _ in table(llmtrain(*command))} == {"greedy", "vote"}
    figures = table(llmtrain(*command, "--scorer", "outcome"))
    assert {method for method, _ in figures} == {"greedy", *METHODS[:3]}
    assert figures["vote", 2][-1] == 3
    figures = table(llmtrain(*command, "--scorer", "process", "--methods", "mcts", "--aggregate", "min"))
    assert list(figures) == [("greedy", 1), ("mcts", 2)]


def test_answers_are_judged_by_the_reward_models_own_tokens(llmtrain: CommandLine) -> None:
    """Its template has a word that the policy's tokenizer lacks."""
    asked = [[{"role": "user", "content": word}] for word in ("w3", "w7 w8")]
    write_task([{"messages": messages, "answer": "w4"} for messages in asked], prompt=None, messages="messages")
    table(llmtrain("search", "policy", "task.yaml", "--scorer", "outcome", "--budgets", "1,3", "--samples", "rows.out"))
    scorer = load_scorer("outcome")
    for line in Path("rows.out").read_text().splitlines():
        row = json.loads(line)
        question = row["prompt"][0]["content"]
        for sample in row["samples"]:
            whole = f"w100 {question} </s> w100 {sample['text']} </s>"
            [expected] = scorer.scores([scorer.tokenizer.encode(whole, add_special_tokens=False)])
            assert sample["score"] == pytest.approx(expected, abs=1e-4)


def test_samples_are_those_of_eval(llmtrain: CommandLine) -> None:
    write_task(samples=3, temperature=1.0)
    assert llmtrain("eval", "policy", "task.yaml", "--samples", "said.jsonl").code == 0
    table(llmtrain("search", "policy", "task.yaml", "--budgets", 3, "--samples", "rows.out"))
    said, rows = (
        [json.loads(line) for line in Path(file).read_text().splitlines()] for file in ("said.jsonl", "rows.out")
    )
    assert [row["samples"] for row in rows] == [row["completions"] for row in said]


@pytest.mark.parametrize(("number", "code"), INTERRUPTIONS)
def test_an_interrupted_command_goes_on(
    llmtrain: CommandLine, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    write_task()
    command = ("search", "policy", "task.yaml", "--scorer", "process", "--methods", "vote,beam", "--budgets", "1,4")
    whole = llmtrain(*command, *FILES)
    before = [Path(file).read_text() for file in FILES[1::2]]
    for file in FILES[1::2]:
        Path(file).unlink()
    extend, asked = ModelDriver.extend, list[int]()

    def interrupted(self: ModelDriver, branches: Sequence[Branch]) -> Any:
        asked.append(len(branches))
        if len(branches) == 6 * 4:
            interrupt(number)
        return extend(self, branches)

    monkeypatch.setattr(ModelDriver, "extend", interrupted)
    done = llmtrain(*command)
    told = ["4 of 5 figures were finished", "interrupted; nothing is kept: with --output the same command would go on"]
    assert (done.code, done.err.splitlines()[-2:]) == (code, told)
    done = llmtrain(*command, *FILES)
    assert (done.code, done.err.splitlines()[-1]) == (code, kept_in("out.json"))
    assert done.out.splitlines() == whole.out.splitlines()[:-1]
    assert not any(Path(file).exists() for file in FILES[1::2])
    monkeypatch.setattr(ModelDriver, "extend", extend)
    for other in (("--seed", 1), ("--width", 3), ("--limit", 5), ("--aggregate", "min")):
        assert_refused(llmtrain(*command, *FILES, *other), "out.json.partial is what another command")
    asked.clear()
    kept = len(Path("out.json.partial").read_text().splitlines())
    assert kept == 1 + 6 + 6 + 1, "header, greedy answers, samples, beam with a budget of 1"
    done = llmtrain(*command, *FILES)
    assert (done.code, done.out) == (0, whole.out)
    after = [Path(file).read_text() for file in FILES[1::2]]
    assert after[1:] == before[1:]
    assert json.loads(after[0]) | {"seconds": 0} == json.loads(before[0]) | {"seconds": 0}
    assert not Path("out.json.partial").exists()


@pytest.mark.parametrize(
    ("methods", "places"),
    [("best-of-n", ["4 samples each"]), ("beam,mcts", ["beam, budget 4", "mcts, budget 4"])],
)
def test_what_could_not_be_judged_is_told_of_every_method(
    llmtrain: CommandLine, caplog: pytest.LogCaptureFixture, methods: str, places: list[str]
) -> None:
    write_task(name="words")
    write_scorer(Path("short"), "process", max_position_embeddings=9)
    table(llmtrain("search", "policy", "task.yaml", "--scorer", "short", "--methods", methods, "--budgets", 4))
    told = re.findall(r"words, (.*): (\d+) answers get the worst score.* window of 9 tokens", caplog.text)
    assert [what for what, _ in told] == places
    assert all(int(num) > 6 for _, num in told), "more than one of each question"


def test_nothing_is_overwritten(llmtrain: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what came to be there while the methods ran."""
    write_task()
    show = curve.show

    def meanwhile(points: Any) -> None:
        show(points)
        Path("out.json").write_text("another's")

    monkeypatch.setattr(curve, "show", meanwhile)
    done = llmtrain("search", "policy", "task.yaml", "--budgets", 2, *FILES)
    assert_refused(done, "out.json was made by another", "what was written is in out-1.json", code=1)
    assert Path("out.json").read_text() == "another's" and json.loads(Path("out-1.json").read_text())["points"]
    assert all(Path(file).exists() for file in ("rows.out", "curve.svg"))


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (("--methods", "beem"), ("--methods: there is no method 'beem'; did you mean 'beam'?", "best-of-n")),
        (("--methods", "vote,mcts"), ("--methods: mcts needs a process reward model", "none is given", "--scorer")),
        (("--methods", "best-of-n"), ("--methods: best-of-n needs a reward model", "--methods vote")),
        (("--scorer", "outcome", "--methods", "beam"), ("--scorer: beam needs a process", "judges whole answers")),
        (("--scorer", "outcome", "--aggregate", "min"), ("--aggregate: min of the steps, and this reward model",)),
        (("--scorer", "policy"), ("--scorer: ", "gives no score")),
        (("--scorer", "nothing"), ("--scorer: no such directory: nothing",)),
        (("--aggregate", "min"), ("--aggregate: is for a reward model, and none is given",)),
        (("--scorer-base", "policy"), ("--scorer-base: is for a reward model",)),
        (("--budgets", "4,0"), ("--budgets: 4,0, and it takes positive numbers",)),
        (
            ("--budgets", "4,100000000000"),
            ("--budgets: 100000000000 answers to each question, and 10000 are the most",),
        ),
        (("--budgets", "4,x"), ("--budgets is '4,x', and takes whole numbers",)),
        (("--temperature", "0"), ("--temperature: 0: the samples of a greedy model are all the same",)),
        (("--picture", "curve.jpeg"), ("--picture: .jpeg is no picture", ".svg, .png or .pdf")),
        (("--output", "there"), ("--output: there exists",)),
        (("--output", "no/out.json"), ("--output: no such directory: no",)),
        (("--output", "a", "--samples", "a"), ("a is that of",)),
        (("--output", "a", "--samples", "a.partial"), ("--samples: a.partial is where --output is begun",)),
        (("--output", "a", "--picture", "./b/../a.partial"), ("--picture: b/../a.partial is where --output is begun",)),
        (
            ("--output", "curve", "--picture", "curve.partial.svg", "--samples", "n" * 250),
            ("--samples", "cannot be made"),
        ),
        (("--output", "rows.jsonl"), ("--output: rows.jsonl exists",)),
    ],
)
def test_bad_input(llmtrain: CommandLine, arguments: tuple[str, ...], texts: tuple[str, ...]) -> None:
    write_task()
    Path("there").touch()
    done = llmtrain("search", "policy", "task.yaml", *arguments)
    assert done.code == 2 and "Traceback" not in done.err
    for text in texts:
        assert text in " ".join(done.err.replace("│", " ").split()), done.err


def test_tasks_and_models_that_are_of_no_use(llmtrain: CommandLine, models: Path) -> None:
    Path("ppl.yaml").write_text('{"kind": "perplexity", "data": [{"kind": "text", "paths": ["a.txt"]}]}')
    assert_refused(llmtrain("search", "policy", "ppl.yaml"), "ppl.yaml:1: kind", "exact_match or math")
    write_task([{"question": "w3 " * 70, "answer": "w4"}])
    assert_refused(llmtrain("search", "policy", "task.yaml"), "rows.jsonl:1", "window of 64")
    write_task(chat=True)
    write_scorer(Path("plain"), "outcome", chat=False)
    assert_refused(llmtrain("search", "policy", "task.yaml", "--scorer", "plain"), "no chat template")
    write_scorer(Path("short"), "outcome", max_position_embeddings=5)
    assert_refused(llmtrain("search", "policy", "task.yaml", "--scorer", "short"), "rows.jsonl:1", "window of 5 tokens")


def test_a_diffusion_model_is_refused(llmtrain: CommandLine, models: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "diffusion")
    save_diffusion(Diffusion("masked", 5, shift=False), model)
    write_task()
    assert_refused(llmtrain("search", model, "task.yaml"), "a diffusion model does not write")
