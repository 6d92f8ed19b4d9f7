"""Duplicates are found within a batch and across batches, whatever the batches."""

from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.duplicates import Duplicates


@given(st.lists(st.text("ab", max_size=4), max_size=200), st.integers(1, 50))
def test_the_first_of_its_kind_is_new(contents: list[str], size: int) -> None:
    duplicates = Duplicates()
    found: list[bool] = []
    for first in range(0, len(contents), size):
        found += duplicates.are_new(contents[first : first + size]).tolist()
    assert found == [content not in contents[:place] for place, content in enumerate(contents)]


def test_runs_stay_few() -> None:
    duplicates = Duplicates()
    for first in range(0, 20_000, 10):
        assert duplicates.are_new([str(number) for number in range(first, first + 10)]).all()
    assert len(duplicates._runs) < 16
    assert sum(len(run) for run in duplicates._runs) == 20_000
    assert not duplicates.are_new([str(number) for number in range(20_000)]).any()
