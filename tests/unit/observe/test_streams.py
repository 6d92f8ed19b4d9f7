"""A console that goes away under a process that writes to it."""

import os
import pty
import subprocess
import sys

import pytest

from llmtrain.observe.streams import outliving_the_console
from tests.ranks import TIMEOUT

PROGRAM = """
import logging, os, subprocess, sys, time
from llmtrain.observe.streams import outliving_the_console
with outliving_the_console():
    from llmtrain.observe.console import say
    logging.getLogger().addHandler(logging.StreamHandler())
    print("ready", flush=True)
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    for number in range(3):
        print("out", number, flush=True)
        print("error", number, file=sys.stderr)
        say("rich")
        logging.error("logged")
    subprocess.run(["sh", "-c", "echo child >&2"], check=False)
    with open(sys.argv[1], "w") as file:
        file.write("came to its end")
sys.exit(75)
"""


def came_to_its_end(process: "subprocess.Popen[bytes]", path: os.PathLike[str]) -> None:
    open(path, "w").close()
    assert process.wait(TIMEOUT) == 75
    with open(path) as file:
        assert file.read() == "came to its end"


def test_a_pipe_whose_reader_has_left(tmp_path) -> None:
    """`llmtrain train ... 2>&1 | head`"""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "go")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.stdout.close()
    came_to_its_end(process, tmp_path / "go")


def test_a_terminal_that_was_closed(tmp_path) -> None:
    mine, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "go")], stdin=its, stdout=its, stderr=its, start_new_session=True
    )
    os.close(its)
    assert os.read(mine, 100).startswith(b"ready")
    os.close(mine)
    came_to_its_end(process, tmp_path / "go")


def test_a_full_disk_drops_what_does_not_fit(tmp_path) -> None:
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "go")], stdout=full, stderr=full)
        came_to_its_end(process, tmp_path / "go")


def test_what_was_closed_before_leads_nowhere(tmp_path) -> None:
    """`llmtrain train ... <&- >&- 2>&-`: and what is printed does not go into the next file that is opened."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "go")]
    process = subprocess.Popen(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command])
    came_to_its_end(process, tmp_path / "go")


@pytest.mark.parametrize(
    ("output", "told"), [("> /dev/full", "No space left on device"), ("| true", "None"), (">&-", "None"), ("", "None")]
)
def test_why_something_could_not_be_written(output: str, told: str) -> None:
    program = """
import sys, time
from llmtrain.observe.streams import outliving_the_console
with outliving_the_console() as unwritten:
    time.sleep(0.2)
    print("something")
    error = unwritten()
    sys.stderr.write(str(error and error.strerror))
"""
    command = ["sh", "-c", f'"$@" {output}', "sh", sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == told


def test_what_is_written_arrives(tmp_path) -> None:
    (tmp_path / "go").touch()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "go")], capture_output=True, text=True, check=False
    )
    assert done.stdout == "ready\nout 0\nout 1\nout 2\n"
    assert done.stderr == "".join(f"error {n}\nrich\nlogged\n" for n in range(3)) + "child\n"


def test_streams_that_a_caller_has_replaced_stay(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with outliving_the_console():
        assert (sys.stdout, sys.stderr) == before
