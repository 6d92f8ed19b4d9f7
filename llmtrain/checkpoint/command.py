"""`llmtrain checkpoint list` and `verify`: what a run has saved, and whether it is whole."""

import os
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import Progress

from llmtrain.checkpoint.files import problem_with, readable_bytes
from llmtrain.checkpoint.manifest import Manifest, checkpoints_in, layout_problem, leftovers_in, read_manifest
from llmtrain.errors import InputError
from llmtrain.tables import print_table

_HEADER = ("step", "saved", "size", "ranks", "engine", "held-out figures")


def found(path: Path, where: str = "RUN") -> list[Path]:
    """The checkpoints that `path`, given as `where`, means: a run's, a directory's, or itself; the newest first.

    Raises:
        InputError: there are none.
    """
    if not os.path.isdir(path):  # pathlib's raises where a name is too long or forbidden
        raise InputError(f"no such directory: {path}", where=where, remedy="name a run directory or a checkpoint")
    if path.name.startswith("step-"):
        return [path]
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpoints = checkpoints_in(directory)
    if not checkpoints:
        raise InputError(
            f"there are no checkpoints in {directory}",
            where=where,
            remedy="name a run directory (runs/NAME) that has trained for checkpoint.every steps",
        )
    return checkpoints


def show(path: Path) -> int:
    """Prints the checkpoints of a run; their files are not read. Exit code 1 where one is visibly broken."""
    rows, broken = [], []
    for checkpoint in found(path):
        manifest, problem = read_manifest(checkpoint)
        problem = problem or (_missing(checkpoint, manifest) if manifest is not None else None)
        if manifest is None or problem is not None:
            broken.append(f"{checkpoint}: {problem}")
            continue
        rows.append(_row(manifest))
    print_table(_HEADER, rows, right=("step", "size", "ranks"))
    for leftover in leftovers_in(checkpoint.parent):
        broken.append(f"{leftover}: what an interrupted save or removal left; the next save removes it")
    for line in broken:
        typer.echo(line, err=True)
    return 1 if broken else 0


def verify(path: Path) -> int:
    """Reads every file of a run's checkpoints and compares their hashes; exit code 1 where one is broken."""
    checkpoints = found(path)
    manifests = {checkpoint: read_manifest(checkpoint) for checkpoint in checkpoints}
    total = sum(record.bytes for manifest, _ in manifests.values() if manifest for record in manifest.files.values())
    failed = False
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("hashing", total=total)
        for checkpoint, (manifest, problem) in manifests.items():
            for name, record in manifest.files.items() if manifest is not None else ():
                problem = problem or problem_with(checkpoint / name, record)
                progress.advance(task, record.bytes)
            if manifest is not None and problem is None:
                problem = layout_problem(checkpoint, manifest)
            failed = failed or problem is not None
            typer.echo(f"{checkpoint}: {'whole' if problem is None else f'broken: {problem}'}")
    return 1 if failed else 0


def _missing(checkpoint: Path, manifest: Manifest) -> str | None:
    for name, record in manifest.files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != record.bytes:
            return problem_with(path, record)
    return None


def _row(manifest: Manifest) -> tuple[str, ...]:
    size = readable_bytes(sum(record.bytes for record in manifest.files.values()))
    figures = ", ".join(f"{name} {value:.4g}" for name, value in manifest.metrics.items())
    return str(manifest.step), manifest.time, size, str(manifest.world_size), manifest.engine, figures
