"""Python source files, and the docstrings in them, as documents."""

import ast
import logging
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from llmtrain.data.files import why_missing
from llmtrain.errors import InputError
from llmtrain.recipe.schema import PythonSource

log = logging.getLogger(__name__)

STDLIB = "stdlib"
# Not the library's own text: packages that happen to be installed, and tests, which hold long
# tables and files that are broken on purpose.
NOT_STDLIB_TEXT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


def files(source: PythonSource) -> list[Path]:
    """The .py files below the directory in sorted order, without hidden directories.

    Raises:
        InputError: no such directory, or no .py file in it.
    """
    root = Path(sysconfig.get_path("stdlib")) if source.path == STDLIB else Path(os.path.expanduser(source.path))
    if not os.path.isdir(root):
        remedy = f"name a directory of Python files, or {STDLIB}"
        raise InputError(why_missing(root, "directory"), where=source.path, remedy=remedy)
    left_out = NOT_STDLIB_TEXT if source.path == STDLIB else frozenset()
    found = []
    for directory, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".") and name not in left_out]
        found += [Path(directory, name) for name in names if name.endswith(".py")]
    found = sorted(path for path in found if path.is_file())
    if not found:
        raise InputError("holds no .py file", where=str(root), remedy="name a directory of Python files")
    return found


def read(source: PythonSource) -> Iterator[str]:
    """Whole modules, one document a docstring, or each module followed by its docstrings."""
    paths = files(source)
    num_undecodable = num_unparsable = 0
    for path in paths:
        text = _decoded(path)
        if text is None:
            num_undecodable += 1
            continue
        if source.content != "docstrings":
            yield text
        if source.content != "source":
            found = _docstrings(text)
            num_unparsable += found is None
            yield from found or []
    if num_undecodable or num_unparsable:
        text = "%s: of %d Python files, %d do not decode and %d do not parse; they were skipped"
        log.info(text, source.path, len(paths), num_undecodable, num_unparsable)


def _decoded(path: Path) -> str | None:
    """The text by the file's own encoding declaration (PEP 263), or None where that fails."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        text.encode("utf-8")  # other codecs can decode to lone surrogates
    except (SyntaxError, UnicodeError):  # an unknown encoding is a SyntaxError
        log.debug("%s does not decode", path)
        return None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    return text


def _docstrings(text: str) -> list[str] | None:
    """Docstrings of the module, its classes and functions, or None where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in files that are not the user's to mend
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):  # ValueError: NUL characters
        return None
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return [text for text in found if text is not None and _is_unicode(text)]


def _is_unicode(text: str) -> bool:
    """False with a lone surrogate, which a docstring can hold as an escape."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
