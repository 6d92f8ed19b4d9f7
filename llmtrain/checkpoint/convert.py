"""`llmtrain checkpoint convert`: to DeepSpeed's universal layout (arXiv 2406.18820), and back.

    DEST/latest_universal                           names the directory beside it
    DEST/global_stepN/
        mp_rank_00_model_states.pt                  counters; for ZeRO-3 by its other name too
        zero/optimizer_state.pt                     global state of the optimizer
        zero/PARAMETER/{fp32,exp_avg,exp_avg_sq,step}.pt
        llmtrain/step-NNNNNNNN/                     our manifest.json, state.json and tensors.json
        llmtrain/tensors/                           what DeepSpeed has no place for: averaged weights, a loss scale

DeepSpeed knows a parameter by its name in the transformers model. What its loaders want was read and tried
with 0.19.8. One tensor at a time is in memory. The generators' states stay behind.
"""

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from torch import Tensor

import llmtrain
from llmtrain.checkpoint.command import found
from llmtrain.checkpoint.files import DTYPE_NAMES, problem_with, write_bytes, write_tensors
from llmtrain.checkpoint.flat import TensorRecord
from llmtrain.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    STATE,
    TENSORS,
    Manifest,
    checkpoints_in,
    layout_problem,
    read_manifest,
    read_state,
    read_tensors,
)
from llmtrain.checkpoint.match import of_one_rank
from llmtrain.checkpoint.storage import state_file
from llmtrain.contracts import POLICY
from llmtrain.directories import fsync_path
from llmtrain.errors import InputError
from llmtrain.models.decoder import Decoder
from llmtrain.recipe.resolved import RESOLVED

_DEEPSPEED = "0.19.8"
_LATEST, _OURS = "latest_universal", "llmtrain"
_WEIGHT = re.compile(re.escape(f"{POLICY}/model.{Decoder.PREFIX}") + "(.+)")
_MOMENT = re.compile(re.escape(f"{POLICY}/optimizer.{Decoder.PREFIX}") + r"(.+)\.(exp_avg|exp_avg_sq|step)")


def to_universal(source: Path, dest: Path) -> None:
    """Writes a checkpoint of ours, or a run's newest whole one, as `dest` in the universal layout.

    Raises:
        InputError: there is no whole one; `dest` exists or cannot be written; ZeRO could not hold it.
    """
    _refuse_existing(dest)
    with _progress() as progress:
        checkpoint, manifest = _newest_whole(source, progress)
        tensors = _of_all_ranks(checkpoint)
        with _written_aside(dest) as root, ExitStack() as opened:
            files = {
                rank: opened.enter_context(safe_open(checkpoint / state_file(rank), framework="pt"))
                for rank in sorted({rank for record in tensors.values() for rank in record.ranks})
            }
            tag = f"global_step{manifest.step}"
            steps: dict[str, Tensor] = {}
            for name, record in progress.track(tensors.items(), description="writing"):
                runs = [files[rank].get_tensor(name) for rank in record.ranks]
                # A copy: torch.save writes all of the storage that a view is of.
                tensor = torch.cat(runs).reshape(record.shape).clone()
                moment = _MOMENT.fullmatch(name)
                if moment is not None and moment[2] == "step":
                    steps[name] = tensor = tensor.reshape(())
                _save(root / tag / _place(name), tensor if name in steps else {"param": tensor})
            _save_global_state(root / tag, steps, read_state(checkpoint))
            ours = root / tag / _OURS / checkpoint.name
            ours.mkdir(parents=True)
            for name in (MANIFEST, STATE, TENSORS):
                write_bytes(ours / name, (checkpoint / name).read_bytes())
            write_bytes(root / _LATEST, tag.encode())
    typer.echo(f"{dest}: {checkpoint} in DeepSpeed's universal layout, {len(steps)} trained parameters")


