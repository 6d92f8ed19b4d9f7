"""The composition root: a recipe becomes data, model, engine, algorithm and loop, and runs."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmtrain import distributed, engines
from llmtrain.algorithms.building import build_algorithm
from llmtrain.algorithms.distillation import check_teacher, check_tokenizer
from llmtrain.algorithms.judged import AdapterOff, Around
from llmtrain.checkpoint.generators import seed_generators
from llmtrain.checkpoint.state import restore_state
from llmtrain.checkpoint.store import CheckpointStore
from llmtrain.contracts import POLICY, Engine, FrozenModel
from llmtrain.data.build import Datasets, cache_directory, prepare_data, prepare_tokenizer
from llmtrain.distributed import World
from llmtrain.ending import run_to_its_end, watched
from llmtrain.errors import EXIT_DONE, EXIT_PREEMPTED, InputError, TrainingError
from llmtrain.loop import Loop
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.checks import (
    Asked,
    check_attends_as_told,
    check_causality,
    check_document_isolation,
    check_head,
    check_shares_prompts,
)
from llmtrain.models.decoder import Decoder
from llmtrain.models.diffusion import Diffusion, diffusion_of, save_diffusion
from llmtrain.models.hub import open_model, open_other_model
from llmtrain.models.reward import Reward, reward_of, save_reward
from llmtrain.models.saving import save_pretrained
from llmtrain.observe.flops import device_peak_flops, training_flops_per_token
from llmtrain.observe.logs import setup_logging
from llmtrain.observe.observer import Observer
from llmtrain.observe.watchdog import Watchdog
from llmtrain.recipe.batch import BatchPlan, plan_batch
from llmtrain.recipe.layout import check_layout
from llmtrain.recipe.loading import LoadedRecipe
from llmtrain.recipe.resolved import flattened, identity_differences
from llmtrain.recipe.schema import (
    DIFFUSION,
    REFERENCED,
    BlockDiffusion,
    Distillation,
    GroupOptions,
    Recipe,
    RewardModel,
)
from llmtrain.rundir import RunDirectory, claim
from llmtrain.schedule import check_steps

if TYPE_CHECKING:
    from llmtrain.models.peft import Adapter

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
    timeout = recipe.engine.timeout_seconds if isinstance(recipe.engine, GroupOptions) else None
    with distributed.joined(recipe.device, timeout) as world:
        _check_same_recipe(recipe)
        batch = plan_batch(recipe, world.size)
        check_layout(recipe, world.size, world.device.type)
        with claimed(recipe, world) as directory, watched(recipe, directory, world) as watchdog:
            return run_to_its_end(watchdog, lambda: _train(recipe, batch, directory, world, watchdog))


@contextmanager
def claimed(recipe: Recipe, world: World) -> Iterator[RunDirectory]:
    directory = claim(recipe.run_directory, recipe, world)
    try:
        setup_logging(directory.logs, world.rank)
        yield directory
    finally:
        directory.release()


def _train(recipe: Recipe, batch: BatchPlan, directory: RunDirectory, world: World, watchdog: Watchdog) -> int:
    phases = watchdog.phases
    if directory.is_finished():
        phases.step, phases.num_steps = recipe.steps or 0, recipe.steps
        log.info("%s is finished already; its model is in %s", directory.path, directory.final)
        return EXIT_DONE
    cache = cache_directory(recipe.data.cache_dir)
    tokenizer, num_new = prepare_tokenizer(recipe, cache)
    blueprint = open_model(recipe, tokenizer, num_new)
    adapter = _adapted(blueprint, recipe, tokenizer)
    decoder = blueprint.decoder
    if recipe.shares_prompts:
        check_shares_prompts(decoder, recipe)
    flops = _counted_flops(decoder, recipe)
    engine = engines.prepare(blueprint, recipe, world)
    # Before the data: a mistake here shall not wait for them.
    _check_model(decoder, engine, recipe, batch.micro_sequences)
    teacher = _teacher(recipe, batch, tokenizer, world)
    datasets = prepare_data(recipe, tokenizer, cache)
    _check_same_data(datasets)
    num_steps = recipe.steps or math.ceil((recipe.epochs or 0) * datasets.steps_per_epoch(batch.sequences))
    check_steps(recipe.schedule, num_steps)
    peak = device_peak_flops(world.device, recipe.precision)
    _describe(recipe, batch, datasets, num_steps, f"{peak.flops_per_second / 1e12:.3g} TFLOP/s, {peak.source}")

    trained: dict[str, Engine] = {POLICY: engine}
    off = None if adapter is None else _switch(adapter)
    around = Around(engine, decoder, world, directory.path, phases, off, teacher)
    algorithm = build_algorithm(recipe, batch, tokenizer, datasets, around)
    seed_generators(recipe.seed, world.rank)
    store = CheckpointStore(directory.checkpoints, recipe.checkpoint, world, recipe.watchdog.save)
    with store:  # a save that is under way is finished, whatever ends the loop
        loop = Loop(recipe, algorithm, trained, num_steps, store, watchdog.stop, phases)
        _resume(loop, directory, world)
        phases.begin_training(loop.progress.step, num_steps)
        directory.begin(recipe, loop.progress.step)
        with Observer(
            directory.path, world, num_steps, loop.progress.step, peak, flops, recipe.logging.tensorboard
        ) as observer:
            finished = loop.run(observer)
            if finished and recipe.checkpoint.export == "best":
                _go_back_to_best(loop, world)
    if not finished:
        log.warning("stopped after step %d of %d; the same command goes on from there", loop.progress.step, num_steps)
        return EXIT_PREEMPTED
    reward = reward_of(recipe, _score_of_best(loop, world) if _normalizes(recipe) else 0.0)
    with phases("save"):
        tokenizer.chat_template = datasets.documents.chat_template
        beside = diffusion_of(recipe, tokenizer.mask_token_id), reward
        _export(decoder, engine, adapter, tokenizer, beside, directory, world)
    log.info("done: %d steps; the model is in %s", loop.progress.step, directory.final)
    return EXIT_DONE


def _counted_flops(decoder: Decoder, recipe: Recipe) -> float:
    """FLOPs a token. Called before the engine: what is counted here is whole, and no layout changes it."""
    log.info(
        "model: %s, %.2fM parameters (%.2fM that multiply)",
        type(decoder.hf).__name__,
        decoder.num_parameters() / 1e6,
        decoder.num_matmul_parameters() / 1e6,
    )
    return training_flops_per_token(
        decoder.num_matmul_parameters(),
        decoder.num_layers(),
        decoder.attention_width(),
        recipe.sequence_length,
        decoder.num_frozen_matmul_parameters(),
        copies=recipe.copies,
        causal=not isinstance(recipe.algorithm, DIFFUSION) or isinstance(recipe.algorithm, BlockDiffusion),
    )


def _adapted(blueprint: Blueprint, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> "Adapter | None":
    """Puts the recipe's adapter into the model, if it has one."""
    if recipe.adapter is None:
        return None
    from llmtrain.models.peft import adapt  # here, because peft takes seconds that no other run should pay
    from llmtrain.models.peft.switch import check_switchable

    adapter = adapt(blueprint, recipe, tokenizer)
    if isinstance(recipe.algorithm, REFERENCED) and recipe.algorithm.reference == "adapter_off":
        assert adapter is not None
        check_switchable(adapter)
    return adapter


