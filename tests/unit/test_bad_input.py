"""What a user may give wrong, run as a user runs it: exit code 2, a message that helps, and nothing touched.

Each mistake is mended afterwards, and the same command then trains: a refused run claims no directory.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain import cli
from llmtrain.models.saving import save_pretrained
from llmtrain.observe.metrics import read_metrics
from tests import tiny
from tests.runs import start, train_here, write_recipe

Change = Callable[[dict[str, Any], Path], object]
MAMBA2 = {
    "kind": "config",
    "architecture": "mamba2",
    "config": {
        "hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 8, "num_hidden_layers": 1, "chunk_size": 8
    },
}  # fmt: skip


@dataclass
class Done:
    code: int
    err: str


@pytest.fixture
def train(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`llmtrain train recipe.yaml ...` in this process."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(recipe: Path, *overrides: str) -> Done:
        try:
            code = cli.main(["train", str(recipe), *overrides])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        return Done(code, capfd.readouterr().err)

    return run


# What says that a run is or was alive, and how it ended.
RUN_FILES = (".lock", ".lock-holder", "verdict.json")


def files(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Content and time of change of everything below, but for RUN_FILES and logs."""
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in RUN_FILES and path.parent.name != "logs"
    }


def assert_refused(done: Done, *texts: str) -> None:
    assert done.code == 2, done.err
    assert done.err.splitlines().count("Traceback (most recent call last):") == 0
    assert sum(line.startswith("error: ") for line in done.err.splitlines()) == 1
    for text in texts:
        assert text in done.err


def rewritten(recipe: Path, change: Change) -> None:
    content = yaml.safe_load(recipe.read_text())
    change(content, recipe.parent)
    recipe.write_text(yaml.safe_dump(content))


def source(name: str, content: str | bytes | None, **settings: Any) -> Change:
    """A change to one training file of that content, or none."""

    def change(recipe: dict[str, Any], here: Path) -> None:
        if isinstance(content, str):
            (here / name).write_text(content)
        elif content is not None:
            (here / name).write_bytes(content)
        kind = "jsonl" if name.endswith(".jsonl") else "text"
        recipe["data"]["train"] = [{"kind": kind, "paths": [str(here / name)]} | settings]

    return change


def section(path: str, **values: Any) -> Change:
    """A change to some keys of a section of the recipe."""

    def change(recipe: dict[str, Any], here: Path) -> None:
        for key in path.split(".") if path else []:
            recipe = recipe[key]
        recipe.update(values)

    return change


GOOD_LINES = "".join(f'{{"text": "the quick brown fox {n} jumps over the lazy dog"}}\n' for n in range(300))

