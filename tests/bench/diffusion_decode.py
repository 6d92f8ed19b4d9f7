"""One sampler of the diffusion benchmark: continues prompts, and says how fast.

UNMASKING is JSON, the fields of `Unmasking`.

usage: python -m tests.bench.diffusion_decode MODEL PROMPTS OUTPUT NUM_TOKENS UNMASKING
"""

import json
import sys
from pathlib import Path
from typing import Any

from llmtrain.models.saved import load_saved
from llmtrain.sampling.batched import Completion, Request, Sampling
from llmtrain.sampling.diffusion import DiffusionGenerator
from llmtrain.sampling.samplers import Unmasking


def main(model: Path, prompts: Path, output: Path, num_tokens: int, unmasking: dict[str, Any]) -> None:
    saved = load_saved(str(model))
    requests = [Request(ids, row) for row, ids in enumerate(json.loads(prompts.read_text()))]
    # No token ends a text, so that every sampler writes as many.
    generator = DiffusionGenerator(saved, [], Sampling(num_tokens, temperature=0.0), Unmasking(**unmasking))
    generator.generate(requests[:2], lambda index, completion: None)  # warm
    generator = DiffusionGenerator(saved, [], Sampling(num_tokens, temperature=0.0), Unmasking(**unmasking))
    done: dict[int, Completion] = {}
    generator.generate(requests, done.__setitem__)
    output.write_text(json.dumps([list(done[row].ids) for row in range(len(requests))]))
    tokens = sum(len(completion.ids) for completion in done.values())
    result = {
        "tokens_per_second": tokens / generator.seconds,
        "tokens_per_forward": generator.work.tokens_per_forward,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    paths = (Path(argument) for argument in sys.argv[1:4])
    main(*paths, int(sys.argv[4]), json.loads(sys.argv[5]))
