"""The recipes and launch scripts that come with the package."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_IN_WHEEL = _PACKAGE / "_shipped"  # where the wheel puts them; a checkout has them at its top


def recipes_directory() -> Path:
    return _directory("recipes")


def launch_directory() -> Path:
    return _directory("launch")


def recipe_names() -> list[str]:
    """Names that `load_recipe` takes, such as quickstart or pretrain/llama-1b; those at the top first."""
    return [name for name in _names() if not _is_comparison(name)]


def comparison_names() -> list[str]:
    """Names that `load_comparison` takes, such as diffusion/compare."""
    return [name for name in _names() if _is_comparison(name)]


def find_recipe(name: str) -> Path | None:
    """The file of a shipped recipe or comparison, or None; only names from the lists above are found."""
    return _file(name) if name in _names() else None


def _names() -> list[str]:
    root = recipes_directory()
    names = [path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml")]
    return sorted(names, key=lambda name: (name.count("/"), name))


def _file(name: str) -> Path:
    return recipes_directory() / f"{name}.yaml"


def _is_comparison(name: str) -> bool:
    return "\nvariants:" in _file(name).read_text(encoding="utf-8")


def _directory(name: str) -> Path:
    in_wheel = _IN_WHEEL / name
    return in_wheel if in_wheel.is_dir() else _PACKAGE.parent / name
