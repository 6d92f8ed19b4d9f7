"""Pictures of lines."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from llmtrain.errors import InputError
from llmtrain.pictures import FORMATS, Line, check_picture, draw_lines

LINES = [Line("greedy", [10.0], [0.4], [None]), Line("vote", [11.0, 44.0, 170.0], [0.3, 0.5, 0.6], [0.1, 0.1, 0.05])]
STARTS = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}


@pytest.mark.parametrize("suffix", FORMATS)
def test_formats(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"curve{suffix.upper()}"
    check_picture(file, "--picture")
    draw_lines(file, LINES, title="a title", x="tokens", y="accuracy")
    assert file.read_bytes().startswith(STARTS[suffix])


def test_an_svg_has_its_words_as_text_and_no_day(tmp_path: Path) -> None:
    file, title = tmp_path / "curve.svg", r"a title of $\frac$ and x"  # no formula
    draw_lines(file, LINES, title=title, x="tokens", y="accuracy")
    words = {element.text for element in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")}
    assert {title, "tokens", "accuracy", "greedy", "vote"} <= words
    again = tmp_path / "again.svg"
    draw_lines(again, LINES, title=title, x="tokens", y="accuracy")
    assert file.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("name", ["curve.jpeg", "curve"])
def test_other_formats_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"no picture that can be drawn.*\n.*\.svg, \.png or \.pdf"):
        check_picture(Path(name), "--picture")
