"""Direct preference optimisation: ours against TRL's DPOTrainer on the same pairs; see `preference.py`."""

from typing import Any

from tests.bench import preference


def bench(quick: bool) -> dict[str, Any]:
    return preference.bench("dpo", quick)