# the mistake, and what its message must say
MISTAKES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "missing file": (
        source("nothing.txt", None),
        ("/nothing.txt: no such file", "remedy: correct the path"),
    ),
    "pattern that matches nothing": (
        source("nothing-*.txt", None),
        ("/nothing-*.txt: matches no file", "remedy: correct the pattern"),
    ),
    "empty corpus": (
        source("empty.txt", " \n\n\t\n", document="line"),
        ("data.train: the corpus is empty", "remedy: check its files"),
    ),
    "wrong encoding": (
        source("latin.txt", "good\nna\xefve\n".encode("latin-1")),
        ("latin.txt:2: not UTF-8: byte 0xef at byte offset 7", "remedy: convert it", "iconv -f LATIN1"),
    ),
    "line that is no JSON": (
        source("a.jsonl", GOOD_LINES + "{'text': 'single quotes'}\n"),
        ("a.jsonl:301: not JSON", "remedy: write one JSON object a line"),
    ),
    "line that is no object": (
        source("a.jsonl", GOOD_LINES + '["a", "list"]\n'),
        ("a.jsonl:301: a JSON array, not an object", "remedy: write one JSON object a line"),
    ),
    "line that lacks the field": (
        source("a.jsonl", GOOD_LINES + '{"txt": "misspelt"}\n'),
        ("a.jsonl:301", "'text'", "txt", "remedy: "),
    ),
    "field that is no text": (
        source("a.jsonl", GOOD_LINES + '{"text": 3}\n'),
        ("a.jsonl:301: field 'text' is a number, not a string", "remedy: "),
    ),
    "rows longer than the model": (
        section("model.config", max_position_embeddings=16),
        ("sequence_length: rows of 32 tokens, and the model was made for 16", "remedy: use 16 or less"),
    ),
    "batch that cannot be split": (
        section("batch", micro_sequences=3),
        ("batch.micro_sequences: 3 does not divide", "use 2 or 4"),
    ),
    "vocabulary larger than the model's": (
        section("model.config", vocab_size=399),
        ("model.config.vocab_size: the model has 399 token ids and the tokenizer 400", "remedy: set it to 400 or more"),
    ),
    "vocabulary larger than the text supports": (
        section("tokenizer", vocab_size=40_000),
        ("tokenizer.vocab_size: sentencepiece cannot make a vocabulary of 40000", "remedy: take a size within"),
    ),
    "letter as a special token": (
        section("tokenizer", special_tokens=["<|user|>", "a"]),
        ("tokenizer.special_tokens: 'a' is a single character", "remedy: use names such as <|user|>"),
    ),
    "file of a byte-order mark and no more": (
        source("a.jsonl", b"\xef\xbb\xbf"),
        ("data.train: the corpus is empty", "remedy: check its files"),
    ),
    "directory of Parquet files": (
        lambda recipe, here: section("data", train=[{"kind": "parquet", "paths": [str(here)]}])(recipe, here),
        (": is a directory", "remedy: name its files", "/**/*.parquet"),
    ),
    "epoch that does not fill a batch": (
        section("", steps=None, epochs=2, batch={"sequences": 512, "micro_sequences": 8}),
        ("epochs: an epoch has 252 rows, and one optimizer step takes 512", "remedy: lower the batch to 252 rows"),
    ),
    "run name that no directory can have": (
        section("", name="a" * 300),
        ("name: must have at most 255 characters, given 300",),
    ),
    "prompt longer than the model": (
        section("", samples={"prompts": ["the", "fox " * 40]}),
        ("samples.prompts: the prompt 'fox fox", "it takes 1 to 31", "remedy: shorten the prompt"),
    ),
    "recurrent state and packed documents": (
        section("", model=MAMBA2),
        ("data.packing: Mamba2ForCausalLM carries state", "remedy: set data.packing: none"),
    ),
    "sizes that do not fit each other": (
        section("model.config", num_key_value_heads=3),
        ("model: LlamaForCausalLM of this config cannot run", "remedy: make its sizes fit"),
    ),
    "unknown architecture": (
        section("model", architecture="lama"),
        ("model.architecture: transformers has no decoder of type 'lama'; did you mean 'llama'?",),
    ),
    "misspelt field of the model": (
        section("model.config", hidden_sise=32),
        ("model.config.hidden_sise: LlamaConfig has no field", "did you mean 'hidden_size'?"),
    ),
    "model that is not there": (
        section("", model={"kind": "pretrained", "path": "./no/model"}),
        ("model.path: ", "remedy: name a directory"),
    ),
    "GGUF file that is not there": (
        section("", model={"kind": "gguf", "file": "no/model.gguf"}, tokenizer={"kind": "model"}),
        ("model.file: no such file: no/model.gguf", "remedy: correct the path"),
    ),
    "one process for an engine of several": (
        section("engine", kind="ddp"),
        ("engine.kind: engine ddp is for several processes, and there is one", "start with torchrun"),
    ),
    "misspelt key": (
        section("optimizer", learning_rate=0.1),
        ("recipe.yaml:", "optimizer.learning_rate: unknown key 'learning_rate'", "allowed: kind, lr"),
    ),
    "value of the wrong type": (
        section("", steps="many"),
        ("recipe.yaml:", "steps: expected an integer, given the text 'many'"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_touches_nothing_and_can_be_mended(
    mistake: str, train: Callable[..., Done], tmp_path: Path
) -> None:
    change, texts = MISTAKES[mistake]
    recipe = write_recipe(tmp_path, steps=2)
    good = recipe.read_text()
    rewritten(recipe, change)
    before = files(tmp_path)
    assert_refused(train(recipe), *texts)
    assert files(tmp_path) == before

    recipe.write_text(good)
    mended = train(recipe)
    assert mended.code == 0, mended.err
    assert (tmp_path / "runs" / "tiny" / "final" / "model.safetensors").is_file()


def test_mamba2_trains_once_its_rows_hold_one_document(train: Callable[..., Done], tmp_path: Path) -> None:
    """The remedy that the refusal names."""
    recipe = write_recipe(tmp_path, steps=2, model=MAMBA2)
    done = train(recipe, "data.packing=none")
    assert done.code == 0, done.err


def test_a_tokenizer_of_another_model(train: Callable[..., Done], tmp_path: Path) -> None:
    hf = tiny.decoder(max_position_embeddings=32).hf
    save_pretrained(hf, hf.state_dict().items(), tiny.tokenizer(), tmp_path / "model")
    recipe = write_recipe(tmp_path, steps=2, model={"kind": "pretrained", "path": str(tmp_path / "model")})
    before = files(tmp_path)
    refused = train(recipe)
    assert_refused(refused, "the model has 96 token ids and the tokenizer 400", "use the model's own tokenizer")
    assert files(tmp_path) == before
    mended = train(recipe, "tokenizer={kind: model}")
    assert mended.code == 0, mended.err


def test_an_adapter_in_place_of_a_model(train: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    recipe = write_recipe(tmp_path, steps=2, model={"kind": "pretrained", "path": str(tmp_path / "lora")})
    assert_refused(train(recipe), "model.path: ", "lora is an adapter, and no whole model", "remedy: merge it")


# -------------------------------------------------------------------------------- run directories


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a finished run of four steps, with a checkpoint at the second."""
    recipe = write_recipe(tmp_path_factory.mktemp("finished"), steps=4, checkpoint={"every": 2, "keep": 9})
    train_here(recipe)
    return recipe


@pytest.fixture
def killed(finished: Path, tmp_path: Path) -> tuple[Path, str]:
    """The recipe and output_dir of a run that was killed after its second step."""
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(finished.parent / "runs" / "tiny", run, copy_function=shutil.copy2)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    return finished, f"output_dir={tmp_path / 'runs'}"


@pytest.mark.parametrize("tokenizer", ["{kind: sentencepiece, vocab_size: 400}", "{kind: model}"])
def test_a_run_in_place_of_its_model(
    finished: Path, killed: tuple[Path, str], train: Callable[..., Done], tmp_path: Path, tokenizer: str
) -> None:
    run, unfinished = finished.parent / "runs" / "tiny", tmp_path / "runs" / "tiny"
    recipe = write_recipe(tmp_path, steps=2, name="next", model={"kind": "pretrained", "path": str(run)})
    settings = f"tokenizer={tokenizer}"
    assert_refused(train(recipe, settings), f"{run} is a run, whose model is in {run / 'final'}", "remedy: name that")
    refused = train(recipe, settings, f"model.path={unfinished}")
    assert_refused(refused, f"{unfinished} is a run that is not finished", "remedy: run its `llmtrain train` command")
    mended = train(recipe, settings, f"model.path={run / 'final'}")
    assert mended.code == 0, mended.err


def test_a_file_in_place_of_the_output_directory(train: Callable[..., Done], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, steps=2)
    (tmp_path / "runs").write_text("mine")
    before = files(tmp_path)
    assert_refused(train(recipe), str(tmp_path / "runs"), "cannot be written", "remedy: ", "output_dir=")
    assert files(tmp_path) == before
    assert train(recipe, f"output_dir={tmp_path / 'elsewhere'}").code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; run as another user to see it refused")
def test_a_directory_that_may_not_be_written(train: Callable[..., Done], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, steps=2)
    (tmp_path / "runs").mkdir(mode=0o500)
    assert_refused(train(recipe), "cannot be written: Permission denied", "remedy: ")


def test_a_directory_that_is_no_run(train: Callable[..., Done], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, steps=2)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "thesis.tex").write_text("mine")
    before = files(tmp_path)
    assert_refused(train(recipe), "is no run of llmtrain", "remedy: give another name=")
    assert files(tmp_path) == before
    assert train(recipe, "name=other").code == 0


@pytest.mark.parametrize("override", ["optimizer.lr=0.02", "seed=1", "model.config.hidden_size=64", "steps=8"])
def test_a_finished_run_is_not_that_of_another_recipe(
    finished: Path, train: Callable[..., Done], override: str
) -> None:
    before = files(finished.parent)
    key, _, value = override.partition("=")
    assert_refused(train(finished, override), "holds another recipe's run", f"{key} was", f"now {value}", "remedy: ")
    assert files(finished.parent) == before


def test_another_recipe_does_not_resume_a_killed_run(killed: tuple[Path, str], train: Callable[..., Done]) -> None:
    recipe, output = killed
    directory = Path(output.partition("=")[2])
    before = files(directory)
    assert_refused(train(recipe, output, "optimizer.lr=0.02"), "holds another recipe's run", "optimizer.lr was 0.01")
    assert files(directory) == before
    own = train(recipe, output)
    assert own.code == 0, own.err
    assert "going on from" in own.err and "step-00000002" in own.err


def test_how_a_run_is_carried_out_may_change(killed: tuple[Path, str], train: Callable[..., Done]) -> None:
    recipe, output = killed
    assert train(recipe, output, "evaluation.every=1", "checkpoint.every=1", "batch.micro_sequences=2").code == 0


def test_a_damaged_recipe_of_a_run_is_told(killed: tuple[Path, str], train: Callable[..., Done]) -> None:
    recipe, output = killed
    resolved = Path(output.partition("=")[2]) / "tiny" / "recipe.resolved.yaml"
    resolved.write_text(resolved.read_text()[:100])
    before = files(resolved.parent)
    assert_refused(train(recipe, output), "the recipe of the run that is there cannot be read", "remedy: ")
    assert files(resolved.parent) == before


def test_held_out_text_that_changed(train: Callable[..., Done], tmp_path: Path) -> None:
    """The curve would go on from a point that it was not at."""
    held_out = tmp_path / "held_out.txt"
    text = "the fox sleeps under a tree\n" * 50
    held_out.write_text(text)
    recipe = write_recipe(tmp_path, steps=4, checkpoint={"every": 2, "keep": 9})
    rewritten(recipe, section("data", validation=[{"kind": "text", "paths": [str(held_out)]}]))
    run = tmp_path / "runs" / "tiny"
    assert train(recipe).code == 0
    shutil.rmtree(run / "final")
    before = files(run)
    held_out.write_text(text + "and the dog too\n")
    assert_refused(
        train(recipe),
        "data.validation: the text, the tokenizer or how rows are made of them changed",
        "remedy: bring the former",
    )
    assert files(run) == before
    held_out.write_text(text)
    assert train(recipe).code == 0


def test_figures_edited_by_hand_do_not_stop_a_run(killed: tuple[Path, str], train: Callable[..., Done]) -> None:
    recipe, output = killed
    metrics = Path(output.partition("=")[2]) / "tiny" / "metrics.jsonl"
    metrics.write_text('{"step": "one"}\n[2]\n' + metrics.read_text())
    done = train(recipe, output)
    assert done.code == 0, done.err
    assert [read["step"] for read in read_metrics(metrics)] == [0, 1, 2, 3, 4]
    assert "metrics.jsonl:1 is no whole record" in done.err


# ---------------------------------------------------------------------------------- several ranks


ON_ITS_NODE = """
import os, sys
os.chdir(f"node-{os.environ['RANK']}")
from llmtrain import cli
only = [setting.removeprefix("rank-1:") for setting in sys.argv[3:] if os.environ["RANK"] == "1"]
sys.exit(cli.main(["train", *sys.argv[1:3], *only]))
"""


@pytest.mark.parametrize(
    ("override", "texts"),
    [
        pytest.param(
            "engine.kind=single",
            (
                "engine.kind: engine single is for one process, and there are 2",
                "use ddp, fsdp or auto, or start one process",
            ),
            marks=pytest.mark.slow,
        ),
        (
            "engine.kind=ddp",
            (
                "data.train: rank 1 reads other data than rank 0",
                "remedy: put them on a disk that all nodes share",
            ),
        ),
        pytest.param(
            "engine.kind=ddp rank-1:optimizer.lr=1e-4",
            (
                "optimizer.lr: rank 1 was started with 0.0001, and rank 0 with 0.01",
                "remedy: give all ranks the same recipe and settings",
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["an engine for one process", "files that differ from node to node", "another recipe on one rank"],
)
def test_what_only_several_ranks_can_have_wrong(override: str, texts: tuple[str, ...], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, batch={"sequences": 8, "micro_sequences": 4})
    rewritten(recipe, lambda content, here: content["data"]["train"][0].update(paths=["corpus.txt"]))
    lines = (tmp_path / "corpus.txt").read_text().splitlines(keepends=True)
    for rank in range(2):
        (tmp_path / f"node-{rank}").mkdir()
        (tmp_path / f"node-{rank}" / "corpus.txt").write_text("".join(lines[: len(lines) - rank]))
    (tmp_path / "program.py").write_text(ON_ITS_NODE)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "program.py", str(recipe), *override.split()],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0  # torchrun's own, which does not pass ours on
    assert "exitcode  : 2" in done.stderr
    for text in texts:
        assert text in done.stderr
    assert "please report" not in done.stderr
    assert not (tmp_path / "runs" / "tiny" / "recipe.resolved.yaml").exists()


def test_what_all_ranks_have_wrong_is_said_once(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, batch={"sequences": 8, "micro_sequences": 4})
    process = start(recipe, "data.train.0.paths=[nothing.txt]", ranks=2)
    output, _ = process.communicate()
    assert process.returncode != 0
    assert output.count("nothing.txt: no such file") == 1, output
    assert "please report" not in output


def test_ranks_that_were_announced_by_half(
    train: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(
        train(write_recipe(tmp_path)), "environment: WORLD_SIZE set but not RANK", "remedy: start with torchrun"
    )
    assert not (tmp_path / "runs").exists()


def test_a_late_refusal_leaves_a_lock_a_log_and_a_verdict(train: Callable[..., Done], tmp_path: Path) -> None:
    assert train(write_recipe(tmp_path, samples={"prompts": ["fox " * 40]})).code == 2
    left = {path.name for path in (tmp_path / "runs" / "tiny").iterdir()}
    assert left <= {*RUN_FILES, "logs"}
