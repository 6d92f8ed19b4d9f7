"""The layers, and the limits that keep the code readable, by parsing every module's imports."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llmtrain"

# From the lowest up: a module imports from its own layer and from those above it in this table.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "directories", "pictures", "tables"),
    ("recipe", "contracts"),
    ("distributed", "progress"),
    ("models", "data"),
    ("algorithms", "sampling", "evaluation", "search"),
    ("engines",),
    ("checkpoint", "observe", "schedule", "signals", "rundir", "verdict", "ending"),
    ("loop",),
    ("run",),
    ("quickstart", "compare", "launch", "export", "fetch"),
    ("cli", "cli_checkpoint", "cli_data", "cli_loading", "cli_search", "cli_select", "cli_use"),
    ("__main__",),
)
LAYER_OF = {unit: level for level, units in enumerate(LAYERS) for unit in units}

# Libraries that only some places may know: what else would need them asks those places.
CONFINED = {
    "torch.distributed": ("distributed", "engines", "checkpoint"),
    "deepspeed": ("distributed", "engines", "checkpoint"),
    "peft": ("models",),
    "vllm": ("rl.vllm",),
}

FILE_LINES, FUNCTION_LINES, LOOP_LINES = 400, 60, 180

MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """Dotted name below llmtrain; empty for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


def imports(tree: ast.Module, *, top_level_only: bool = False) -> Iterator[str]:
    """Everything imported, dotted; `from a import b` gives a.b."""
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_module(imported: str) -> str | None:
    """The llmtrain module that an import reads; None for other packages, and for the package itself."""
    if not imported.startswith("llmtrain."):
        return None
    name = imported.removeprefix("llmtrain.")
    return name if name in NAMES else name.rpartition(".")[0] or None


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: module_name(path) or "llmtrain")
def test_module_keeps_to_its_layer_and_limits(path: Path) -> None:
    name = module_name(path)
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    unit = name.split(".")[0]
    assert not unit or unit in LAYER_OF, f"{unit} has no place in LAYERS"
    for imported in imports(tree):
        target = own_module(imported)
        if target is not None:
            below = LAYER_OF[target.split(".")[0]] <= LAYER_OF.get(unit, 0)
            assert below, f"llmtrain.{name} imports {imported}, which lies in a higher layer"
        for library, places in CONFINED.items():
            if within(imported, (library,)):
                assert within(name, places), f"llmtrain.{name} imports {imported}; only {', '.join(places)} may"
    assert len(text.splitlines()) <= (LOOP_LINES if name == "loop" else FILE_LINES), "file too long"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_no_import_cycles() -> None:
    graph = {
        module_name(path): {
            target
            for imported in imports(ast.parse(path.read_text(encoding="utf-8")), top_level_only=True)
            if (target := own_module(imported)) is not None
        }
        for path in MODULES
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_the_check_sees_what_it_forbids() -> None:
    tree = ast.parse("import torch.distributed as dist\ndef f():\n    from llmtrain.engines import parts\n")
    assert list(imports(tree)) == ["torch.distributed", "llmtrain.engines.parts"]
    assert list(imports(tree, top_level_only=True)) == ["torch.distributed"]
    assert within("torch.distributed.fsdp.fully_shard", ("torch.distributed",))
    assert not within("torch.distributedly", ("torch.distributed",))
    assert not within("rl.vllm_server", ("rl.vllm",))
