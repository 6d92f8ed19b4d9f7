"""The composition root: a recipe becomes data, model, engine, algorithm and loop, and runs."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmtrain import distributed, engines
from llmtrain.algorithms.causal_lm import CausalLM
from llmtrain.checkpoint.generators import seed_generators
from llmtrain.checkpoint.state import restore_state
from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.contracts import POLICY, Algorithm, Engine
from llmtrain.data.build import Datasets, cache_directory, prepare_data, prepare_tokenizer
from llmtrain.data.loader import Loader, evaluation_batches
from llmtrain.distributed import World
from llmtrain.engines.parts import forward_precision
from llmtrain.errors import EXIT_DONE, EXIT_PREEMPTED, InputError, TrainingError
from llmtrain.loop import Loop
from llmtrain.models.checks import check_causality, check_document_isolation, check_head
from llmtrain.models.decoder import Decoder
from llmtrain.models.hub import build_model, save_pretrained
from llmtrain.observe.flops import device_peak_flops, training_flops_per_token
from llmtrain.observe.logs import setup_logging
from llmtrain.observe.observer import Observer
from llmtrain.recipe.batch import BatchPlan, plan_batch
from llmtrain.recipe.loading import LoadedRecipe
from llmtrain.recipe.schema import Recipe, SingleEngine
from llmtrain.rundir import RunDirectory, claim
from llmtrain.schedule import check_steps
from llmtrain.signals import StopRequest

log = logging.getLogger(__name__)


def train(loaded: LoadedRecipe) -> int:
    """Runs a recipe to its end, or on from its newest checkpoint; returns the exit code.

    Raises:
        InputError: something given is wrong; nothing was trained and nothing written is touched.
        TrainingError: the run cannot go on.
    """
    with loaded.errors_located():
        return _run(loaded.recipe)


def _run(recipe: Recipe) -> int:
    timeout = 1800 if isinstance(recipe.engine, SingleEngine) else recipe.engine.timeout_seconds
    with distributed.joined(recipe.device, timeout) as world:
        batch = plan_batch(recipe, world.size)
        engines.check(recipe, world)
        with claimed(recipe, world) as directory:
            if directory.is_finished():
                log.info("%s is finished already; its model is in %s", directory.path, directory.final)
                return EXIT_DONE
            return _train(recipe, batch, directory, world)


@contextmanager
def claimed(recipe: Recipe, world: World) -> Iterator[RunDirectory]:
    directory = claim(recipe.run_directory, recipe, world)
    try:
        setup_logging(directory.logs, world.rank)
        yield directory
    finally:
        directory.release()


def _train(recipe: Recipe, batch: BatchPlan, directory: RunDirectory, world: World) -> int:
    cache = cache_directory(recipe.data.cache_dir)
    tokenizer = prepare_tokenizer(recipe, cache)
    decoder = _build_decoder(recipe, tokenizer, world)  # before the data: a mistake here shall not wait for them
    datasets = prepare_data(recipe, tokenizer, cache)
    _check_same_data(datasets)
    num_steps = recipe.steps or math.ceil((recipe.epochs or 0) * datasets.steps_per_epoch(batch.sequences))
    check_steps(recipe.schedule, num_steps)
    flops = training_flops_per_token(
        decoder.num_matmul_parameters(), decoder.num_layers(), decoder.attention_width(), recipe.sequence_length
    )
    peak = device_peak_flops(world.device, recipe.precision)
    _describe(recipe, batch, datasets, decoder, num_steps, f"{peak.flops_per_second / 1e12:.3g} TFLOP/s, {peak.source}")

    trained: dict[str, Engine] = {POLICY: engines.prepare(decoder, recipe, world)}
    algorithm = _build_algorithm(recipe, batch, tokenizer, datasets, decoder, world)
    seed_generators(recipe.seed, world.rank)
    store = CheckpointStore(directory.checkpoints, recipe.checkpoint.keep, world)
    stop = StopRequest()
    with stop.listening():
        newest = store.newest()
        loop = Loop(recipe, algorithm, trained, num_steps, store, stop)
        if newest is not None:
            loop.progress = restore_state(store.load(newest), trained, algorithm, recipe.seed, world)
            log.info("going on from %s", newest)
        elif any(directory.checkpoints.glob("step-*")):
            raise InputError(
                "the run has checkpoints and none of them is whole (why: see above)",
                where=str(directory.checkpoints),
                remedy="bring one back, or delete the run directory to begin again",
            )
        directory.begin(recipe, loop.progress.step)
        with Observer(
            directory.path, world, num_steps, loop.progress.step, peak, flops, recipe.logging.tensorboard
        ) as observer:
            finished = loop.run(observer)
    if not finished:
        log.warning("stopped after step %d of %d; the same command goes on from there", loop.progress.step, num_steps)
        return EXIT_PREEMPTED
    _export(decoder, trained[POLICY], tokenizer, directory, world)
    log.info("done: %d steps; the model is in %s", num_steps, directory.final)
    return EXIT_DONE


def _check_same_data(datasets: Datasets) -> None:
    """Raises InputError where ranks would train on different rows: nodes whose files or Python differ."""
    fingerprints = distributed.gather_objects(datasets.fingerprint)
    for rank, fingerprint in enumerate(fingerprints):
        if fingerprint != fingerprints[0]:
            raise InputError(
                f"rank {rank} reads other training data than rank 0, or has another tokenizer",
                where="data.train",
                remedy="put them on a disk that all nodes share",
            )


def _build_decoder(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, world: World) -> Decoder:
    decoder = Decoder(build_model(recipe, tokenizer)).to(world.device)
    # Asked as it will run: some attention kernels take neither CPU tensors nor float32.
    with forward_precision(recipe.precision, world.device):
        check_head(decoder)
        check_causality(decoder)
        if recipe.data.packing == "documents":
            check_document_isolation(decoder)
    return decoder


def _build_algorithm(
    recipe: Recipe,
    batch: BatchPlan,
    tokenizer: PreTrainedTokenizerBase,
    datasets: Datasets,
    decoder: Decoder,
    world: World,
) -> Algorithm:
    order = datasets.order(recipe.seed)
    loader = Loader(datasets.train, order, batch.sequences, batch.micro_sequences, world.rank, world.size)
    held_out = evaluation_batches(
        datasets.validation, recipe.evaluation.max_sequences, batch.micro_sequences, world.rank, world.size
    )
    max_length = decoder.max_length(default=recipe.sequence_length)
    return CausalLM(loader, held_out, tokenizer, recipe.samples, max_length, recipe.seed, datasets.fingerprint)


def _describe(
    recipe: Recipe, batch: BatchPlan, datasets: Datasets, decoder: Decoder, num_steps: int, peak: str
) -> None:
    rows = sum(len(source) for source in datasets.train)
    held_out = sum(len(source) for source in datasets.validation)
    log.info(
        "model: %s, %.2fM parameters (%.2fM that multiply)",
        type(decoder.hf).__name__,
        decoder.num_parameters() / 1e6,
        decoder.num_matmul_parameters() / 1e6,
    )
    log.info("data: %d rows of %d tokens to train on, %d held out", rows, recipe.sequence_length, held_out)
    log.info(
        "batch: %d rows = %d ranks x %d accumulation x %d micro; %d steps, %.2f epochs; peak %s",
        batch.sequences,
        batch.world_size,
        batch.accumulation,
        batch.micro_sequences,
        num_steps,
        num_steps * batch.sequences / rows,
        peak,
    )


def _export(
    decoder: Decoder, engine: Engine, tokenizer: PreTrainedTokenizerBase, directory: RunDirectory, world: World
) -> None:
    """Writes final/; all ranks stream the parameters, rank 0 keeps them."""

    def parameters() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in engine.full_parameters():
            if not torch.isfinite(tensor).all():
                raise TrainingError(
                    f"the run diverged: {name} is not finite after the last step, so no model is exported\n"
                    "  remedy: begin again under another name=... with a lower optimizer.lr or a longer warm-up"
                )
            yield name.removeprefix(decoder.PREFIX), tensor

    if world.is_main:
        with directory.writing_final() as target:
            save_pretrained(decoder.hf, parameters(), tokenizer, target)
    else:
        for _ in parameters():
            pass
    distributed.barrier()
