"""The backends, and what each of them can be told."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from llmtrain.recipe.schema.base import PositiveFloat, PositiveInt, Section


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):  # to Python true is 1, and would pass for stage 1
        raise ValueError(f"expected a number, given {str(value).lower()}")
    return value


Stage = Annotated[Literal[0, 1, 2, 3], BeforeValidator(_no_boolean)]
Offload = Literal["none", "cpu", "nvme"]


class EngineOptions(Section):
    """What every backend can do."""

    compile: bool = Field(False, description="torch.compile each decoder layer (first step takes longer).")
    activation_checkpointing: Literal["none", "full", "selective"] = Field(
        "none",
        description="full: recompute each decoder layer in backward, less memory for about a third more compute. "
        "selective: keep the results of matrix products and attention, recompute the rest.",
    )
    activation_offload: bool = Field(
        False, description="Keep what checkpointed layers save for backward in host memory; needs checkpointing."
    )

    @model_validator(mode="after")
    def _offload_what_is_saved(self) -> "EngineOptions":
        if self.activation_offload and self.activation_checkpointing == "none":
            raise ValueError("engine.activation_offload needs engine.activation_checkpointing: full or selective")
        return self


class GroupOptions(EngineOptions):
    """What every backend of several processes can be told."""

    timeout_seconds: PositiveInt = Field(1800, description="Deadline of every collective.")


class AutoEngine(GroupOptions):
    """single in one process, ddp in several."""

    kind: Literal["auto"] = "auto"


class SingleEngine(EngineOptions):
    """One process, one device; starting it on several ranks is an error."""

    kind: Literal["single"]


class DDPEngine(GroupOptions):
    """DistributedDataParallel: whole model and optimizer on every rank; nccl on GPUs, gloo on CPUs."""

    kind: Literal["ddp"]


class FSDPEngine(GroupOptions):
    """FSDP2 (`fully_shard`): weights, gradients and optimizer sharded over the ranks, a decoder layer at a time."""

    kind: Literal["fsdp"]
    shard_size: PositiveInt | None = Field(
        None,
        description="Ranks over which one copy of the model is sharded; copies are replicated over the rest (HSDP). "
        "It divides the number of ranks; default: all of them.",
    )
    reshard_after_forward: bool | PositiveInt = Field(
        True,
        description="true: free a layer's whole weights after its forward, and gather them again in backward. false: "
        "keep them, more memory for less traffic. A number: keep them sharded over so many ranks in between.",
    )
    cpu_offload: bool = Field(False, description="Keep weights, gradients and optimizer state in host memory.")
    prefetch: Annotated[int, Field(ge=0)] = Field(
        0, description="Layers to gather ahead of the one that computes, beyond what FSDP does by itself."
    )


class ZeroPlusPlus(Section):
    """ZeRO++ (arXiv 2306.10209), for stage 3."""

    hpz_partition_size: PositiveInt = Field(
        1, description="Ranks (of a node) that hold a second shard of the weights, for the backward's gathers."
    )
    quantized_weights: bool = Field(False, description="Gather weights in int8.")
    quantized_gradients: bool = Field(False, description="Reduce gradients in int4, within and then between nodes.")


class DeepSpeedEngine(GroupOptions):
    """DeepSpeed ZeRO (arXiv 1910.02054)."""

    kind: Literal["deepspeed"]
    zero_stage: Stage = Field(
        description="What is sharded over the ranks: 0 nothing, 1 the optimizer, 2 and gradients, 3 and weights."
    )
    offload_optimizer: Offload = Field("none", description="Where optimizer state lives; nvme takes stage 3.")
    offload_parameters: Offload = Field("none", description="Where weights live (stage 3).")
    nvme_path: str | None = Field(None, description="Directory on the local disk, for offload to nvme.")
    zero_plus_plus: ZeroPlusPlus | None = Field(None, description="Hierarchical and quantised communication.")
    loss_scale: PositiveFloat | None = Field(None, description="Fixed loss scale of fp16_mixed; default: dynamic.")
    config: str | None = Field(
        None,
        description="Your own DeepSpeed JSON, for its further settings; one that contradicts the recipe is an error.",
    )


Engine = Annotated[AutoEngine | SingleEngine | DDPEngine | FSDPEngine | DeepSpeedEngine, Field(discriminator="kind")]
