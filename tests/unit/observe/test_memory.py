import subprocess
import sys

import torch

CODE = """
import torch
from llmtrain.observe.memory import peak_memory_bytes
cpu = torch.device("cpu")
before = peak_memory_bytes(cpu)
held = torch.ones(500_000_000, dtype=torch.uint8)
del held
print(before, peak_memory_bytes(cpu))
"""


def test_the_peak_is_this_process_own_and_stays_after_the_memory_is_freed() -> None:
    large = torch.ones(700_000_000, dtype=torch.uint8)  # which the child must not report as its own
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 50e6 < before < 650e6  # bytes, not kilobytes
    assert 500e6 < after < before + 600e6
    del large
