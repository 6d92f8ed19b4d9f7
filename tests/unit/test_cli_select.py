"""What `llmtrain rejection-sample` and `llmtrain label-steps` refuse as no such use of theirs."""

import pytest

from tests.saved import CommandLine


@pytest.fixture
def llmtrain(capfd: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capfd)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["rejection-sample", "model", "task.yaml"], "--output"),
        (["rejection-sample", "model", "task.yaml", "--output", "a", "--aggregate", "min"], "give one by --scorer"),
        (["rejection-sample", "model", "task.yaml", "--output", "a", "--scorer-base", "b"], "give one by --scorer"),
        (["rejection-sample", "model", "task.yaml", "--output", "a", "--keep", "0"], "--keep"),
        (["label-steps", "model", "task.yaml", "--output", "a", "--rollouts", "0"], "--rollouts"),
        (["label-steps", "model", "task.yaml", "--output", "a", "--input", "b", "--num", "2"], "--input has solutions"),
    ],
)
def test_usage(llmtrain: CommandLine, arguments: list[str], text: str) -> None:
    done = llmtrain(*arguments)
    assert done.code == 2
    assert f"Usage: llmtrain {arguments[0]}" in done.err and text in " ".join(done.err.split())


@pytest.mark.parametrize("command", ["rejection-sample", "label-steps"])
def test_help(llmtrain: CommandLine, command: str) -> None:
    done = llmtrain(command, "--help")
    assert done.code == 0 and f"Example: llmtrain {command}" in done.out
