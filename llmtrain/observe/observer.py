"""What the loop reports, and where it goes: metrics.jsonl, TensorBoard, progress, console, log file."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich.panel import Panel
from rich.text import Text

from llmtrain.contracts import Sample
from llmtrain.distributed import World
from llmtrain.observe.console import CONSOLE, say
from llmtrain.observe.flops import Peak
from llmtrain.observe.memory import peak_memory_bytes
from llmtrain.observe.metrics import MetricsLog
from llmtrain.observe.progress import Progress

if TYPE_CHECKING:
    from llmtrain.observe.tensorboard import TensorBoardLog

log = logging.getLogger(__name__)


class Observer:
    """Reports of one run; used as a context manager. Only rank 0 shows and writes anything.

    Args:
        directory: the run directory.
        world: the ranks; all have the same kind of device.
        total_steps: steps of the whole run.
        resume_step: step of the checkpoint that the run goes on from; 0 for a new run. What the
            files hold beyond it is dropped.
        peak: of one device.
        flops_per_token: of training, forward and backward.
        tensorboard: whether to write event files.
    """

    def __init__(
        self,
        directory: Path,
        world: World,
        total_steps: int,
        resume_step: int,
        peak: Peak,
        flops_per_token: float,
        tensorboard: bool,
    ):
        self.directory, self.world, self.total_steps, self.resume_step = directory, world, total_steps, resume_step
        self.peak, self.flops_per_token, self._wants_tensorboard = peak, flops_per_token, tensorboard
        self._open = ExitStack()
        self._tensorboard: TensorBoardLog | None = None

    def __enter__(self) -> "Observer":
        if not self.world.is_main:
            return self
        with ExitStack() as opened:
            self._metrics = MetricsLog(self.directory / "metrics.jsonl", self.resume_step)
            opened.callback(self._metrics.close)
            self._samples = MetricsLog(self.directory / "samples.jsonl", self.resume_step)
            opened.callback(self._samples.close)
            if self._wants_tensorboard:
                # Here, because it takes half a second that a run without it need not wait.
                from llmtrain.observe.tensorboard import TensorBoardLog

                self._tensorboard = TensorBoardLog(self.directory / "tensorboard", self.resume_step)
                opened.callback(self._tensorboard.close)
            self._progress = opened.enter_context(Progress(self.total_steps, self.resume_step))
            self._open = opened.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def step(self, record: Mapping[str, float]) -> None:
        """Reports a finished step.

        Args:
            record: step, loss, grad_norm, lr, tokens (trained on so far), step_tokens (in this step,
                over all ranks), step_seconds, skipped, the algorithm's own figures, and eval_*
                figures where the step was evaluated. To it are added tokens_per_second, mfu (over
                all ranks, against the peak) and peak_memory_bytes (of rank 0). A record without
                step_seconds, such as that of the evaluation before the first step, gets none.
        """
        if not self.world.is_main:
            return
        figures = dict(record)
        if "step_seconds" in record:
            tokens_per_second = record["step_tokens"] / record["step_seconds"]
            figures["tokens_per_second"] = tokens_per_second
            ceiling = self.peak.flops_per_second * self.world.size
            figures["mfu"] = self.flops_per_token * tokens_per_second / ceiling
        figures["peak_memory_bytes"] = peak_memory_bytes(self.world.device)
        self._metrics.write(figures)
        step = int(figures.pop("step"))
        if self._tensorboard is not None:
            self._tensorboard.scalars(step, figures)
        self._progress.update(step, figures)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Shows held-out figures in one line; writing them is `step`'s, which gets them as eval_*."""
        shown = ", ".join(
            f"{name.removeprefix('eval_').replace('_', ' ')} {value:.4g}" for name, value in figures.items()
        )
        self.note(f"evaluation at step {step}/{self.total_steps}: {shown}")

    def samples(self, step: int, samples: list[Sample]) -> None:
        """Shows texts that the model wrote, and appends them to samples.jsonl and TensorBoard."""
        if not self.world.is_main:
            return
        for number, sample in enumerate(samples):
            self._samples.write({"step": step, "prompt": sample.prompt, "completion": sample.completion})
            if self._tensorboard is not None:
                self._tensorboard.text(step, f"sample {number}", _as_markdown(sample))
        if CONSOLE.is_terminal:
            for sample in samples:
                body = Text.assemble((sample.prompt, "bold"), sample.completion)
                CONSOLE.print(Panel(body, title=f"sample at step {step}", title_align="left"))
            return
        for sample in samples:
            say(f"sample at step {step}:\n{_indented(sample.prompt + sample.completion)}")

    def note(self, text: str) -> None:
        """Shows a line on the console and keeps it in the log file of every rank."""
        log.info(text)


def _as_markdown(sample: Sample) -> str:
    # A block indented by four is shown as it is, whatever Markdown the model wrote.
    return f"**prompt**\n\n{_indented(sample.prompt)}\n\n**completion**\n\n{_indented(sample.completion)}"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
