"""Fine-tuning SmolLM2-135M's shape on ragged conversations: ours against TRL's SFTTrainer.

The conversations are docstrings of the Python standard library, asked for by their first line: real
text, 20 to 500 tokens each. Both sides train on the assistant's tokens of the same conversations,
packed best-fit into rows of 512 tokens, 2,048 tokens a step; TRL also unpacked, padded and padding-free,
with as many conversations a step, and the fastest of its settings is the peer. Counted are tokens that
are no padding. The weights are random, so that nothing is downloaded: speed does not depend on them.
"""

import importlib.util
import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

from llmtrain.data.python_tree import read
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.data.tokenizer_training import train_sentencepiece
from llmtrain.recipe.schema import PythonSource, SentencePieceTokenizer
from tests.bench.harness import PeerMissing, compared, interleaved, machine, run_contender

RECIPE = Path(__file__).with_name("sft.yaml")
OURS, PEER = "tests.bench.pretrain_ours", "tests.bench.sft_trl"
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATIONS = 400
LONGEST = 480  # tokens: nobody has to cut any
VARIANTS = [(method, precision) for method in ("full", "lora") for precision in ("fp32", "bf16_autocast")]
LORA = "adapter={kind: lora, r: 16, alpha: 32}"
PACKINGS = ("packed", "padding_free", "padded")


def bench(quick: bool) -> dict[str, Any]:
    if importlib.util.find_spec("trl") is None:
        raise PeerMissing("trl is not installed: pip install -e '.[test]'")
    rounds, steps, warmup = (1, 3, 1) if quick else (3, 4, 1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_inputs(work, layers=2 if quick else SMOLLM2["num_hidden_layers"])
        metrics: dict[str, Any] = {}
        settings: dict[str, str] = {}
        for method, precision in VARIANTS[-1:] if quick else VARIANTS:
            best = "packed" if quick else best_packing(work, method, precision)
            contenders = {
                "ours": ours(work, method, precision, steps, warmup),
                "peer": peer(work, method, precision, best, steps, warmup),
            }
            results = interleaved(contenders, rounds)
            for figure in ("tokens_per_second", "peak_memory_bytes"):
                columns = {name: [result[figure] for result in results[name]] for name in contenders}
                metrics[f"{figure}_{method}_{precision}"] = compared(columns["ours"], columns["peer"])
            settings[f"{method}_{precision}"] = best
    return {
        "bench": "sft",
        "peer": f"trl {metadata.version('trl')} SFTTrainer, the fastest of {', '.join(PACKINGS)}",
        "rounds": rounds,
        "settings": settings,
        "metrics": metrics,
        "machine": machine() | {"torch": torch.__version__},
    }


def ours(work: Path, method: str, precision: str, steps: int, warmup: int) -> tuple[str, list[str]]:
    adapter = [LORA] if method == "lora" else []
    return OURS, [str(work / "sft.yaml"), str(warmup), f"precision={precision}", f"steps={steps + 1}", *adapter]


def peer(work: Path, method: str, precision: str, packing: str, steps: int, warmup: int) -> tuple[str, list[str]]:
    return PEER, [str(work), method, precision, packing, str(steps), str(warmup)]


def best_packing(work: Path, method: str, precision: str) -> str:
    """The fastest of the peer's ways to make rows."""
    speeds = {
        packing: run_contender(*peer(work, method, precision, packing, 2, 1))["tokens_per_second"]
        for packing in PACKINGS
    }
    print(f"{method} {precision}: peer {speeds}", file=sys.stderr, flush=True)
    return max(speeds, key=lambda packing: speeds[packing])


def write_inputs(work: Path, layers: int) -> None:
    """Model, tokenizer with a chat template, conversations, and our recipe."""
    documents = [text for text in read(PythonSource(kind="python", content="docstrings")) if len(text) < 2000]
    model = work / "model"
    tokenizer = write_tokenizer(model, documents)
    torch.manual_seed(0)
    config = LlamaConfig(**{**SMOLLM2, "num_hidden_layers": layers}, eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    with (work / "chats.jsonl").open("w") as file:
        for text in [text for text in documents if "\n" in text.strip()][:CONVERSATIONS]:
            question, _, answer = text.strip().partition("\n")
            if not answer.strip() or not question.strip() or len(tokenizer.encode(text)) > LONGEST:
                continue
            turns = [("user", question.strip()), ("assistant", answer.strip())]
            file.write(json.dumps({"messages": [{"role": role, "content": said} for role, said in turns]}) + "\n")
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["model"]["path"], recipe["data"]["train"][0]["paths"] = str(model), [str(work / "chats.jsonl")]
    recipe["data"]["cache_dir"] = str(work / "cache")
    (work / "sft.yaml").write_text(yaml.safe_dump(recipe))


def write_tokenizer(directory: Path, documents: list[str]) -> PreTrainedTokenizerBase:
    """Trains a tokenizer with a chat template, saves it in `directory`, which it makes, and returns it."""
    spec = SentencePieceTokenizer(
        kind="sentencepiece", vocab_size=8192, special_tokens=["<|im_start|>", "<|im_end|>"], max_bytes=4_000_000
    )
    directory.mkdir()
    train_sentencepiece(documents, spec, directory)
    tokenizer = load_tokenizer(str(directory))
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(directory)
    return tokenizer