def _switch(adapter: "Adapter") -> AdapterOff:
    from llmtrain.models.peft.switch import disabled

    return lambda: disabled(adapter)


def _teacher(recipe: Recipe, batch: BatchPlan, tokenizer: PreTrainedTokenizerBase, world: World) -> FrozenModel | None:
    """The teacher of a distillation, on the recipe's backend."""
    if not isinstance(recipe.algorithm, Distillation):
        return None
    check_tokenizer(recipe, tokenizer)
    blueprint = open_other_model(recipe.algorithm.teacher, recipe, tokenizer, where="algorithm.teacher")
    teacher = engines.prepare_frozen(blueprint, recipe, world)
    check_teacher(recipe, teacher, blueprint.decoder, world.device, batch.micro_sequences)
    return teacher


def _normalizes(recipe: Recipe) -> bool:
    return isinstance(recipe.algorithm, RewardModel) and recipe.algorithm.normalize


def _score_of_best(loop: Loop, world: World) -> float:
    """The mean score of the best held-out answers, by the weights that are exported."""
    score = loop.evaluate().get("best_score")
    if score is None and world.is_main:
        log.warning("no rows are held out, so scores are not normalised: their zero means nothing")
    return score or 0.0


def _resume(loop: Loop, directory: RunDirectory, world: World) -> None:
    """Puts the loop where the newest whole checkpoint is."""
    newest = loop.store.newest()
    if newest is not None:
        loop.progress = restore_state(loop.store, newest, loop.engines, loop.algorithm, loop.recipe, world)
        log.info("going on from %s", newest)
    elif any(directory.checkpoints.glob("step-*")):
        raise InputError(
            "the run has checkpoints and none of them is whole (why: see above)",
            where=str(directory.checkpoints),
            remedy="bring one back, or delete the run directory to begin again",
        )
    elif directory.metrics.exists():
        log.warning("%s has figures and no checkpoint: the run begins again at its first step", directory.path)


