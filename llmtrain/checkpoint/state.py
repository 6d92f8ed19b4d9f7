"""What a checkpoint of a run holds, beside how it is stored.

Each engine's shards under `<model name>/`; each rank's own: its generators. JSON: the counters and
the algorithm's state. The data order needs nothing: it is a pure function of (seed, step).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from llmtrain.checkpoint.generators import capture_generators, restore_generators, seed_generators
from llmtrain.checkpoint.store import CheckpointStore, Contents
from llmtrain.contracts import Algorithm, Engine, Shard
from llmtrain.distributed import World


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done, skipped ones included.
        tokens: tokens of text trained on, over all ranks.
        skipped: steps whose gradient was not finite.
        skipped_in_a_row: of these, the ones since the last applied step.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


def save_state(
    store: CheckpointStore,
    progress: Progress,
    engines: Mapping[str, Engine],
    algorithm: Algorithm,
    metrics: Mapping[str, float],
    *,
    required: bool = False,
) -> None:
    """Saves a checkpoint of this step; all ranks call it. `metrics` are the newest held-out figures."""
    contents = Contents(
        rank_tensors=capture_generators(),
        state={"progress": asdict(progress), "algorithm": algorithm.state_dict()},
        metrics=metrics,
        engine=", ".join(dict.fromkeys(engine.describe() for engine in engines.values())),
    )
    store.save(progress.step, _shards(engines), contents, required=required)


def restore_state(
    store: CheckpointStore,
    path: Path,
    engines: Mapping[str, Engine],
    algorithm: Algorithm,
    seed: int,
    world: World,
) -> Progress:
    """Goes back to a checkpoint, of any number of ranks and any backend; all ranks call it."""
    restored = store.restore(path, _shards(engines))
    for engine in engines.values():
        engine.state_loaded()
    algorithm.load_state_dict(restored.state["algorithm"])
    progress = Progress(**restored.state["progress"])
    if restored.rank_tensors is not None:
        restore_generators(restored.rank_tensors)
    else:
        # With another number of ranks nobody's generators fit; new ones, the same at every try.
        seed_generators(seed + progress.step, world.rank)
    return progress


def _shards(engines: Mapping[str, Engine]) -> dict[str, Shard]:
    return {f"{name}/{key}": shard for name, engine in engines.items() for key, shard in engine.state().items()}
