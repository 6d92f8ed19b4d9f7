"""What a run really was: the recipe with every default, and where it ran."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from llmtrain import __version__
from llmtrain.errors import InputError
from llmtrain.recipe.schema import Recipe
from llmtrain.recipe.yaml_tree import dump

RESOLVED = "recipe.resolved.yaml"  # the file in a run directory

# Keys that say how a run is carried out and watched, not what it computes: a run may be resumed
# with other values here. Everything else makes it another run.
EXECUTION_KEYS = frozenset(
    {
        "description",
        "output_dir",
        "device",
        "engine",
        "early_stopping",
        "evaluation",
        "samples",
        "checkpoint",
        "watchdog",
        "logging",
    }
)
EXECUTION_SUBKEYS = frozenset({"batch.micro_sequences", "data.cache_dir"})

# Those whose version can change a run's numbers or files.
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "datasets",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
)


def check_is_no_run(directory: str, where: str) -> None:
    """Raises InputError where what is to hold a model or a tokenizer is the directory of a run, which has a final/."""
    path = Path(directory).expanduser()
    if not os.path.isfile(path / RESOLVED):  # unlike Path.is_file it raises nothing for a name that is too long
        return
    if os.path.isdir(path / "final"):
        raise InputError(f"{path} is a run, whose model is in {path / 'final'}", where=where, remedy="name that")
    raise InputError(
        f"{path} is a run that is not finished: it has no final/ yet",
        where=where,
        remedy="run its `llmtrain train` command again, which goes on from its last checkpoint",
    )


def resolved_dump(recipe: Recipe) -> str:
    """YAML with every key, defaults filled in; it loads back to an equal recipe."""
    return dump(_kind_first(recipe.model_dump()))


def flattened(recipe: Recipe) -> dict[str, Any]:
    """All of it: dotted key to JSON value."""
    return dict(_flatten(recipe.model_dump(), ""))


def identity(recipe: Recipe) -> dict[str, Any]:
    """What makes a run the run it is: dotted key to JSON value.

    Without the keys that only say how it is carried out and watched, so that equal identities may
    continue each other's checkpoints.
    """
    whole = recipe.model_dump()
    kept = {key: value for key, value in whole.items() if key not in EXECUTION_KEYS}
    return {key: value for key, value in _flatten(kept, "") if key not in EXECUTION_SUBKEYS}


def identity_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) where two identities differ; None stands for an absent key."""
    keys = dict.fromkeys([*old, *new])
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _kind_first(value: Any) -> Any:
    if isinstance(value, dict):
        ordered = sorted(value.items(), key=lambda item: item[0] != "kind")
        return {key: _kind_first(item) for key, item in ordered}
    return [_kind_first(item) for item in value] if isinstance(value, list) else value


def _flatten(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value:
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        yield path, value
        return
    for key, item in items:
        yield from _flatten(item, f"{path}.{key}" if path else key)


def environment() -> dict[str, Any]:
    """Versions, git commit and hardware of this process; JSON values. Imports nothing heavy.

    GPUs are listed where torch is already imported, since asking without it would import it.
    """
    return {
        "llmtrain": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": _git(Path.cwd()),
        "hostname": platform.node(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpus(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(directory: Path) -> dict[str, Any] | None:
    """Commit of the working directory and whether it has changes; None outside a repository."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(directory)]
    commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode != 0:
        return None
    status = subprocess.run([*command, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
