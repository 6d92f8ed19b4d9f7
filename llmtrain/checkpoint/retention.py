"""Which checkpoints stay."""

import logging
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from llmtrain.checkpoint.manifest import checkpoints_in, read_manifest
from llmtrain.recipe.schema import Best, Checkpoint

log = logging.getLogger(__name__)


def remove_old(directory: Path, spec: Checkpoint, broken: Collection[Path]) -> None:
    """Removes the checkpoints that `spec` does not keep.

    One that was found broken does not count, or it would push out the whole one that the run came
    from; it goes when everything newer is whole.
    """
    found = checkpoints_in(directory)
    whole = {path: manifest for path in found if (manifest := read_manifest(path)[0]) is not None}
    trusted = [path for path in whole if path not in broken]
    newest = trusted[: spec.keep]
    if not newest:
        return
    kept = set(newest)
    if spec.keep_every is not None:
        kept |= {path for path in trusted if whole[path].step % spec.keep_every == 0}
    if spec.keep_best is not None:
        best = best_of({path: whole[path].metrics for path in trusted}, spec.keep_best)
        kept |= {best} if best is not None else set()
    for path in found[found.index(newest[-1]) + 1 :]:
        if path in kept:
            continue
        try:
            remove(path)
        except OSError as error:
            log.warning("old checkpoint %s could not be removed: %s", path, error)


def best_of(metrics: Mapping[Path, Mapping[str, float]], best: Best) -> Path | None:
    """The checkpoint with the best figure, the first of equals; None where none has it."""
    having = {path: found[best.metric] for path, found in metrics.items() if best.metric in found}
    if not having:
        return None
    sign = 1 if best.better == "min" else -1
    return min(having, key=lambda path: sign * having[path])


def remove(path: Path) -> None:
    removing = path.with_name(f".removing-{path.name}")
    path.rename(removing)  # so that a half-removed one is never taken for a checkpoint
    shutil.rmtree(removing)