def to_llmtrain(source: Path, dest: Path) -> None:
    """Writes what `to_universal` wrote as a checkpoint of ours again, `dest`/step-NNNNNNNN.

    Where `dest` is a run directory, into its checkpoints/.

    Raises:
        InputError: it is none such, or not whole; the checkpoint exists or cannot be written.
    """
    directory = _universal_directory(source)
    ours, manifest = _carried(directory)
    if (dest / RESOLVED).is_file():
        dest = dest / "checkpoints"
    target = dest / ours.name
    _refuse_existing(target)
    with _progress() as progress:
        records = _of_all_ranks(ours)
        tensors: dict[str, Tensor] = {}  # mapped, not read
        for name, record in progress.track(records.items(), description="checking"):
            tensors[name] = _mapped(directory / _place(name), record)
        progress.add_task("writing", total=None)
        with _written_aside(target) as writing:
            layout = {
                name: TensorRecord(dtype=record.dtype, shape=record.shape, starts=[0], ranks=[0]).model_dump()
                for name, record in records.items()
            }
            files = {
                state_file(0): write_tensors(writing / state_file(0), tensors),
                TENSORS: write_bytes(writing / TENSORS, json.dumps(layout).encode()),
                STATE: write_bytes(writing / STATE, (ours / STATE).read_bytes()),
            }
            converted = Manifest(
                format=FORMAT,
                step=manifest.step,
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                metrics=manifest.metrics,
                world_size=1,
                engine=f"converted from DeepSpeed's universal layout, before: {manifest.engine}",
                llmtrain=llmtrain.__version__,
                torch=torch.__version__,
                files=files,
            )
            write_bytes(writing / MANIFEST, converted.model_dump_json(indent=1).encode())
    typer.echo(f"{target}: {len(tensors)} tensors")


# ----------------------------------------------------------------------------------------- to universal


def _newest_whole(source: Path, progress: Progress) -> tuple[Path, Manifest]:
    """The checkpoint that `source` means, every file of it as it was written."""
    checkpoints = found(source, where="SOURCE")
    for checkpoint in checkpoints:
        manifest, problem = read_manifest(checkpoint)
        for name, record in progress.track(manifest.files.items() if manifest else (), description="hashing"):
            problem = problem or problem_with(checkpoint / name, record)
        if manifest is not None:
            problem = problem or layout_problem(checkpoint, manifest)
            if problem is None:
                return checkpoint, manifest
        if len(checkpoints) == 1:
            raise InputError(f"{checkpoint} is broken: {problem}", where="SOURCE", remedy="name another checkpoint")
        typer.echo(f"{checkpoint} is passed over: {problem}", err=True)
    raise InputError(f"no checkpoint in {source} is whole", where="SOURCE", remedy="name another run")


def _of_all_ranks(checkpoint: Path) -> dict[str, TensorRecord]:
    """All but what belongs to one rank alone."""
    return {name: record for name, record in read_tensors(checkpoint).items() if not of_one_rank(name)}


def _place(name: str) -> Path:
    """Where the tensor that a checkpoint of ours calls `name` lies in the universal one."""
    if weight := _WEIGHT.fullmatch(name):
        place = Path("zero", weight[1], "fp32.pt")
    elif moment := _MOMENT.fullmatch(name):
        place = Path("zero", moment[1], f"{moment[2]}.pt")
    else:
        place = Path(_OURS, "tensors", f"{name}.pt")
    if ".." in place.parts or place.is_absolute():
        raise InputError(f"{name!r} is no name of a tensor", where="SOURCE")
    return place


