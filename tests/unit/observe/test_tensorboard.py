from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmtrain.observe.tensorboard import TensorBoardLog


def test_after_a_resume_each_step_is_shown_once(tmp_path: Path) -> None:
    killed = TensorBoardLog(tmp_path, 0)
    for step in range(1, 8):
        killed.scalars(step, {"loss": 1.0, "eval_loss": 3.0})
    killed.text(1, "sample 0", "a text")
    killed.close()
    resumed = TensorBoardLog(tmp_path, 5)
    for step in range(6, 10):
        resumed.scalars(step, {"loss": 2.0})
    resumed.close()
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("training/loss")] == [
        *((step, 1.0) for step in range(1, 6)),
        *((step, 2.0) for step in range(6, 10)),
    ]
    assert [event.step for event in shown.Scalars("evaluation/loss")] == [1, 2, 3, 4, 5]
    assert "sample 0/text_summary" in shown.Tags()["tensors"]
