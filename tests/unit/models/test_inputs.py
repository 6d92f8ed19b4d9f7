"""Where virtual tokens go, and how large the noise on embeddings is."""

import pytest
import torch
from torch import Tensor

from llmtrain.models.inputs import neftune_noise, prompt_layout
from tests import tiny


def positions(*rows: list[int]) -> Tensor:
    """Documents of these lengths in each row."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def test_virtual_tokens_stand_before_every_document() -> None:
    begins = torch.tensor([[True, False, True, False, False], [True, False, False, False, False]])
    layout = prompt_layout(begins, 2)
    # 5 and 6 are the virtual tokens
    assert layout.sources.tolist()[0] == [5, 6, 0, 1, 5, 6, 2, 3, 4]
    assert layout.sources.tolist()[1][:7] == [5, 6, 0, 1, 2, 3, 4]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0, 1]]
    assert layout.places.tolist() == [[2, 3, 6, 7, 8], [2, 3, 4, 5, 6]]


def test_the_layout_of_many_rows_holds() -> None:
    generator = torch.Generator().manual_seed(0)
    for num in (1, 3, 7):
        begins = torch.rand(6, 20, generator=generator) < 0.3
        begins[:, 0] = True
        layout = prompt_layout(begins, num)
        assert torch.equal(layout.sources.gather(1, layout.places), torch.arange(20).expand(6, -1))
        for row in range(6):
            for place, begin in zip(layout.places[row].tolist(), begins[row].tolist(), strict=True):
                if begin:
                    block = slice(place - num, place)
                    assert layout.sources[row, block].tolist() == list(range(20, 20 + num))
                    assert layout.positions[row, block].tolist() == list(range(num))


@pytest.mark.parametrize("rows", [([8],), ([2, 6], [5, 3])])
def test_noise_is_as_large_as_a_document_is_short(rows: tuple[list[int], ...]) -> None:
    """Uniform in +- alpha / sqrt(L * D)."""
    width, alpha = 4096, 5.0
    place = positions(*rows)
    torch.manual_seed(0)
    noise = neftune_noise(torch.zeros(*place.shape, width), place, alpha)
    for row, lengths in enumerate(rows):
        for document, length in zip(noise[row].split(lengths), lengths, strict=True):
            bound = alpha / (length * width) ** 0.5
            assert document.abs().max() <= bound
            assert document.abs().max() >= 0.99 * bound
            assert document.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_noise_is_for_training_only_and_follows_the_generator() -> None:
    decoder = tiny.decoder()
    ids, place = torch.arange(3, 15)[None], positions([5, 7])

    def hidden() -> Tensor:
        states: Tensor = decoder(ids, place, lambda states, head: states)
        return states

    plain = hidden()
    decoder.neftune_alpha = 5.0
    assert torch.equal(decoder.eval()(ids, place, lambda states, head: states), plain)
    decoder.train()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = hidden(), hidden()
    assert not torch.allclose(first, plain, atol=1e-3)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(hidden(), first)
    decoder.neftune_alpha = 1e-12
    torch.testing.assert_close(hidden(), plain)  # through the embeddings, the same model
