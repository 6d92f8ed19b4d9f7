"""Many runs of several ranks in one set of processes: importing torch costs more than a tiny run.

usage of a rank: python -m tests.together JOBS.json, with the environment that torchrun would give
"""

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from llmtrain.recipe.loading import load_recipe


def train_together(jobs: Sequence[tuple[Path, Sequence[str]]], ranks: int) -> list[Path]:
    """Trains each (recipe, overrides) to its end on `ranks` processes, one job after another; their run directories."""
    if not jobs:
        return []
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "jobs.json"
        # A store of its own for each job: keys of the one before would answer for the next.
        file.write_text(json.dumps([[str(recipe), list(overrides), _free_port()] for recipe, overrides in jobs]))
        processes = []
        for rank in range(ranks):
            log = (Path(name) / f"{rank}.log").open("w+")
            environment = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, "-m", "tests.together", str(file)]
            processes.append((subprocess.Popen(command, stdout=log, stderr=log, env=environment), log))
        try:
            codes = _wait([process for process, _ in processes])
        finally:  # of a test's time limit too: what the ranks said is why they hung, and none may outlive the test
            outputs = []
            for process, log in processes:
                process.kill()
                process.wait()
                log.seek(0)
                outputs.append(log.read()[-6000:])
                log.close()
            said = "\n".join(outputs)
            print(said)
        assert codes == [0] * ranks, said
    return [load_recipe(recipe, overrides).recipe.run_directory for recipe, overrides in jobs]


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """Exit codes, once all have ended or one has failed: the others would wait for it for as long as gloo does."""
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return codes
        time.sleep(0.05)


def _free_port() -> int:
    """Below those that systems give to outgoing connections, of which a job's own may hold one when its turn comes."""
    # The system's randomness: a run in this process seeds `random`, and both of pytest's workers would draw one port.
    chooser = random.SystemRandom()
    while True:
        port = chooser.randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def main(file: Path) -> None:
    from llmtrain import run

    for recipe, overrides, port in json.loads(file.read_text()):
        os.environ["MASTER_PORT"] = str(port)
        code = run.train(load_recipe(recipe, overrides))
        assert code == 0, f"{overrides}: exit code {code}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
