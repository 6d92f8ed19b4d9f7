"""What is counted in a model, and what it says about itself."""

import pytest
import torch

from llmtrain.errors import InputError
from llmtrain.models.decoder import Decoder
from tests import tiny

V, D, F, KV = tiny.VOCABULARY, 32, 64, 16  # KV: two of four heads have keys and values
LAYER = D * D + 2 * D * KV + D * D + 3 * D * F + 2 * D  # q, k and v, o, the three of the MLP, two norms
BODY = 2 * LAYER + D  # and the last norm


@pytest.mark.parametrize(("tied", "num_tables"), [(False, 2), (True, 1)])
def test_parameters(tied: bool, num_tables: int) -> None:
    decoder = tiny.decoder(tie_word_embeddings=tied)
    assert decoder.num_parameters() == BODY + num_tables * V * D


@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_multiplies_where_it_is_the_head(tied: bool) -> None:
    """Looking up is no product; the head is one, whether it has weights of its own or not."""
    assert tiny.decoder(tie_word_embeddings=tied).num_matmul_parameters() == BODY + V * D


def test_layers() -> None:
    decoder = tiny.decoder(num_hidden_layers=3)
    assert decoder.num_layers() == 3
    assert decoder.layers() == list(decoder.hf.model.layers)


def test_a_model_that_does_not_tell_its_layers() -> None:
    xlnet = tiny.decoder("xlnet", d_model=32, n_layer=2, n_head=4, d_inner=64)
    with pytest.raises(InputError, match="layers of XLNetLMHeadModel"):
        xlnet.layers()


@pytest.mark.parametrize(
    ("architecture", "fields", "width", "window"),
    [
        ("llama", {"max_position_embeddings": 48}, 32, 48),
        ("qwen3", {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                   "num_hidden_layers": 1, "max_position_embeddings": 48}, 64, 48),
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 48}, 32, 48),
        ("mamba2", {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 8, "num_hidden_layers": 1}, 0, 7),
    ],
)  # fmt: skip
def test_attention_width_and_window(architecture: str, fields: dict, width: int, window: int) -> None:
    """Whatever an architecture calls its heads and positions; without any, 0 and the default."""
    decoder = tiny.decoder(architecture, **fields)
    assert decoder.attention_width() == width
    assert decoder.max_length(default=7) == window


def test_the_head_function_gets_hidden_states_and_the_head() -> None:
    decoder = tiny.decoder().eval()
    ids = torch.arange(10).reshape(2, 5)
    hidden, head = decoder(ids, None, lambda hidden, head: (hidden, head))
    assert hidden.shape == (2, 5, D)
    assert head is decoder.hf.lm_head
    torch.testing.assert_close(head(hidden), decoder.hf(input_ids=ids).logits)


def test_the_cache_is_off() -> None:
    """With one, transformers would not look at restarted positions."""
    hf = tiny.decoder().hf
    hf.config.use_cache = True
    assert Decoder(hf).hf.config.use_cache is False
