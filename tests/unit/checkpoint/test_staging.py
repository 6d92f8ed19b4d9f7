import torch

from llmtrain.checkpoint.staging import HostCopies


def test_copies_are_apart_from_what_was_copied_and_kept_for_the_next_time() -> None:
    copies = HostCopies()
    tensors = {
        "a": torch.arange(6.0),
        "b": torch.arange(4).bfloat16(),
        "empty": torch.zeros(0),
        "view": torch.ones(9)[2:5],
    }
    first = copies.stage({"runs": tensors})["runs"]
    assert all(torch.equal(first[name], tensor) for name, tensor in tensors.items())
    tensors["a"].zero_()
    assert first["a"].sum() == 15
    again = copies.stage({"runs": tensors})["runs"]
    assert again["a"].data_ptr() == first["a"].data_ptr() and not again["a"].any()


def test_only_the_part_of_a_memory_that_is_seen_is_copied() -> None:
    """DCP's own stager copies the whole of it, which for a replica's share of a tensor would be all of it."""
    copy = HostCopies().stage({"runs": {"share": torch.ones(1000)[10:20]}})["runs"]["share"]
    assert copy.untyped_storage().nbytes() == 40


def test_another_shape_or_dtype_under_the_same_name_is_copied_too() -> None:
    """As the state of Python's generator, whose pending number is there or not."""
    copies = HostCopies()
    for tensor in (torch.zeros(0), torch.ones(1), torch.ones(1, dtype=torch.float64), torch.zeros(3)):
        staged = copies.stage({"runs": {"x": tensor}})["runs"]["x"]
        assert torch.equal(staged, tensor) and staged.dtype == tensor.dtype
