"""Score entropy diffusion: ratios of probabilities are learnt, and tokens become masks or other tokens.

    L = integral over the noise level sigma of  sum over trained i, y != x_i of
            Q(x_i, y) r_y phi(s_y / r_y),     r_y = p_sigma(y | x0_i) / p_sigma(x_i | x0_i),   phi(u) = u - 1 - log u

SEDD (arXiv 2310.16834, equation 9, with s - r log s + r (log r - 1) = r phi(s / r)): an upper bound of the
negative log-likelihood in nats. s is the model's estimate of r; attention is bidirectional within a document, and
the noise level is not told to the model. The rate at which tokens are changed, p = 1 - exp(-sigma), is uniform
(SEDD's log-linear noise), so that dsigma = dp / (1 - p).

    absorbing   a token is the mask with probability p, r = (1 - p) / p. s_y = r exp(z_y) / (V - 1) of logits z, which
                are not normalised (V - 1 gives s the right size before training, as SEDD does). A masked token
                counts (sum_y exp(z_y) / (V - 1) - z_x0 + log(V - 1) - 1) / p; with probabilities in place of
                exp(z) / (V - 1) that is -log p(x0) / p, the masked diffusion loss.
    uniform     a token is drawn anew from the V tokens with probability p; Q = 1 / V. With c = (p/V) / (1 - p + p/V),
                how much likelier a token is seen changed than kept, p(x0 | x) is the softmax of the logits with
                log(1/c) added at x (Bayes' rule), and s_y = E over it of p_sigma(y | x0) / p_sigma(x | x0), which is
                1 + p_x (c - 1) + p_y (1/c - 1): both are exact in the noise level. Every trained token counts, changed
                or not. Rates are from eps to 1 - eps; held-out figures add what is left at both ends: the divergence
                from uniform at the last rate, and -log p(x0 | x) at the first, without which they would be no bound.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from llmtrain.algorithms.masking import (
    Masking,
    Rows,
    bernoulli,
    documents_in,
    exact_count,
    micro_batch,
    of_documents,
    of_logits,
    per_document,
    rows_of,
    stratified,
)
from llmtrain.contracts import POLICY, LossOutput, MicroBatch
from llmtrain.data.counted_random import Float64Array, uniforms
from llmtrain.data.hashing import derive_seed
from llmtrain.models.attention import Visible, bidirectional, both, within
from llmtrain.recipe.schema import ScoreEntropy as Settings

OF_NOISE = ("input_ids", "seen", "rates")  # tensors of a micro-batch that depend on the noise's level


class ScoreEntropy:
    """The noise and the loss.

    Args:
        settings: of the recipe.
        seed: of the noise.
        sequences: rows in the global batch.
        mask_id: the token that stands for a masked one; None for uniform noise.
        vocabulary: rows of the model's head, V.
    """

    def __init__(self, settings: Settings, seed: int, sequences: int, mask_id: int | None, vocabulary: int):
        self._settings, self._seed, self._sequences = settings, derive_seed(seed, "score_entropy"), sequences
        self._mask_id, self._vocabulary = mask_id, vocabulary

    def noised(self, step: int, micro: MicroBatch) -> MicroBatch:
        """A training micro-batch of optimizer step `step`."""
        return self._batch(micro, self._seed, self._sequences, training=True)

    def held_out(self, micro: MicroBatch, num_rows: int) -> MicroBatch:
        """A held-out micro-batch, one of `num_rows` rows in all; always with the same noise."""
        batch = self._batch(micro, 0, num_rows, training=False)
        if self._mask_id is not None:
            return batch
        least = self.least(rows_of(micro, None, shift=self._settings.shift), 0).tensors
        added = {f"least_{name}": least[name] for name in OF_NOISE}
        return MicroBatch({**batch.tensors, **added}, batch.weights, batch.num_tokens)

    def _batch(self, micro: MicroBatch, seed: int, sequences: int, *, training: bool) -> MicroBatch:
        rows = rows_of(micro, self._mask_id, shift=self._settings.shift)
        t = stratified(seed, rows.positions, sequences, documents_in(rows), units_a_row=1)
        return self._at(rows, t, seed, micro.num_tokens, training=training)

    def at(self, rows: Rows, t: Float64Array, seed: int) -> MicroBatch:
        """The rows with noise of the levels `t` in [0, 1) of their documents, [B, D], as held-out rows have it."""
        return self._at(rows, t, seed, rows.input_ids.size, training=False)

    def least(self, rows: Rows, seed: int) -> MicroBatch:
        """The rows at the first rate, eps, with noise of its own."""
        none = np.zeros((len(rows.positions), documents_in(rows)))
        return self._at(rows, none, derive_seed(seed, "least noise"), rows.input_ids.size, training=False)

    def _at(self, rows: Rows, t: Float64Array, seed: int, num_tokens: int, *, training: bool) -> MicroBatch:
        eps, last = self._settings.eps, 1.0 if self._mask_id is not None else 1.0 - self._settings.eps
        rates = of_documents(eps + (last - eps) * t, rows)
        changed = bernoulli(seed, rows, rates)
        if not training and self._mask_id is not None:
            changed = exact_count(seed, rows, np.maximum(rows.document_ids, 0), t)
        if self._mask_id is not None:
            masking, ids = changed, np.where(changed.masked, self._mask_id, rows.input_ids)
        else:
            masking = Masking(rows.trained, (last - eps) / ((1.0 - rates) * self._vocabulary))
            ids = np.where(changed.masked, self._drawn(seed, rows), rows.input_ids)
        num_counted = float(rows.trained.sum())
        if self._settings.normalization == "sequences" and training:
            shares, num_documents = per_document(rows)
            masking, num_counted = masking._replace(weights=masking.weights * shares), float(num_documents)
        places = np.arange(ids.size).reshape(ids.shape) - (1 if self._settings.shift else 0)
        batch = micro_batch(rows, ids, masking, places, num_counted, num_tokens)
        of_tokens = {"seen": ids[masking.masked], "rates": rates[masking.masked].astype(np.float32)}
        of_rows = {"position_ids": rows.position_ids, "document_ids": rows.document_ids}
        added = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in (of_tokens | of_rows).items()}
        return MicroBatch({**batch.tensors, **added}, batch.weights, batch.num_tokens)

    def _drawn(self, seed: int, rows: Rows) -> np.ndarray:
        numbers = uniforms(seed, "token", rows.positions[:, None], np.arange(rows.input_ids.shape[1])[None, :])
        return np.floor(numbers * self._vocabulary).astype(np.int64)

    def loss(self, model: nn.Module, micro: MicroBatch) -> LossOutput:
        return LossOutput({POLICY: self._sum(model, micro)})

    def nats(self, model: nn.Module, micro: MicroBatch) -> Tensor:
        """The bound's sum over a held-out micro-batch."""
        if self._mask_id is not None:
            return self._sum(model, micro)
        least = {name: micro.tensors[f"least_{name}"] for name in OF_NOISE}
        first = MicroBatch({**micro.tensors, **least}, micro.weights, micro.num_tokens)
        return self._sum(model, micro) + self.at_ends(model, first).sum()

    def at_ends(self, model: nn.Module, least: MicroBatch) -> Tensor:
        """What the loss of uniform noise lacks for a bound, [N], in nats: beyond the last rate, and before the first.

        Args:
            least: the rows at the first rate; see `least`.
        """
        tensors = least.tensors

        def undone(logits: Tensor, part: slice) -> Tensor:
            logp = posterior_logits(logits, tensors["seen"][part], tensors["rates"][part]).log_softmax(1)
            return -logp.gather(1, tensors["targets"][part].unsqueeze(1)).squeeze(1)

        before = of_logits(model, least, self.visible(least), None, undone)
        return before + divergence_from_uniform(self._settings.eps, self._vocabulary)

    def _sum(self, model: nn.Module, micro: MicroBatch) -> Tensor:
        return self.of_tokens(model, micro).sum()

    def of_tokens(self, model: nn.Module, micro: MicroBatch) -> Tensor:
        """The loss of each token that counts, [N], with its weight."""
        tensors = micro.tensors
        targets, weights = tensors["targets"], tensors["row_weights"]

        def absorbing(logits: Tensor, part: slice) -> Tensor:
            return weights[part] * absorbing_divergence(logits, targets[part])

        def uniform(logits: Tensor, part: slice) -> Tensor:
            seen, rates = tensors["seen"][part], tensors["rates"][part]
            return weights[part] * uniform_divergence(logits, targets[part], seen, rates)

        divergence = uniform if self._mask_id is None else absorbing
        return of_logits(model, micro, self.visible(micro), self._mask_id, divergence)

    def visible(self, micro: MicroBatch) -> Visible:
        """What each token attends to."""
        return both(within(micro.tensors["document_ids"]), bidirectional)


