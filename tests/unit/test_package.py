"""The package as it is installed: metadata, what the wheel carries, and what importing it costs."""

import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import llmtrain

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Standard output of a command that must succeed, in an environment that knows no checkout."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_metadata() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["requires-python"] == ">=3.11"
    assert PROJECT["scripts"] == {"llmtrain": "llmtrain.cli:main"}
    assert "torch>=2.9,<2.14" in PROJECT["dependencies"]
    assert {"test", "docs"} <= set(PROJECT["optional-dependencies"])
    assert all(">=" in dependency for dependency in PROJECT["dependencies"]), "every dependency has a lower bound"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")
    assert (ROOT / "llmtrain" / "py.typed").is_file()


def test_only_agreed_names_at_the_top() -> None:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not listed:
        pytest.skip("not a git checkout; run from one")
    folders = {line.split("/")[0] for line in listed if "/" in line}
    assert {name for name in folders if not name.startswith(".")} <= {"llmtrain", "recipes", "launch", "tests", "docs"}


@pytest.mark.parametrize(
    "statement",
    ["import llmtrain.cli", "from llmtrain.recipe import loading, batch, resolved, reference, shipped"],
)
def test_imports_nothing_heavy(statement: str) -> None:
    """torch, transformers and numpy take seconds to import, and help must answer at once."""
    loaded = run(sys.executable, "-c", f"import sys; {statement}; print(*sys.modules)").split()
    assert "llmtrain.recipe.schema" in loaded
    assert not {"torch", "transformers", "numpy", "datasets", "accelerate", "sentencepiece"} & set(loaded)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["recipes", "validate", "quickstart"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "llmtrain", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "llmtrain.cli" in loaded
    assert not {"torch", "transformers", "numpy"} & loaded


@pytest.mark.slow
def test_wheel_works_in_a_clean_environment(tmp_path: Path) -> None:
    """Built, installed with the few packages that recipes need, and run away from the checkout.

    The heavy dependencies are left out: what is tested is that the wheel carries its files.
    """
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    assert f"-{llmtrain.__version__}-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"llmtrain/py.typed", "llmtrain/_shipped/launch/torchrun_single_node.sh"} <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]

    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    light = [line for line in PROJECT["dependencies"] if line.startswith(("pydantic", "pyyaml", "typer", "rich"))]
    run(programs / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *light)
    run(programs / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", wheel)

    recipes = ROOT / "recipes"
    shipped = sorted(path.relative_to(recipes).with_suffix("").as_posix() for path in recipes.rglob("*.yaml"))
    listed = run(programs / "llmtrain", "recipes", "list", cwd=tmp_path).splitlines()[1:]
    assert sorted(line.split("\t")[0] for line in listed) == shipped
    assert "ok: quickstart" in run(programs / "llmtrain", "recipes", "validate", "quickstart", cwd=tmp_path)
    where = run(
        programs / "python",
        "-c",
        "from llmtrain.recipe.shipped import launch_directory as d; print(*sorted(p.name for p in d().iterdir()))",
        cwd=tmp_path,
    )
    assert where.split() == sorted(path.name for path in (ROOT / "launch").iterdir())
