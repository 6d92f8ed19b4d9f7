"""`llmtrain checkpoint list` and `verify`, as a user runs them."""

from pathlib import Path

import pytest

from llmtrain import cli
from tests.runs import train_here, write_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(write_recipe(tmp_path_factory.mktemp("run")))


def asked(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(cli.main(["checkpoint", *arguments]))
    code = ended.value.code
    assert isinstance(code, int)
    return code


def test_a_whole_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked("list", str(run)) == 0
    header, newest, older = capsys.readouterr().out.splitlines()
    assert header.split("\t")[0] == "step"
    assert newest.split("\t")[0] == "6" and older.split("\t")[0] == "3"
    assert "single process on cpu, fp32" in newest and "loss 4." in newest
    assert asked("verify", str(run)) == 0
    assert [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()] == ["whole", "whole"]


def test_a_flipped_byte_is_found_by_verify_and_a_short_file_by_both(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = run / "checkpoints" / "step-00000003" / "state-rank-00000.safetensors"
    whole = state.read_bytes()
    try:
        state.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert asked("list", str(run)) == 0  # it reads no files
        assert asked("verify", str(run)) == 1
        captured = capsys.readouterr().out
        assert "step-00000003: broken: state-rank-00000.safetensors does not match its sha256" in captured
        assert "step-00000006: whole" in captured
        state.write_bytes(whole[:-1])
        for command in ("list", "verify"):
            assert asked(command, str(run)) == 1
            captured = "".join(capsys.readouterr())
            assert f"has {len(whole) - 1} bytes and should have {len(whole)}" in captured
        assert asked("verify", str(run / "checkpoints" / "step-00000006")) == 0
    finally:
        state.write_bytes(whole)


@pytest.mark.parametrize("where", ["nowhere", "x" * 300, "."])
def test_no_checkpoints(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked("list", str(tmp_path / where)) == 2
    assert "RUN: " in capsys.readouterr().err
