import json
import logging
import math
from pathlib import Path

import pytest

from llmtrain.errors import InputError
from llmtrain.observe.metrics import MetricsLog, read_metrics


def _written(path: Path, resume_step: int, steps: range) -> list[int]:
    log = MetricsLog(path, resume_step)
    for step in steps:
        log.write({"step": step, "loss": step / 10})
    log.close()
    return [record["step"] for record in read_metrics(path)]


def test_one_object_a_line_and_seen_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.write({"step": 1.0, "loss": 2.5, "tokens": 512.0})
    assert path.read_text() == '{"step": 1, "loss": 2.5, "tokens": 512}\n'  # before close
    log.close()


def test_what_is_not_finite_is_null_and_read_as_nan(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m", 0)
    log.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "skipped": 1})
    log.close()
    record = json.loads((tmp_path / "m").read_text(), parse_constant=pytest.fail)
    assert record == {"step": 1, "loss": None, "grad_norm": None, "skipped": 1}
    (read,) = read_metrics(tmp_path / "m")
    assert math.isnan(read["loss"]) and math.isnan(read["grad_norm"]) and read["skipped"] == 1


def test_resuming_drops_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m"
    assert _written(path, 0, range(8)) == list(range(8))
    assert _written(path, 5, range(6, 9)) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert _written(path, 0, range(2)) == [0, 1]


@pytest.mark.parametrize("cut", range(1, 26))
def test_a_torn_last_line_is_left_out_wherever_it_was_torn(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m"
    _written(path, 0, range(1, 4))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    expected = [1, 2, 3] if cut == 1 else [1, 2]  # without its newline only, the last object is whole
    if cut >= len(whole.splitlines(keepends=True)[-1]):
        expected = [1, 2]
    assert [record["step"] for record in read_metrics(path)] == expected
    assert _written(path, 3, range(4, 5)) == [*expected, 4]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_broken_line_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1}\n12\n\xff\xfe\n{"loss": 1}\n{"step": 2}\n')
    with caplog.at_level(logging.WARNING):
        assert [record["step"] for record in read_metrics(path)] == [1, 2]
    assert all(f"m:{line} is no whole record" in caplog.text for line in (2, 3, 4))


def test_texts_are_kept_as_they_are(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m", 0)
    log.write({"step": 1, "prompt": "a\n\u2028é\udc80"[:4], "completion": ""})
    log.close()
    assert read_metrics(tmp_path / "m")[0]["prompt"] == "a\n\u2028é"


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_metrics(tmp_path / "m")


@pytest.mark.parametrize(
    "line",
    ['{"step": "abc"}', '{"step": null}', '{"step": 1.5}', '{"step": [1]}', "{}", "[1]", "1", "[" * 100_000, "\0"],
)
def test_lines_that_are_none_of_ours_are_left_out(tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m"
    _written(path, 0, range(1, 4))
    path.write_text(f"{line}\n{path.read_text()}")
    assert _written(path, 2, range(3, 5)) == [1, 2, 3, 4]
    assert f"{path}:1 is no whole record" in caplog.text
