"""TensorBoard event files of a run."""

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class TensorBoardLog:
    """Scalars and sample texts; after a resume, what lies beyond the checkpoint is hidden."""

    def __init__(self, directory: Path, resume_step: int):
        # purge_step tells TensorBoard to drop the earlier events from that step on, which the killed
        # run wrote beyond its checkpoint.
        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else 0)

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds the figures; those named eval_* go under "evaluation", the others under "training"."""
        for name, value in figures.items():
            group = "evaluation" if name.startswith("eval_") else "training"
            self._writer.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, step)

    def text(self, step: int, name: str, markdown: str) -> None:
        self._writer.add_text(name, markdown, step)

    def close(self) -> None:
        self._writer.close()
