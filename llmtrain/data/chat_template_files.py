"""Chat templates: those that come with llmtrain, a file's, and the marks of what an assistant says.

A template with `{% generation %}` ... `{% endgeneration %}` around what the assistant writes says itself
which text is trained. Those here do, and end each turn inside the marks.
"""

import os
import re
from pathlib import Path

from llmtrain.data.files import read_text
from llmtrain.errors import InputError, nearest

_DIRECTORY = Path(__file__).parent / "chat_templates"
NAMES = ("chatml", "llama3", "plain", "qwen3")
CHOICES = f"{', '.join(NAMES)}, or a Jinja file"

_BEGIN, _END = (re.compile(r"\{%(-?)\s*" + word + r"\s*(-?)%\}") for word in ("generation", "endgeneration"))


def named(name: str) -> str:
    """The text of a template that comes with llmtrain."""
    return (_DIRECTORY / f"{name}.jinja").read_text(encoding="utf-8")


def load_template(choice: str) -> str:
    """The text of the template that a recipe asks for by name or as a file.

    Raises:
        InputError: neither a name nor a file, or not UTF-8.
    """
    if choice in NAMES:
        return named(choice)
    path = Path(os.path.expanduser(choice))
    if not os.path.isfile(path):
        message = f"{choice!r} is neither a template's name nor a file{nearest(choice, NAMES)}"
        raise InputError(message, where="data.chat_template", remedy=f"give one of {CHOICES}")
    return read_text(path)


def is_marked(template: str) -> bool:
    """Whether it marks what the assistant says."""
    return _BEGIN.search(template) is not None


def with_signs(template: str) -> str:
    """The same template with {{ begin_sign }} and {{ end_sign }} in place of the marks.

    The tags around them keep the marks' own control of white space.
    """
    begun = _BEGIN.sub(r"{%\1 if true %}{{ begin_sign }}{% if true \2%}", template)
    return _END.sub(r"{%\1 endif %}{{ end_sign }}{% endif \2%}", begun)


def without_marks(template: str) -> str:
    """The same template for programs that do not know the marks: it renders the same text."""
    return _END.sub(r"{%\1 endif \2%}", _BEGIN.sub(r"{%\1 if true \2%}", template))
