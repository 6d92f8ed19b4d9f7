"""The processes of a run under torchrun, to send signals to, and what they say of it."""

import re
import subprocess
import time
from pathlib import Path

TIMEOUT = 180  # generous: a machine that is busy is no failure


def ranks_of(torchrun: int) -> dict[int, int]:
    """Process id of each rank that torchrun's process has started."""
    children = subprocess.run(["pgrep", "-P", str(torchrun)], capture_output=True, text=True, check=False)
    found = {}
    for pid in map(int, children.stdout.split()):
        settings = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks = [setting for setting in settings if setting.startswith(b"RANK=")]
        if ranks:
            found[int(ranks[0].removeprefix(b"RANK="))] = pid
    return found


def wait_until_trained(metrics: Path, process: subprocess.Popen[str], num_lines: int = 3) -> None:
    """Until metrics.jsonl has so many lines: one before the first step, and one a step."""
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= num_lines, process, str(metrics))


def wait_for_text(path: Path, text: str, process: subprocess.Popen[str]) -> None:
    wait_for(lambda: path.exists() and text in path.read_text(), process, f"{text!r} in {path}")


def wait_for(condition: object, process: subprocess.Popen[str], what: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if process.poll() is not None and not condition():
            raise AssertionError(f"it ended without {what}: {process.stdout.read() if process.stdout else ''}")
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.005)


def seconds_in(output: str, before: str, after: str) -> int:
    """The whole seconds that a message tells between two texts: a busy machine makes them more than were asked for."""
    told = re.search(rf"{re.escape(before)}(\d+){re.escape(after)}", output)
    assert told, output
    return int(told[1])
