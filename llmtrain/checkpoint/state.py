"""What a checkpoint of a run holds, beside how it is stored.

Each engine's shards under `<model name>/`; each rank's own: its generators. JSON: the counters, the
algorithm's state and the recipe. The data order needs nothing: it is a pure function of (seed, step).
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from pydantic import ValidationError

from llmtrain.checkpoint.generators import capture_generators, restore_generators, seed_generators
from llmtrain.checkpoint.manifest import read_state
from llmtrain.checkpoint.store import CheckpointStore, Contents
from llmtrain.contracts import Algorithm, Engine, Shard
from llmtrain.distributed import World
from llmtrain.errors import InputError
from llmtrain.progress import Progress
from llmtrain.recipe.resolved import identity, identity_differences
from llmtrain.recipe.schema import Recipe


def save_state(
    store: CheckpointStore,
    progress: Progress,
    engines: Mapping[str, Engine],
    algorithm: Algorithm,
    metrics: Mapping[str, float],
    recipe: Recipe,
    *,
    required: bool = False,
) -> None:
    """Saves a checkpoint of this step; all ranks call it. `metrics` are the newest held-out figures."""
    contents = Contents(
        rank_tensors=capture_generators(),
        state={"progress": asdict(progress), "algorithm": algorithm.state_dict(), "recipe": recipe.model_dump()},
        metrics=metrics,
        engine=", ".join(dict.fromkeys(engine.describe() for engine in engines.values())),
    )
    store.save(progress.step, _shards(engines), contents, required=required)


def restore_state(
    store: CheckpointStore,
    path: Path,
    engines: Mapping[str, Engine],
    algorithm: Algorithm,
    recipe: Recipe,
    world: World,
) -> Progress:
    """Goes back to a checkpoint, of any number of ranks and any backend; all ranks call it.

    Raises:
        InputError: it is of another run, or its state is not that of these engines.
    """
    _check_same_run(path, recipe)
    restored = store.restore(path, _shards(engines))
    for engine in engines.values():
        engine.state_loaded()
    algorithm.load_state_dict(restored.state["algorithm"])
    progress = Progress(**restored.state["progress"])
    if restored.rank_tensors is not None:
        restore_generators(restored.rank_tensors)
    else:
        # With another number of ranks nobody's generators fit; new ones, the same at every try.
        seed_generators(recipe.seed + progress.step, world.rank)
    return progress


def _check_same_run(path: Path, recipe: Recipe) -> None:
    """Raises InputError where the checkpoint was put into a run that it does not belong to."""
    try:
        saved = Recipe.model_validate(read_state(path)["recipe"])
    except (KeyError, ValidationError):
        raise InputError(
            "the checkpoint holds no recipe that this version can read, so it may be of another run",
            where=str(path),
            remedy="go on with the version that saved it, or begin again under another name=...",
        ) from None
    differences = identity_differences(identity(saved), identity(recipe))
    if differences:
        shown = "; ".join(f"{key} was {was!r}, is {now!r}" for key, was, now in differences[:3])
        raise InputError(
            f"the checkpoint is of another run: {shown}",
            where=str(path),
            remedy="move it back to where it came from; a checkpoint is continued by the run that saved it",
        )


def _shards(engines: Mapping[str, Engine]) -> dict[str, Shard]:
    return {f"{name}/{key}": shard for name, engine in engines.items() for key, shard in engine.state().items()}