def _go_back_to_best(loop: Loop, world: World) -> None:
    """Puts the weights of the best checkpoint into the engines, for the export."""
    with loop.phases("save"):
        best = loop.store.best()
        if best is None:
            raise TrainingError(
                "no checkpoint has the held-out figure of checkpoint.keep_best\n"
                "  remedy: hold out rows (data.validation), or run the command again with checkpoint.export=last"
            )
        restore_state(loop.store, best, loop.engines, loop.algorithm, loop.recipe, world)
        log.info("final/ gets the weights of the best checkpoint, %s", best)


def _check_same_recipe(recipe: Recipe) -> None:
    """Raises InputError where ranks were started with different recipes: a stale file on a node, other settings."""
    mine = flattened(recipe)
    difference = next(iter(identity_differences(distributed.broadcast_object(mine), mine)), None)
    for rank, found in enumerate(distributed.gather_objects(difference)):
        if found is not None:
            key, first, other = found
            raise InputError(
                f"rank {rank} was started with {other!r}, and rank 0 with {first!r}",
                where=key,
                remedy="give all ranks the same recipe and settings",
            )


def _check_same_data(datasets: Datasets) -> None:
    """Raises InputError where ranks would train on different rows: nodes whose files or Python differ."""
    fingerprints = distributed.gather_objects(datasets.fingerprint)
    for rank, fingerprint in enumerate(fingerprints):
        for key in fingerprint:
            if fingerprint[key] == fingerprints[0].get(key):
                continue
            raise InputError(
                f"rank {rank} reads other data than rank 0, or has another tokenizer",
                where=key,
                remedy="put them on a disk that all nodes share",
            )


def _check_model(decoder: Decoder, engine: Engine, recipe: Recipe, num_rows: int) -> None:
    """Asks the model as it will run: some attention kernels take neither CPU tensors nor float32."""
    with engine.evaluating():
        asked = Asked(engine.model, decoder, engine.device, exact=recipe.precision == "fp32")
        check_head(asked)
        if isinstance(recipe.algorithm, DIFFUSION):
            check_attends_as_told(asked)
            return
        check_causality(asked)
        if recipe.shares_prompts:
            check_attends_as_told(asked)
        if recipe.packing != "none":
            check_document_isolation(asked, num_rows)


def _describe(recipe: Recipe, batch: BatchPlan, datasets: Datasets, num_steps: int, peak: str) -> None:
    rows = sum(len(source) for source in datasets.train)
    held_out = sum(len(source) for source in datasets.validation)
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
    decoder: Decoder,
    engine: Engine,
    adapter: "Adapter | None",
    tokenizer: PreTrainedTokenizerBase,
    beside: tuple[Diffusion | None, Reward | None],
    directory: RunDirectory,
    world: World,
) -> None:
    """Writes final/ with what lies beside the weights; all ranks stream the parameters, rank 0 keeps them."""
    diffusion, reward = beside

    def parameters() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in engine.full_parameters(None if adapter is None else adapter.names):
            if not torch.isfinite(tensor).all():
                raise TrainingError(
                    f"the run diverged: {name} is not finite after the last step, so no model is exported\n"
                    "  remedy: begin again under another name=... with a lower optimizer.lr or a longer warm-up"
                )
            yield name.removeprefix(decoder.PREFIX), tensor

    if world.is_main:
        with directory.writing_final() as target:
            if adapter is not None:
                from llmtrain.models.peft import save_adapter

                save_adapter(adapter, parameters(), tokenizer, target)
            else:
                if diffusion is not None:  # so that transformers' own forward attends both ways where ours does
                    decoder.hf.config.is_causal = diffusion.process == "block"
                save_pretrained(decoder.hf, parameters(), tokenizer, target)
            if diffusion is not None:
                save_diffusion(diffusion, target)
            if reward is not None:
                save_reward(reward, target)
    else:
        for _ in parameters():
            pass
    distributed.barrier()
