"""Progress: silent when short, a bar on a terminal, lines elsewhere."""

import io
import logging

import pytest
from rich.console import Console

from llmtrain.data import progress as module
from llmtrain.data.progress import byte_progress


def test_short_work_is_silent(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), byte_progress("work", 100) as progress:
        progress.advance(100)
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO):
        with byte_progress("work", 4_000_000) as progress:
            progress.advance(1_000_000)
            progress.advance(4_000_000)  # totals are estimates
        with byte_progress("endless", None) as progress:
            progress.advance(1_000_000)
    first, second, third = (record.getMessage() for record in caplog.records)
    assert first.startswith("work: 1.0 MB at ") and "25%, about " in first
    assert second.startswith("work: 5.0 MB at ") and "%" not in second
    assert third.startswith("endless: 1.0 MB at ") and "%" not in third
    assert capfd.readouterr() == ("", "")


def test_lines_of_commands_that_set_up_no_logging(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    # As a new process has it, whatever ran in this one.
    with caplog.at_level(logging.WARNING, logger=module.log.name), byte_progress("work [1]", 4_000_000) as progress:
        progress.advance(1_000_000)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("work [1]: 1.0 MB at ") and "25%, about " in err


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    written = io.StringIO()
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(module, "Console", lambda stderr: Console(file=written, force_terminal=True, width=100))
    with caplog.at_level(logging.INFO), byte_progress("work", 4_000_000) as progress:
        progress.advance(1_000_000)
        progress.advance(2_000_000)
    assert "work" in written.getvalue() and "3.0/3.0 MB" in written.getvalue()
    assert not caplog.records
