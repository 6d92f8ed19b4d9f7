"""What likelihoods of diffusion models are compared with: sums over everything that could be drawn."""

import itertools

import numpy as np

from llmtrain.evaluation.likelihood import of_decoder
from llmtrain.evaluation.scoring import Span, rows_of_spans
from llmtrain.models.decoder import Decoder
from llmtrain.models.saved import Saved


def expected_bound(saved: Saved, ids: list[int], first: int) -> float:
    """The bound of the tokens from place `first`: over all l and all sets of l of a block's tokens, or of all."""
    assert saved.diffusion is not None
    predict, size = of_decoder(Decoder(saved.decoder), saved.diffusion), saved.diffusion.block_size or len(ids)
    total = 0.0
    for start in range(0, len(ids), size):
        places = [place for place in range(start, min(start + size, len(ids))) if place >= first]
        for num in range(1, len(places) + 1):
            sets = list(itertools.combinations(places, num))
            masked = np.stack([np.isin(np.arange(len(ids)), chosen) for chosen in sets])
            rows = rows_of_spans([Span(np.asarray(ids), mask, 0) for mask in masked])
            total -= float(predict(rows, masked).logprobs.sum()) / num / len(sets)
    return total
