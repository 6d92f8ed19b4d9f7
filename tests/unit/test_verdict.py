"""What is written at the end of a run, and what scripts are told of it. The runs are in tests/faults."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtrain.errors import InputError
from llmtrain.recipe.loading import LoadedRecipe, load_recipe
from llmtrain.recipe.resolved import resolved_dump
from llmtrain.verdict import FILE, read_verdict, tell, write_verdict
from tests.unit.recipe.minimal import MINIMAL


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedRecipe:
    (tmp_path / "recipe.yaml").write_text(MINIMAL, encoding="utf-8")
    loaded = load_recipe(tmp_path / "recipe.yaml", [f"output_dir={tmp_path / 'runs'}"])
    loaded.recipe.run_directory.mkdir(parents=True)
    return loaded


@pytest.mark.parametrize(
    ("code", "name", "line"),
    [
        (0, "done", "done at step 7 of 9"),
        (75, "preempted", "preempted at step 7 of 9: because"),
        (2, "bad input", "bad input at step 7 of 9: because"),
        (1, "failed", "failed at step 7 of 9: because"),
        (137, "failed", "failed at step 7 of 9: because"),
    ],
)
def test_every_end_has_its_line_and_code(loaded: LoadedRecipe, code: int, name: str, line: str) -> None:
    directory = loaded.recipe.run_directory
    began = time.time()
    write_verdict(directory, code, 7, 9, "because\nof all that" if code else "")
    assert tell(loaded, began - 1, 0, False) == (f"{line} ({directory})", code)
    content = json.loads((directory / FILE).read_text())
    assert content.keys() == {"verdict", "exit_code", "step", "steps", "time", "message"}
    assert (content["verdict"], content["exit_code"]) == (name, code)
    assert [path.name for path in directory.iterdir()] == [FILE]


def test_a_run_that_ended_before_its_steps_were_known(loaded: LoadedRecipe) -> None:
    write_verdict(loaded.recipe.run_directory, 2, 0, None, "data.train: no such file")
    line, _ = tell(loaded, 0, 0, False)
    assert line.startswith("bad input: data.train: no such file (")


def test_no_verdict_is_a_failure(loaded: LoadedRecipe) -> None:
    line, code = tell(loaded, 0, 0, False)
    assert code == 1 and line.startswith("no verdict: no run has begun")
    write_verdict(loaded.recipe.run_directory, None, 0, None, "")
    line, code = tell(loaded, 0, 0, False)
    assert code == 1 and line.endswith("is running, or was killed")
    assert tell(loaded, 0, 0, True)[1] == 1  # asked to stop, and killed before it could save


def test_the_verdict_of_an_earlier_start_does_not_count(loaded: LoadedRecipe) -> None:
    """Or a job that was preempted once and cannot even begin again would be requeued for ever."""
    write_verdict(loaded.recipe.run_directory, 75, 7, 9, "")
    assert tell(loaded, time.time() + 10, 0, False)[1] == 1
    assert tell(loaded, time.time() + 10, 0, True)[1] == 75  # stopped before it began


def test_a_run_that_is_about_to_end_is_waited_for(loaded: LoadedRecipe) -> None:
    directory = loaded.recipe.run_directory
    write_verdict(directory, None, 0, None, "")
    program = (
        "import sys, time; from pathlib import Path; from llmtrain.verdict import write_verdict; "
        "time.sleep(1); write_verdict(Path(sys.argv[1]), 75, 7, 9, '')"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(directory)]):
        assert tell(loaded, 0, 120, False)[1] == 75


def test_another_recipes_verdict_is_refused(loaded: LoadedRecipe, tmp_path: Path) -> None:
    directory = loaded.recipe.run_directory
    write_verdict(directory, 0, 7, 9, "")
    (directory / "recipe.resolved.yaml").write_text(resolved_dump(loaded.recipe))
    assert tell(loaded, 0, 0, False)[1] == 0
    other = load_recipe(tmp_path / "recipe.yaml", [f"output_dir={tmp_path / 'runs'}", "seed=7"])
    with pytest.raises(InputError, match="differ in seed"):
        tell(other, 0, 0, False)


def test_what_is_no_verdict_is_refused(loaded: LoadedRecipe) -> None:
    (loaded.recipe.run_directory / FILE).write_text('{"verdict": "done"}')
    with pytest.raises(InputError, match="cannot be read"):
        read_verdict(loaded.recipe.run_directory)


def test_asking_imports_no_torch(loaded: LoadedRecipe, tmp_path: Path) -> None:
    """A launcher asks after each run."""
    write_verdict(loaded.recipe.run_directory, 75, 7, 9, "")
    program = (
        "import sys; from llmtrain import cli\ntry: cli.main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    asked = [str(tmp_path / "recipe.yaml"), f"output_dir={tmp_path / 'runs'}", "--since", "12.5"]
    done = subprocess.run(
        [sys.executable, "-c", program, "verdict", *asked], capture_output=True, text=True, check=False
    )
    assert done.returncode == 75, done.stderr
    assert done.stdout.startswith("preempted at step 7 of 9 (")
