"""What a checkpoint of a run holds, beside how it is stored.

Shared tensors: each engine's flat state under `<model name>/`. Each rank's own: its generators.
JSON: the counters and the algorithm's state. The data order needs nothing: it is a pure function
of (seed, step).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from llmtrain.checkpoint.generators import capture_generators, restore_generators, seed_generators
from llmtrain.checkpoint.store import CheckpointStore, Loaded
from llmtrain.contracts import Algorithm, Engine
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


def save_state(store: CheckpointStore, progress: Progress, engines: Mapping[str, Engine], algorithm: Algorithm) -> None:
    """Saves a checkpoint of this step; all ranks call it."""
    tensors = {
        f"{name}/{key}": tensor for name, engine in engines.items() for key, tensor in engine.state_tensors().items()
    }
    state = {"progress": asdict(progress), "algorithm": algorithm.state_dict()}
    store.save(progress.step, tensors, capture_generators(), state)


def restore_state(
    loaded: Loaded, engines: Mapping[str, Engine], algorithm: Algorithm, seed: int, world: World
) -> Progress:
    """Goes back to a checkpoint; all ranks call it."""
    for name, engine in engines.items():
        prefix = f"{name}/"
        engine.load_state_tensors(
            {key.removeprefix(prefix): loaded.tensors[key] for key in loaded.tensors if key.startswith(prefix)}
        )
    algorithm.load_state_dict(loaded.state["algorithm"])
    progress = Progress(**loaded.state["progress"])
    if loaded.rank_tensors is not None and loaded.world_size == world.size:
        restore_generators(loaded.rank_tensors)
    else:
        # With another number of ranks nobody's generators fit; new ones, the same at every try.
        seed_generators(seed + progress.step, world.rank)
    return progress
