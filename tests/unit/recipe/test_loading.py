import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.errors import EXIT_BAD_INPUT, InputError
from llmtrain.recipe.introspect import dotted_keys
from llmtrain.recipe.loading import load_recipe, recipe_file
from llmtrain.recipe.problems import RecipeError
from llmtrain.recipe.resolved import resolved_dump
from llmtrain.recipe.schema import Recipe
from llmtrain.recipe.yaml_tree import dump
from tests.unit.recipe.minimal import Write


def mistakes(path: str | Path, *overrides: str) -> list[str]:
    """What loading complains about, with the directory of the recipe cut off."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [str(problem).replace(f"{Path(path).parent}{os.sep}", "") for problem in caught.value.problems]


def test_a_file(write: Write) -> None:
    file = write()
    loaded = load_recipe(file)
    assert loaded.recipe.optimizer.lr == 1e-3
    assert loaded.recipe.engine.kind == "auto"
    assert loaded.path == file
    assert loaded.files == (file,)
    assert loaded.where("optimizer.lr") == f"{file}:14: optimizer.lr"
    assert loaded.where("data.train.0.paths") == f"{file}:12: data.train.0.paths"
    assert loaded.where("checkpoint.every") == f"{file}:1: checkpoint.every"


def test_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart").recipe.name == "quickstart"
    assert load_recipe("pretrain/mixture").recipe.name == "mixture"
    (tmp_path / "quickstart").mkdir()  # a directory of that name does not hide it
    assert recipe_file("quickstart").name == "quickstart.yaml"


def test_a_file_hides_a_shipped_name(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(name="quickstart")
    monkeypatch.chdir(file.parent)
    assert load_recipe("quickstart").recipe.name == "minimal"


def test_error_is_bad_input_and_says_how_many(write: Write) -> None:
    file = write()
    with pytest.raises(InputError) as one:
        load_recipe(file, ["stepz=1"])
    assert str(one.value).startswith("override 'stepz=1': stepz: unknown key 'stepz'; did you mean 'steps'?; allowed: ")
    assert one.value.exit_code == EXIT_BAD_INPUT
    with pytest.raises(InputError) as two:
        load_recipe(file, ["stepz=1", "seed=x"])
    assert str(two.value).startswith(f"2 mistakes in recipe {file}\n  override ")
    assert len(str(two.value).splitlines()) == 3


# ------------------------------------------------------------------------------- files that are none


def test_no_such_file(tmp_path: Path) -> None:
    (message,) = mistakes(str(tmp_path / "quikstart"))
    assert "there is neither a file quikstart nor a shipped recipe of that name" in message
    assert "shipped: quickstart, " in message and "pretrain/" in message
    assert "; did you mean 'quickstart'?" in mistakes("quikstart")[0]
    assert "quickstar.yaml" in mistakes("quickstar.yaml")[0]


def test_a_directory(tmp_path: Path) -> None:
    assert mistakes(tmp_path)[0].endswith("is a directory, not a recipe file")


def test_unreadable(write: Write) -> None:
    file = write()
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("root reads every file; run as another user")
    assert mistakes(file) == ["recipe.yaml: cannot be read: Permission denied"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"name: a\nsteps: \xff\n", "recipe.yaml:2: byte 0xff is not UTF-8; save the file as UTF-8"),
        ("name: a".encode("utf-16"), "recipe.yaml:1: byte 0xff is not UTF-8; save the file as UTF-8"),
        (b"", "recipe.yaml:1: the recipe is empty"),
        (b"# only a comment\n", "recipe.yaml:1: the recipe is empty"),
        (b"- a\n- b\n", "recipe.yaml:1: a recipe is a mapping: lines of key: value"),
        (b"\njust text\n", "recipe.yaml:2: a recipe is a mapping: lines of key: value"),
        (b"name: a\nbatch: {sequences: 1\n", "recipe.yaml:3: not valid YAML: expected ',' or '}'"),
    ],
)
def test_no_recipe_in_it(write: Write, raw: bytes, message: str) -> None:
    file = write()
    file.write_bytes(raw)
    (only,) = mistakes(file)
    assert only.startswith(message)


def test_a_corpus_is_no_recipe(write: Write) -> None:
    file = write()
    file.write_text("a line of text\n" * 100_000)
    assert mistakes(file) == ["recipe.yaml: has more than 1,000,000 bytes; a recipe is a short YAML file"]


def test_a_name_that_no_file_can_have() -> None:
    (message,) = mistakes("x" * 300)
    assert "there is neither a file xxx" in message


def test_byte_order_mark_and_windows_lines(write: Write) -> None:
    file = write()
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert load_recipe(file).recipe.name == "minimal"
    file.write_bytes(file.read_bytes().replace(b"steps:", b"stepz:", 1))
    assert any(line.startswith("recipe.yaml:3: stepz: ") for line in mistakes(file))


# -------------------------------------------------------------------------------------- extends


def test_extends_merges_mappings_and_replaces_lists(write: Write) -> None:
    parent = write(name="base/parent.yaml")
    child = write(
        "extends: base/parent.yaml\nname: child\nmodel:\n  config: {hidden_size: 32}\n"
        "data:\n  train:\n    - {kind: jsonl, paths: [b.jsonl]}\nsamples: {prompts: [hi]}\n",
        "child.yaml",
    )
    loaded = load_recipe(child)
    assert loaded.files == (child, parent)
    assert loaded.recipe.name == "child"
    assert loaded.recipe.model.model_dump()["config"] == {"hidden_size": 32, "num_hidden_layers": 2}
    assert [source.kind for source in loaded.recipe.data.train] == ["jsonl"]
    assert loaded.where("model.config.hidden_size").startswith(f"{child}:4")
    assert loaded.where("model.config.num_hidden_layers").startswith(f"{parent}:8")


def test_extends_replaces_a_section_of_another_kind(write: Write) -> None:
    write(name="parent.yaml")
    child = write("extends: parent.yaml\nschedule: {kind: constant}\nmodel: {kind: gguf, file: a}\n", "child.yaml")
    recipe = load_recipe(child).recipe
    assert recipe.schedule.warmup_steps == 0  # not the parent's five
    assert recipe.model.kind == "gguf"


def test_extends_keeps_a_section_of_the_same_kind_written_or_default(write: Write) -> None:
    write(name="parent.yaml").write_text(
        write().read_text(encoding="utf-8") + "engine: {compile: true}\n", encoding="utf-8"
    )
    child = write("extends: parent.yaml\noptimizer: {kind: adamw, eps: 1e-6}\nengine: {kind: auto}\n", "child.yaml")
    recipe = load_recipe(child).recipe
    assert (recipe.optimizer.lr, recipe.optimizer.eps) == (1e-3, 1e-6)
    assert recipe.engine.compile
    child = write("extends: parent.yaml\nengine: {kind: ddp}\n", "child.yaml")
    assert not load_recipe(child).recipe.engine.compile
    grandchild = write("extends: child.yaml\nengine: {timeout_seconds: 5}\n", "grandchild.yaml")
    assert load_recipe(grandchild).recipe.engine.model_dump()["timeout_seconds"] == 5
    assert load_recipe(grandchild).recipe.engine.kind == "ddp"


def test_extends_null_takes_away(write: Write) -> None:
    write(name="parent.yaml")
    child = write("extends: parent.yaml\nsteps: null\nepochs: 2\n", "child.yaml")
    assert load_recipe(child).recipe.steps is None
    child = write("extends: parent.yaml\nepochs: 2\n", "child.yaml")
    assert mistakes(child) == ["parent.yaml:3: give exactly one of steps and epochs (null takes the other away)"]


def test_extends_a_shipped_recipe(write: Write) -> None:
    file = write("extends: quickstart\nname: mine\nsteps: 10\nschedule: {warmup_steps: 1}\n")
    assert load_recipe(file).recipe.steps == 10


def test_mistakes_of_a_parent_name_the_parent(write: Write) -> None:
    parent = write(name="parent.yaml")
    parent.write_text(parent.read_text(encoding="utf-8").replace("lr: 1e-3", "lr: -1, lrr: 2"), encoding="utf-8")
    child = write("extends: parent.yaml\nseed: x\n", "child.yaml")
    places = sorted(line.split(": ")[0] for line in mistakes(child))
    assert places == ["child.yaml:2", "parent.yaml:14", "parent.yaml:14"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("missing.yaml", "recipe.yaml:2: extends: there is neither a file missing.yaml nor a shipped recipe"),
        ("recipe.yaml", "recipe.yaml:2: extends: the recipes extend each other: recipe.yaml -> recipe.yaml"),
        ("./../{directory}/recipe.yaml", "recipe.yaml:2: extends: the recipes extend each other"),
        ("[a, b]", "recipe.yaml:2: extends: expected one file or shipped recipe name"),
        ("3", "recipe.yaml:2: extends: expected one file or shipped recipe name"),
    ],
)
def test_bad_extends(write: Write, tmp_path: Path, value: str, message: str) -> None:
    file = write(f"name: a\nextends: {value.format(directory=tmp_path.name)}\n")
    (only,) = mistakes(file)
    assert only.startswith(message)


def test_a_cycle_of_two(write: Write) -> None:
    write("extends: recipe.yaml\n", "other.yaml")
    file = write("extends: other.yaml\n")
    chain = "recipe.yaml -> other.yaml -> recipe.yaml"
    assert mistakes(file) == [f"other.yaml:1: extends: the recipes extend each other: {chain}"]


# ------------------------------------------------------------------------------------ overrides


def test_overrides_in_order(write: Write) -> None:
    loaded = load_recipe(
        write(),
        [
            "optimizer.lr=3e-4",
            "data.train.0.paths=[x.txt, y.txt]",
            "data.train.0.weight=2",
            "model.config.hidden_size=96",
            "ema.decay=0.9",
            "samples.prompts=['a=b']",
            "description='one: two'",
            "optimizer.lr=5e-4",
        ],
    )
    recipe = loaded.recipe
    assert recipe.optimizer.lr == 5e-4
    assert recipe.data.train[0].model_dump() == {
        "kind": "text",
        "paths": ["x.txt", "y.txt"],
        "document": "file",
        "weight": 2,
    }
    assert recipe.model.model_dump()["config"] == {"hidden_size": 96, "num_hidden_layers": 2}
    assert recipe.ema is not None
    assert recipe.samples is not None
    assert recipe.samples.prompts == ["a=b"]
    assert recipe.description == "one: two"
    assert loaded.where("optimizer.lr") == "override 'optimizer.lr=5e-4': optimizer.lr"
    assert loaded.overrides[0] == "optimizer.lr=3e-4"


def test_override_of_the_kind_starts_the_section_anew(write: Write) -> None:
    recipe = load_recipe(write(), ["schedule.kind=wsd", "schedule.decay_steps=7"]).recipe
    assert recipe.schedule.model_dump() == {"kind": "wsd", "warmup_steps": 0, "decay_steps": 7, "min_ratio": 0.0}
    same = load_recipe(write(), ["schedule.kind=cosine", "optimizer.kind=adamw", "engine.kind=auto"]).recipe
    assert same == load_recipe(write()).recipe
    item = load_recipe(write(), ["data.train.0.kind=jsonl", "data.train.0.paths=[b]"]).recipe
    assert item.data.train[0].kind == "jsonl"


def test_override_with_a_section_replaces_it(write: Write) -> None:
    assert load_recipe(write(), ["batch={tokens: 256}"]).recipe.global_sequences == 2
    assert load_recipe(write(), ["engine={compile: true}"]).recipe.engine.compile


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "an override is key=value, for example optimizer.lr=3e-4"),
        ("=3", "an override is key=value, for example optimizer.lr=3e-4"),
        ("--steps=3", "--steps: unknown key '--steps'; did you mean 'steps'?; allowed: name, "),
        ("steps=", "give exactly one of steps and epochs"),
        ("steps=[1", "not valid YAML: expected ',' or ']'"),
        ("batch={sequences: 1, sequences: 2}", "key 'sequences' is given twice"),
        ("extends=quickstart", "extends is read from files only"),
        ("steps.x=1", "steps is no section but 100; it has no key 'x'"),
        ("data.train.x=1", "data.train is a list and has no item 'x'; its items are 0 to 0"),
        ("data.train.1.weight=1", "data.train is a list and has no item '1'; its items are 0 to 0"),
        ("data.train.-1.weight=1", "data.train is a list and has no item '-1'"),
        ("tokenizer.special_tokens.0=a", "tokenizer.special_tokens: expected a list, given a section with 0"),
        ("optimizer..lr=1", "optimizer.: unknown key ''"),
        ("epochs=1", "give exactly one of steps and epochs (null takes the other away)"),
        ("batch.tokens=100", "batch: give exactly one of sequences and tokens (null takes the other away)"),
        ("schedule.warmup_steps=101", "schedule.warmup_steps (101) exceeds steps (100)"),
    ],
)
def test_bad_override(write: Write, override: str, message: str) -> None:
    found = mistakes(write(), override)
    assert found[0].startswith(f"override {override!r}: {message}")


def test_override_of_an_empty_list(write: Write) -> None:
    messages = mistakes(write(), "tokenizer.special_tokens=[]", "tokenizer.special_tokens.0=a")
    assert messages == [
        "override 'tokenizer.special_tokens.0=a': tokenizer.special_tokens is a list and has no item '0'; it is empty"
    ]


# ----------------------------------------------------------------------------------- anything else

KEYS = sorted({key.replace("<index>", "0") for key in dotted_keys(Recipe)})
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["config", "ddp", "", "yes", "1e-3", "x" * 200, "é\n"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "paths", "lr", "0"]), inner),
    max_leaves=4,
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(KEYS), values), min_size=1, max_size=3))
def test_any_value_at_any_key_is_a_recipe_or_an_error_with_places(write: Write, changes: list[tuple[str, Any]]) -> None:
    file = write()
    overrides = [f"{key}={dump([value])[2:]}" for key, value in changes]  # without the item's dash
    try:
        recipe = load_recipe(file, overrides).recipe
    except RecipeError as error:
        places = [problem.place for problem in error.problems]
        assert all(place.startswith(("override ", f"{file}:")) for place in places)
    else:
        again = write(resolved_dump(recipe), "again.yaml")
        assert load_recipe(again).recipe == recipe


def test_no_warnings_and_nothing_on_the_terminal(write: Write) -> None:
    """pydantic warns of shadowed names and doubtful defaults, and PyYAML of nothing; neither may reach a user."""
    program = f"from llmtrain.recipe.loading import load_recipe; load_recipe({str(write())!r})"
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
