"""What transformers refuses, told as mistakes of the recipe."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from llmtrain.errors import InputError

LOADABLE = "name a directory with config.json and *.safetensors, a .gguf file, or, with a network, a hub model"
# What it raises for a config or for files that are wrong; it looks at few of the values that it takes.
TRANSFORMERS_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    ZeroDivisionError,
    struct.error,
    TypeError,
    AttributeError,
    RecursionError,
    AssertionError,  # of torch's modules, for sizes
    StrictDataclassError,
    SafetensorError,
)


@contextmanager
def as_input_error(where: str, remedy: str | None = None) -> Iterator[None]:
    """What transformers raises for things that are wrong or not there, as an error of the recipe."""
    try:
        yield
    except TRANSFORMERS_ERRORS as error:
        lines = [line.strip() for line in str(error).strip().strip("'\"").splitlines() if line.strip()]
        # All that a KeyError says is the key: of a table of transformers, or of a file.
        message = f"transformers knows or finds no {error}" if isinstance(error, KeyError) else " ".join(lines[:3])
        raise InputError(message, where=where, remedy=remedy) from error