def _save_global_state(directory: Path, steps: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """What DeepSpeed reads beside the parameters."""
    counts = {float(step) for step in steps.values()}
    if len(counts) != 1:
        raise InputError(
            f"ZeRO counts AdamW's steps once for many parameters, and the checkpoint has {sorted(counts)}",
            where="SOURCE",
        )
    # A learning rate and the like would be laid over those of DeepSpeed's own configuration, in stage 3 those of
    # one group over all: none is given. Groups without an entry would not be loaded, so there are enough.
    optimizer = {
        "ds_version": _DEEPSPEED,
        "param_groups": [{} for _ in steps],
        "optimizer_state_dict": {"state": {0: {"step": next(iter(steps.values()))}}, "param_groups": [{}]},
    }
    _save(directory / "zero" / "optimizer_state.pt", optimizer)
    model = {
        "module": None,
        "ds_version": _DEEPSPEED,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": state["progress"]["step"],
        "skipped_steps": state["progress"]["skipped"],
    }
    for prefix in ("", "zero_pp_rank_0_"):  # stages 1 and 2; stage 3
        _save(directory / f"{prefix}mp_rank_00_model_states.pt", model)


def _save(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


# ----------------------------------------------------------------------------------------- from universal


def _universal_directory(source: Path) -> Path:
    """The directory that holds zero/: `source`, or the one that it names as its latest."""
    latest = source / _LATEST
    if os.path.isfile(latest):
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if Path(tag).name != tag:
            raise InputError(f"{latest} names {tag!r}, which is no directory beside it", where="SOURCE")
        source = source / tag
    if not os.path.isdir(source / "zero"):
        raise InputError(
            f"{source} holds no universal checkpoint: there is no zero/ in it",
            where="SOURCE",
            remedy=f"name the directory that holds {_LATEST}",
        )
    return source


def _carried(directory: Path) -> tuple[Path, Manifest]:
    """What `to_universal` left there of our own checkpoint."""
    checkpoints = checkpoints_in(directory / _OURS)
    if not checkpoints:
        raise InputError(
            f"{directory} was not written by llmtrain: it does not say which data, in which order, it was trained on, "
            "so no run can go on from it; only its weights can be taken",
            where="SOURCE",
            remedy="bring the weights into the Hugging Face layout and start a run from them with model.path",
        )
    ours = checkpoints[0]
    manifest, problem = read_manifest(ours)
    if manifest is not None:
        # the tensors lie elsewhere, and what they must be says the record of each
        problem = problem_with(ours / STATE, manifest.files[STATE])
        problem = problem or problem_with(ours / TENSORS, manifest.files[TENSORS]) or layout_problem(ours, manifest)
        if problem is None:
            return ours, manifest
    raise InputError(f"{ours} is broken: {problem}", where="SOURCE", remedy="convert the checkpoint again")


def _mapped(path: Path, record: TensorRecord) -> Tensor:
    """A tensor of a .pt file, flattened, in memory that is read when it is used."""
    content = _loaded(path)
    if isinstance(content, dict):
        content = content.get("param")
    if not isinstance(content, Tensor):
        raise InputError(f"{path} holds no tensor", where="SOURCE")
    if DTYPE_NAMES.get(content.dtype) != record.dtype or content.numel() != prod(record.shape):
        raise InputError(
            f"{path} holds {content.dtype} of shape {list(content.shape)}, "
            f"and not {record.dtype} of shape {record.shape} as when it left llmtrain",
            where="SOURCE",
        )
    return content.reshape(-1)


def _loaded(path: Path) -> object:
    """The content of a .pt file. Nothing in it is run, and a byte that flipped is found by torch's checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        problem = f"{damaged} in it does not match its checksum"
    except FileNotFoundError:
        problem = "it is missing"
    except (zipfile.BadZipFile, NotImplementedError) as error:  # the latter: compressed in a way of its own
        problem = f"it is no file of torch.save: {error}"
    except pickle.UnpicklingError:
        problem = "it holds more than tensors and plain values, and reading that would run code"
    except (OSError, RuntimeError, EOFError) as error:
        problem = f"it cannot be read: {error}"
    raise InputError(f"{path}: {problem}", where="SOURCE", remedy="convert the checkpoint again")


# ----------------------------------------------------------------------------------------------- writing


def _progress() -> Progress:
    return Progress(console=Console(stderr=True), transient=True)


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise InputError(f"{target} exists", where="DEST", remedy="name a new directory, or remove it first")


@contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """A directory that becomes `target` if nothing was raised."""
    aside = target.with_name(f".writing-{target.name}")
    try:
        if aside.is_dir():  # left by a process that was killed
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
        yield aside
        for path in [aside, *aside.rglob("*")]:
            if path.is_dir():
                fsync_path(path)
        aside.rename(target)
        fsync_path(target.parent)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error}", where="DEST") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
