"""Whether a model is still the one that it was: by the content of the files that its weights are read from."""

import itertools
from pathlib import Path

from llmtrain.data.fingerprint import content_hashes
from llmtrain.data.hashing import hash_settings
from llmtrain.models.weights import ADAPTER_CONFIG, cached
from llmtrain.recipe.schema import ModelFromGGUF, ModelFromPretrained, Recipe


def weights_identity(recipe: Recipe, cache_dir: Path) -> str:
    """Hash of what the recipe's model, with the adapters below its own, begins with; the same wherever that lies.

    Files are read once for each cache directory, which remembers the hashes of those that did not change.
    """
    files = _files(recipe)
    memo = cache_dir / "fingerprints" / hash_settings(["weights", *map(str, files)])
    return hash_settings([[file.name, found] for file, found in zip(files, content_hashes(files, memo), strict=True)])


def _files(recipe: Recipe) -> list[Path]:
    """None of a model whose weights are drawn by the recipe's seed."""
    model, files = recipe.model, list[Path]()
    match model:
        case ModelFromGGUF():
            files.append(Path(model.file).expanduser())
        case ModelFromPretrained():
            config = cached(str(Path(model.path).expanduser()), "config.json", model.revision)
            if config is not None:  # or it could not have been opened
                weights = (config.parent.glob(pattern) for pattern in ("*.safetensors", "pytorch_model*.bin"))
                files += [config, *sorted(itertools.chain(*weights))]  # of the directory alone, as they are loaded
    for base in [] if recipe.adapter is None else recipe.adapter.base:
        directory = Path(base).expanduser()
        files += [directory / ADAPTER_CONFIG, *sorted(directory.rglob("*.safetensors"))]
    return files