def absorbing_divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """sum_y exp(z_y) / (V - 1) - z_x0 + log(V - 1) - 1 of each row, [N], of logits [N, V]; see the module."""
    log_scores = logits - math.log(logits.shape[1] - 1)
    return log_scores.logsumexp(1).exp() - log_scores.gather(1, targets.unsqueeze(1)).squeeze(1) - 1.0


def uniform_divergence(logits: Tensor, targets: Tensor, seen: Tensor, rates: Tensor) -> Tensor:
    """sum_{y != x} r_y phi(s_y / r_y) of each row, [N].

    Args:
        logits: [N, V], of the token before noise.
        targets: [N], that token, x0.
        seen: [N], the token that is there, x.
        rates: [N], p.
    """
    vocabulary = logits.shape[1]
    c = (rates / vocabulary / (1.0 - rates + rates / vocabulary)).unsqueeze(1)
    probabilities = posterior_logits(logits, seen, rates).softmax(1)
    seen, targets = seen.unsqueeze(1), targets.unsqueeze(1)
    kept = seen == targets
    p_seen = probabilities.gather(1, seen)
    # 1 - p_seen, which in float32 would be 0 of a token that is all but certain.
    p_others = probabilities.scatter(1, seen, 0.0).sum(1, keepdim=True)
    rising = probabilities * ((1.0 - c) / c)
    scores = p_others + c * p_seen + rising
    # r is c for all y where nothing was changed, and otherwise 1, but for x0.
    ratios = torch.where(kept, c, 1.0)
    excess = torch.where(kept, (1.0 - c) * p_others + rising, rising - (1.0 - c) * p_seen) / ratios
    terms = ratios * _phi(scores / ratios, excess)
    # What was changed has r = 1 / c at x0.
    at_target = scores.gather(1, targets) * c
    terms = torch.where(kept, terms, terms.scatter(1, targets, _phi(at_target, at_target - 1.0) / c))
    # Not subtracted from the sum: a token's own term is larger than all others by orders of magnitude.
    return terms.scatter(1, seen, 0.0).sum(1)


def _phi(u: Tensor, excess: Tensor) -> Tensor:
    """u - 1 - log u. `excess` is u - 1 without rounding, for u near 1; u is exact near 0, where u - 1 is not."""
    near = excess > -0.5
    # Each logarithm gets arguments that it has a gradient for: where() multiplies what it leaves out by 0.
    return excess - torch.where(near, excess.clamp_min(-0.5).log1p(), u.clamp_max(1.0).log())


def posterior_logits(logits: Tensor, seen: Tensor, rates: Tensor) -> Tensor:
    """Logits of p(x0 | x), [N, V], where tokens `seen` [N] are drawn anew at `rates` [N] (uniform noise)."""
    changed = rates / logits.shape[1]
    bonus = ((1.0 - rates + changed) / changed).log().unsqueeze(1)
    return logits.scatter_add(1, seen.unsqueeze(1), bonus)


def divergence_from_uniform(kept: float, vocabulary: int) -> float:
    """KL, in nats, from a token that is kept with probability `kept` and else drawn from V, to the uniform one."""
    own, other = kept + (1 - kept) / vocabulary, (1 - kept) / vocabulary
    return own * math.log(own * vocabulary) + (vocabulary - 1) * other * math.log(other * vocabulary)
