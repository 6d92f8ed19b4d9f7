"""`python -m tests.bench NAME [--quick]`; exits 3 where the peer is not installed."""

import argparse
import json
import sys

from tests.bench import checkpoint, communication, diffusion, dpo, loop, pretrain, reward, sft
from tests.bench.harness import PeerMissing

BENCHES = {
    "pretrain": pretrain.bench,
    "loop": loop.bench,
    "sft": sft.bench,
    "diffusion": diffusion.bench,
    "reward": reward.bench,
    "dpo": dpo.bench,
    "checkpoint": checkpoint.bench,
    "communication": communication.bench,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--quick", action="store_true", help="end within a minute: one round, few steps")
    arguments = parser.parse_args()
    try:
        result = BENCHES[arguments.name](arguments.quick)
    except PeerMissing as error:
        print(error, file=sys.stderr)
        return 3
    print(json.dumps(result))
    return 0


sys.exit(main())
