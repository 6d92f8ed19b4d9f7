"""From a recipe to its algorithm: a loss, rows to train and to measure it on, and samples."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llmtrain.algorithms import causal_lm, sft
from llmtrain.algorithms.block_diffusion import BlockDiffusion
from llmtrain.algorithms.clipped_rates import SearchedRates
from llmtrain.algorithms.diffusion_samples import DiffusionSamples
from llmtrain.algorithms.distillation import distilled
from llmtrain.algorithms.judged import Around, judged
from llmtrain.algorithms.masked_diffusion import MaskedDiffusion
from llmtrain.algorithms.masking import rows_of
from llmtrain.algorithms.score_entropy import ScoreEntropy
from llmtrain.algorithms.texts import HeldOut, Loss, Measured, Stateful, Supervised, TextSamples, bytes_of
from llmtrain.contracts import POLICY, Algorithm, LossOutput, MicroBatch
from llmtrain.data.build import Datasets
from llmtrain.data.loader import Loader, evaluation_batches
from llmtrain.data.tokenizer import pad_id
from llmtrain.models.decoder import Decoder
from llmtrain.models.diffusion import diffusion_of
from llmtrain.recipe import schema
from llmtrain.recipe.batch import BatchPlan
from llmtrain.recipe.schema import Recipe


class Process(Protocol):
    """Noise on rows, and the loss that undoes it."""

    def noised(self, step: int, micro: MicroBatch) -> MicroBatch:
        """A training micro-batch of optimizer step `step`."""
        ...

    def held_out(self, micro: MicroBatch, num_rows: int) -> MicroBatch:
        """A held-out micro-batch, one of `num_rows` rows in all; always with the same noise."""
        ...

    def loss(self, model: nn.Module, micro: MicroBatch) -> LossOutput: ...


def build_algorithm(
    recipe: Recipe,
    batch: BatchPlan,
    tokenizer: PreTrainedTokenizerBase,
    datasets: Datasets,
    around: Around,
) -> Algorithm:
    """The recipe's algorithm on this rank's share of its rows."""
    if recipe.compares or recipe.scores:
        return judged(recipe, batch, tokenizer, datasets, around)
    decoder, world = around.decoder, around.world
    order = datasets.order(recipe.seed)
    loader = Loader(datasets.train, order, batch.sequences, batch.micro_sequences, world.rank, world.size)
    batches = evaluation_batches(
        datasets.validation, recipe.evaluation.max_sequences, batch.micro_sequences, world.rank, world.size
    )
    max_length = decoder.max_length(default=recipe.sequence_length)
    asked = (recipe.samples, tokenizer, max_length, recipe.seed, datasets.documents.prompt_ids)
    algorithm = recipe.algorithm
    if isinstance(algorithm, schema.Distillation):
        template = datasets.documents.chat_template
        parts = distilled(recipe, batch, loader, batches, tokenizer, template, around)
        return Supervised(*parts, TextSamples(*asked), datasets.fingerprint)
    if isinstance(algorithm, schema.CausalLM | schema.SFT):
        loss: Loss = sft.LOSSES[algorithm.loss] if isinstance(algorithm, schema.SFT) else causal_lm.nll
        held_out = HeldOut(batches, bytes_of((micro.tensors["targets"] for micro in batches), tokenizer))
        return Supervised(loss, loader.micro_batches, held_out, TextSamples(*asked), datasets.fingerprint)
    process = _process(recipe, batch.sequences, tokenizer, decoder)
    num_rows = min(recipe.evaluation.max_sequences, sum(len(source) for source in datasets.validation))
    measured, state = _measured(recipe, process, batches, num_rows, tokenizer)

    def micro_batches(step: int) -> list[MicroBatch]:
        return [process.noised(step, micro) for micro in loader.micro_batches(step)]

    diffusion = diffusion_of(recipe, tokenizer.mask_token_id)
    assert diffusion is not None, f"{algorithm.kind} is one"
    samples = DiffusionSamples(diffusion, decoder.hf.config.vocab_size, *asked)
    return Supervised(process.loss, micro_batches, measured, samples, datasets.fingerprint, state)


def _process(recipe: Recipe, sequences: int, tokenizer: PreTrainedTokenizerBase, decoder: Decoder) -> Process:
    settings, mask_id = recipe.algorithm, tokenizer.mask_token_id
    match settings:
        case schema.MaskedDiffusion():
            return MaskedDiffusion(settings, recipe.seed, sequences, mask_id, pad_id(tokenizer))
        case schema.BlockDiffusion():
            eos = tokenizer.eos_token_id
            return BlockDiffusion(settings, recipe.seed, sequences, mask_id, recipe.sequence_length, eos)
        case schema.ScoreEntropy():
            absorbed = None if recipe.mask_token is None else mask_id
            return ScoreEntropy(settings, recipe.seed, sequences, absorbed, decoder.hf.config.vocab_size)
        case _:
            raise TypeError(f"{settings.kind} adds no noise")


def _measured(
    recipe: Recipe, process: Process, batches: Sequence[MicroBatch], num_rows: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Measured, Stateful | None]:
    """Held-out figures, and what of them is state."""

    def nats(model: nn.Module, micro: MicroBatch) -> Tensor:
        return process.loss(model, micro).sums[POLICY]

    assert isinstance(recipe.algorithm, schema.DIFFUSION)
    mask_id = None if recipe.mask_token is None else tokenizer.mask_token_id
    rows = (rows_of(micro, mask_id, shift=recipe.algorithm.shift) for micro in batches)
    num_bytes = bytes_of((torch.from_numpy(part.input_ids[part.trained]) for part in rows), tokenizer)
    noisy = [process.held_out(micro, num_rows) for micro in batches]
    held_out = HeldOut(noisy, num_bytes, process.nats if isinstance(process, ScoreEntropy) else nats)
    if isinstance(recipe.algorithm, schema.BlockDiffusion) and recipe.algorithm.clip == "search":
        assert isinstance(process, BlockDiffusion)
        searched = SearchedRates(process, held_out, batches, num_rows)
        return searched, searched
    return held_out, None
