"""LLaDA's published layout, on small random models of it: read, trained, written, and computed independently."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmtrain import run
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import InputError
from llmtrain.models.attention import bidirectional
from llmtrain.models.decoder import Decoder
from llmtrain.models.diffusion import Diffusion
from llmtrain.models.hub import open_model
from llmtrain.models.llada import llada_name, llama_name, save_llada
from llmtrain.models.loading import known_diffusion, load_weights, open_config
from llmtrain.models.saved import load_saved
from llmtrain.models.saving import save_pretrained
from llmtrain.observe.metrics import read_metrics
from llmtrain.recipe.loading import load_recipe
from llmtrain.recipe.schema import Recipe
from tests import tiny
from tests.chats import conversations, write_jsonl
from tests.llada import CONFIG, IDS, MASK, MASK_ID, tokenizer, weights_of, write
from tests.runs import TEXT, assert_same, train_here, write_recipe
from tests.saved import CommandLine, assert_refused
from tests.unit.data import chats


def recipe(path: Path, **overrides: Any) -> Recipe:
    sections: dict[str, Any] = {
        "model": {"kind": "pretrained", "path": str(path)},
        "tokenizer": {"kind": "model"},
        "algorithm": {"kind": "masked_diffusion", "mask_token": MASK},
    }
    return tiny.recipe(**sections | overrides)


def for_training() -> Any:
    words = tokenizer()
    words.mask_token = MASK
    return words


def opened(path: Path, **overrides: Any) -> Decoder:
    blueprint = open_model(recipe(path, **overrides), for_training())
    assert blueprint.is_empty, "read by name, a layer at a time"
    blueprint.materialise(blueprint.decoder, torch.device("cpu"))
    return blueprint.decoder.eval()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llada") / "published")


# ----------------------------------------------------------------------------------------- what it computes


def independent_logits(tensors: dict[str, Tensor], ids: Tensor, config: dict[str, Any]) -> Tensor:
    """LLaDA's forward, written down from what the layout is."""

    def weight(name: str) -> Tensor:
        return tensors[f"model.transformer.{name}.weight"]

    def norm(x: Tensor, name: str) -> Tensor:
        return weight(name) * x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()

    def turned(x: Tensor) -> Tensor:  # [T, H, D]: pair (i, i + D/2) by the angle position * theta^(-2i/D)
        half = x.shape[-1] // 2
        frequency = config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(len(x), dtype=torch.float64), frequency).unsqueeze(1)
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
        )

    heads, keys = config["n_heads"], config["n_kv_heads"]
    rows = []
    for row in ids:
        x = weight("wte")[row]
        for block in range(config["n_layers"]):
            name = f"blocks.{block}."
            states = norm(x, f"{name}attn_norm")
            q, k, v = (states @ weight(f"{name}{kind}_proj").T for kind in "qkv")
            q, k, v = (m.view(len(row), num, -1) for m, num in ((q, heads), (k, keys), (v, keys)))
            k, v = (m.repeat_interleave(heads // keys, dim=1) for m in (turned(k), v))
            scores = torch.einsum("qhd,khd->hqk", turned(q), k) / q.shape[-1] ** 0.5
            mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(len(row), -1)
            x = x + mixed @ weight(f"{name}attn_out").T
            states = norm(x, f"{name}ff_norm")
            gated = nn.functional.silu(states @ weight(f"{name}ff_proj").T) * (states @ weight(f"{name}up_proj").T)
            x = x + gated @ weight(f"{name}ff_out").T
        rows.append(norm(x, "ln_f") @ weight("wte" if config["weight_tying"] else "ff_out").T)
    return torch.stack(rows)


@torch.no_grad()
def ours(decoder: Decoder) -> Tensor:
    positions = torch.arange(IDS.shape[1]).expand_as(IDS)
    logits: Tensor = decoder(IDS, positions, lambda hidden, head: head(hidden), bidirectional)
    return logits


@pytest.mark.parametrize("tied", [False, True])
def test_it_computes_what_the_layout_says(tied: bool, tmp_path: Path) -> None:
    path = write(tmp_path, weight_tying=tied)
    config = CONFIG | {"weight_tying": tied}
    tensors = {name: tensor.double() for name, tensor in weights_of(config).items()}
    expected = independent_logits(tensors, IDS, config).float()
    torch.testing.assert_close(ours(opened(path)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(Decoder(load_weights(str(path), "MODEL"))), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------- reading it


@pytest.mark.parametrize("name", weights_of(CONFIG))
def test_names_there_and_back(name: str) -> None:
    assert llama_name(name) != name
    assert llada_name(llama_name(name)) == name


def test_its_configuration(published: Path) -> None:
    config: Any = open_config(str(published), "MODEL")
    assert (config.model_type, config.vocab_size, config.hidden_size, config.intermediate_size) == ("llama", 96, 32, 48)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (2, 4, 2)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.tie_word_embeddings) == (64, 1e-5, False)
    assert config.rope_parameters["rope_theta"] == 500000.0
    assert (config.eos_token_id, config.pad_token_id) == (1, 1)
    assert config.dtype == torch.float32, "of its files, since it does not say"


def test_it_is_a_masked_diffusion_model(published: Path, tmp_path: Path) -> None:
    assert known_diffusion(str(published), "MODEL") == Diffusion("masked", MASK_ID, shift=False)
    tiny.decoder().hf.save_pretrained(tmp_path)
    assert known_diffusion(str(tmp_path), "MODEL") is None


def test_its_tokenizer_is_loaded_without_a_warning(published: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert load_tokenizer(str(published)).convert_tokens_to_ids(MASK) == MASK_ID
    assert capfd.readouterr().err == ""


def test_dtypes(tmp_path: Path) -> None:
    path = write(tmp_path, torch.bfloat16)
    assert load_weights(str(path), "MODEL", dtype="auto").dtype == torch.bfloat16
    assert opened(path).hf.dtype == torch.float32  # of the precision
    assert next(opened(path, precision="bf16").hf.parameters()).dtype == torch.bfloat16


def test_another_mask_token_is_refused(published: Path) -> None:
    words = for_training()
    words.add_tokens(["<|mask|>"], special_tokens=True)
    words.mask_token = "<|mask|>"
    with pytest.raises(InputError, match=r"its mask token is '<\|mdm_mask\|>', not '<\|mask\|>'") as caught:
        open_model(recipe(published, algorithm={"kind": "masked_diffusion"}), words, 1)
    assert caught.value.where == "algorithm.mask_token"


VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "alibi": ({"alibi": True}, "alibi is True in its config.json"),
    "biases": ({"include_bias": True}, "include_bias is True"),
    "biases of queries": ({"include_qkv_bias": True}, "include_qkv_bias is True"),
    "another block": ({"block_type": "sequential"}, "block_type is 'sequential'.*published one is read: 'llama'"),
    "no kind of block": ({"block_type": None}, "block_type is None"),
    "norms of queries": ({"attention_layer_norm": True}, "attention_layer_norm is True"),
    "scaled logits": ({"scale_logits": True}, "scale_logits is True"),
    "another activation": ({"activation_type": "swiglu"}, "activation_type is 'swiglu'"),
    "other norms": ({"layer_norm_type": "gemma_rms"}, "layer_norm_type is 'gemma_rms'"),
    "grouped blocks": ({"block_group_size": 2}, "block_group_size is 2"),
    "dropout": ({"residual_dropout": 0.1}, "residual_dropout is 0.1(.|\n)*set it to 0.0"),
    "no layers": ({"n_layers": 0}, "n_layers is 0 in its config.json, and no size"),
    "no width": ({"d_model": None}, "d_model is None"),
    "heads that do not fit": ({"n_heads": 5}, "n|heads"),
    "no mask": ({"mask_token_id": None}, "mask_token_id is None(.|\n)*126336"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_that_are_no_llama(variant: str, tmp_path: Path) -> None:
    fields, message = VARIANTS[variant]
    path = write(tmp_path, **fields)
    with pytest.raises(InputError, match=message) as caught:
        open_model(recipe(path), for_training())
    assert caught.value.where == "model.path"


def test_a_key_that_is_not_there_means_what_it_means_there(tmp_path: Path) -> None:
    path = write(tmp_path)
    config = {key: value for key, value in CONFIG.items() if key != "rope"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="rope is not given, which means False"):
        open_model(recipe(path), for_training())


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path)
    gone = "model.transformer.blocks.1.ff_norm.weight"
    index = json.loads((path / "model.safetensors.index.json").read_text())
    file = path / index["weight_map"].pop(gone)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({name: tensor for name, tensor in load_file(file).items() if name != gone}, file, {"format": "pt"})
    with pytest.raises(
        InputError, match=r"1 of the model's weights are not there.*layers\.1\.post_attention_layernorm"
    ):
        open_model(recipe(path), for_training())


# ------------------------------------------------------------------------------------------- writing it


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_bit_for_bit(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Published, opened, written as a Llama, opened, written in the layout: the same bytes, the same configuration."""
    path = write(tmp_path / "published", dtype, weight_tying=tied)
    model = load_weights(str(path), "MODEL", dtype="auto")
    save_pretrained(model, model.state_dict().items(), tokenizer(), tmp_path / "llama")
    again = load_weights(str(tmp_path / "llama"), "MODEL", dtype="auto")
    (tmp_path / "written").mkdir()
    save_llada(again, Diffusion("masked", MASK_ID, False), tokenizer(), tmp_path / "written", shard_bytes=10**4)
    assert len(list((tmp_path / "written").glob("model-*.safetensors"))) > 1
    written = {
        name: tensor
        for file in (tmp_path / "written").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    expected = weights_of(CONFIG | {"weight_tying": tied}, dtype)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == dtype
        assert torch.equal(written[name], tensor), name
    config = json.loads((tmp_path / "written" / "config.json").read_text())
    wanted = CONFIG | {"weight_tying": tied, "pad_token_id": 2, "torch_dtype": str(dtype).removeprefix("torch.")}
    for key in ("auto_map", "precision", "transformers_version"):
        wanted.pop(key)
    assert {key: value for key, value in config.items() if key != "auto_map"} == wanted
    assert known_diffusion(str(tmp_path / "written"), "MODEL") == Diffusion("masked", MASK_ID, shift=False)
    torch.testing.assert_close(
        ours(Decoder(load_weights(str(tmp_path / "written"), "MODEL", dtype=torch.float32))),
        ours(Decoder(load_weights(str(path), "MODEL", dtype=torch.float32))),
        rtol=0,
        atol=0,
    )


REFUSED: dict[str, tuple[str, dict[str, Any], Diffusion | None, str]] = {
    "autoregressive": ("llama", {}, None, "it is autoregressive, and LLaDA's layout is of masked diffusion"),
    "block": ("llama", {}, Diffusion("block", 3, False, 4), "it is a block diffusion model"),
    "shift": ("llama", {}, Diffusion("masked", 3, True), "it is a masked diffusion model with shift"),
    "no llama": ("gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2}, Diffusion("masked", 3, False), "it is a gpt2"),
    "biases": ("llama", {"attention_bias": True}, Diffusion("masked", 3, False), "its attention_bias is True"),
    "wide heads": (
        "llama",
        {"head_dim": 16},
        Diffusion("masked", 3, False),
        "its head_dim is 16, and the layout knows 8",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_layout_cannot_hold(kind: str, tmp_path: Path) -> None:
    architecture, fields, diffusion, message = REFUSED[kind]
    model = tiny.decoder(architecture, **fields).hf
    with pytest.raises(InputError, match=message) as caught:
        save_llada(model, diffusion, tokenizer(), tmp_path, shard_bytes=10**9)
    assert caught.value.where == "--layout"
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- through the commands


def trained(directory: Path, base: Path, **overrides: Any) -> Path:
    """A run of two steps from the published directory, on text of the tokenizer's words."""
    path = write_recipe(
        directory,
        steps=2,
        model={"kind": "pretrained", "path": str(base)},
        tokenizer={"kind": "model"},
        algorithm={"kind": "masked_diffusion", "mask_token": MASK},
        evaluation={"every": 2, "max_sequences": 8},
        checkpoint={"every": 2},
        **overrides,
    )
    corpus = directory / "corpus.txt"
    words = {word: f"w{number}" for number, word in enumerate(sorted(set(TEXT.split())), start=3)}
    lines = corpus.read_text().splitlines()
    corpus.write_text("".join(f"{' '.join(words[word] for word in line.split())}\n" for line in lines))
    return train_here(path)


def test_a_run_from_it_is_exported_in_the_layout(
    published: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = trained(tmp_path, published)
    final = load_file(directory / "final" / "model.safetensors")
    assert json.loads((directory / "final" / "config.json").read_text())["model_type"] == "llama"
    assert known_diffusion(str(directory / "final"), "MODEL") == Diffusion("masked", MASK_ID, shift=False)
    assert not torch.equal(
        final["model.layers.0.mlp.gate_proj.weight"],
        weights_of(CONFIG)["model.transformer.blocks.0.ff_proj.weight"],
    )

    output = tmp_path / "exported"
    done = CommandLine(capfd)("export", directory, "--output", output, "--layout", "llada")
    assert done.code == 0, done.err
    card = (output / "README.md").read_text()
    assert "--layout llada" in card and "last evaluation, upper bounds:" in card and "diffusion.json tells" not in card
    exported = load_file(output / "model.safetensors")
    assert exported.keys() == weights_of(CONFIG).keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, final[llama_name(name)]), name
    assert for_training().get_vocab() == load_tokenizer(str(output)).get_vocab()
    assert load_saved(str(output)).decoder.config.model_type == "llama"

    back = tmp_path / "back"
    done = CommandLine(capfd)("export", output, "--output", back)
    assert done.code == 0, done.err
    assert_same(load_file(back / "model.safetensors"), final)


def test_an_adapter_on_it(published: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = trained(tmp_path, published, adapter={"kind": "lora", "r": 4})
    saved = load_saved(str(directory))
    assert saved.location.base == str(published)
    done = CommandLine(capfd)("export", directory, "--output", tmp_path / "alone", "--no-merge", "--layout", "llada")
    assert_refused(done, "--layout: an adapter alone has peft's layout")
    done = CommandLine(capfd)("export", directory, "--output", tmp_path / "merged", "--layout", "llada")
    assert done.code == 0, done.err
    merged = load_saved(str(tmp_path / "merged")).decoder
    torch.testing.assert_close(ours(Decoder(merged)), ours(Decoder(saved.decoder)), rtol=1e-4, atol=1e-4)


def test_a_llama_that_became_one_is_exported_in_the_layout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Adapted from an autoregressive model by LoRA, with a row for the mask."""
    base = tiny.decoder(seed=3, vocab_size=MASK_ID, max_position_embeddings=64).hf
    base.save_pretrained(tmp_path / "base")
    tiny.tokenizer(MASK_ID).save_pretrained(tmp_path / "base")
    directory = trained(tmp_path, tmp_path / "base", adapter={"kind": "lora", "r": 4})
    for layout in ("llada", "transformers"):
        done = CommandLine(capfd)("export", directory, "--output", tmp_path / layout, "--layout", layout)
        assert done.code == 0, done.err
    written, usual = (load_saved(str(tmp_path / layout)) for layout in ("llada", "transformers"))
    assert written.diffusion == usual.diffusion == Diffusion("masked", MASK_ID, shift=False)
    assert written.decoder.config.is_causal is usual.decoder.config.is_causal is False
    torch.testing.assert_close(ours(Decoder(written.decoder)), ours(Decoder(usual.decoder)), rtol=0, atol=0)


def test_the_shipped_recipe_on_a_small_one(tmp_path: Path) -> None:
    """diffusion/llada-8b-sft as it stands, but for sizes and places: its template, mask token and padding."""
    words = chats.chat_tokenizer(special=["<|startoftext|>", MASK], bos_token="<|startoftext|>")
    mask, rows = words.convert_tokens_to_ids(MASK), len(words) + 9
    model = write(tmp_path / "llada", mask_token_id=mask, embedding_size=rows, vocab_size=rows, max_sequence_length=256)
    words.save_pretrained(model)
    write_jsonl(tmp_path / "chats.jsonl", conversations(60))
    overrides = [
        f"model.path={model}",
        f"tokenizer.path={model}",
        f"data.train=[{{kind: jsonl, paths: [{tmp_path}/chats.jsonl]}}]",
        f"output_dir={tmp_path}",
        "sequence_length=192",
        "epochs=null",
        "steps=2",
        "batch.sequences=4",
        "data.validation_fraction=0.2",
        "precision=fp32",
        "engine={kind: auto}",
        "schedule.warmup_steps=1",
        "evaluation.every=1",
        "algorithm.eos_padding=16",
        "samples={prompts: [Hi], every: 2, max_new_tokens: 8}",
        "checkpoint.every=2",
    ]
    loaded = load_recipe("diffusion/llada-8b-sft", overrides)
    assert run.train(loaded) == 0
    final = loaded.recipe.run_directory / "final"
    saved = load_saved(str(final))
    assert saved.diffusion == Diffusion("masked", mask, shift=False)
    asked = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Yes."}]
    said = saved.tokenizer.apply_chat_template(asked, tokenize=False)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    assert said == "<|startoftext|>" + header.format("user", "Hi") + header.format("assistant", "Yes.")
    records = read_metrics(loaded.recipe.run_directory / "metrics.jsonl")
    assert all(math.isfinite(record["loss"]) for record in records if record["step"] > 0)
