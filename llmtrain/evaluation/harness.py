"""Tasks of EleutherAI's lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), the package behind [eval]."""

import logging
from typing import Any

from llmtrain.errors import InputError
from llmtrain.evaluation.figures import Figure
from llmtrain.evaluation.tasks import LMEval, LoadedTask
from llmtrain.models.saved import Saved


def run(
    loaded: LoadedTask, task: LMEval, saved: Saved, limit: int | None
) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """lm-eval's figures, named task/metric (task/metric,filter where it filters), and its samples.

    Raises:
        InputError: lm-eval is not installed, or has no such task, or the model has virtual tokens
            or is a diffusion model.
    """
    _check_model(loaded, saved)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"lm-eval is not installed: {error}",
            where=loaded.where("kind"),
            remedy="python -m pip install 'llmtrain[eval]'",
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = TaskManager(
        include_path=None if task.include_path is None else str(_directory(loaded, task.include_path)),
        include_defaults=task.include_path is None,
    )
    unknown = [name for name in task.tasks if name not in manager.all_tasks]
    if unknown:
        raise InputError(
            f"lm-eval has no task {unknown[0]!r} there; it has {', '.join(manager.all_tasks[:20]) or 'none'}",
            where=loaded.where("tasks"),
            remedy="correct the name, or include_path",
        )
    model = HFLM(pretrained=saved.decoder, tokenizer=saved.tokenizer, batch_size=task.batch_size)
    results = simple_evaluate(
        model=model,
        tasks=list(task.tasks),
        num_fewshot=task.num_fewshot,
        limit=limit,
        task_manager=manager,
        apply_chat_template=task.chat,
        bootstrap_iters=1000,
        random_seed=task.seed,
        numpy_random_seed=task.seed,
        torch_random_seed=task.seed,
        fewshot_random_seed=task.seed,
        log_samples=True,
    )
    return _figures(results), [
        {"task": name, **{key: sample[key] for key in ("doc_id", "doc", "target", "filtered_resps")}}
        for name, samples in results["samples"].items()
        for sample in samples
    ]


def _check_model(loaded: LoadedTask, saved: Saved) -> None:
    if saved.diffusion is not None:
        raise InputError(
            "lm-eval takes every model for an autoregressive one, and this is a diffusion model",
            where=loaded.where("kind"),
            remedy="use kind multiple_choice, perplexity or exact_match",
        )
    if saved.virtual is not None:
        raise InputError(
            "lm-eval does not see the learnt tokens that this adapter puts before the text",
            where=loaded.where("kind"),
            remedy="use kind exact_match or perplexity",
        )


def _directory(loaded: LoadedTask, path: str) -> Any:
    directory = loaded.beside(path)
    if not directory.is_dir():
        raise InputError(
            f"no such directory: {directory}", where=loaded.where("include_path"), remedy="correct the path"
        )
    return directory


def _figures(results: dict[str, Any]) -> dict[str, Figure]:
    """Its metrics are named metric,filter and their errors metric_stderr,filter."""
    figures = {}
    for name, metrics in results["results"].items():
        rows = results.get("n-samples", {}).get(name, {}).get("effective", 0)
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            shown = metric if kind == "none" else key
            figures[f"{name}/{shown}"] = Figure(float(value), error if isinstance(error, float) else None, rows)
    return figures
