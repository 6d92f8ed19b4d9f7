"""Model FLOPs and the device's peak, whose ratio is the model FLOPs utilisation (MFU).

Counting after PaLM, arXiv 2204.02311, appendix B: a multiply-add is two FLOPs, backward costs twice
the forward, recomputation counts for nothing.
"""

import time
from typing import NamedTuple

import torch

_MEASURING_SECONDS = 0.3
_CPU_GEMM, _GPU_GEMM = 2048, 8192  # large enough to fill the device, small enough to repeat


class Peak(NamedTuple):
    """What a device could do at most.

    Attributes:
        flops_per_second: of one device.
        source: where the figure comes from, to be shown beside every MFU.
    """

    flops_per_second: float
    source: str


class _Datasheet(NamedTuple):
    """Dense peaks in TFLOP/s, half of what is printed "with sparsity"."""

    name: str
    bf16: float
    tf32: float
    fp32: float


# NVIDIA's data sheets, by what torch.cuda.get_device_name contains; the first match counts, so a
# variant stands before the plain name. bf16 of GeForce: with fp32 accumulation.
_DATASHEETS = {
    "B200": _Datasheet("B200 SXM", 2250, 1125, 75),
    "H200 NVL": _Datasheet("H200 NVL", 835, 418, 60),
    "H200": _Datasheet("H200 SXM", 989, 495, 67),
    "H100 NVL": _Datasheet("H100 NVL", 835, 418, 60),
    "H100 PCIe": _Datasheet("H100 PCIe", 756, 378, 51),
    "H100": _Datasheet("H100 SXM", 989, 495, 67),
    "A100": _Datasheet("A100", 312, 156, 19.5),
    "L40S": _Datasheet("L40S", 362, 183, 91.6),
    "A10": _Datasheet("A10", 125, 62.5, 31.2),
    "RTX 4090": _Datasheet("RTX 4090", 165.2, 82.6, 82.6),
}


def training_flops_per_token(
    num_matmul_parameters: int,
    num_layers: int,
    hidden: int,
    sequence_length: int,
    num_frozen: int = 0,
    *,
    copies: int = 1,
    causal: bool = True,
) -> float:
    """FLOPs of forward and backward for one token of a causal decoder: 6 P - 2 F + 6 L h s.

    Attention's scores and weighted sum cost 12 L h s over the whole square; a causal kernel needs
    half of it, and so does each copy of block diffusion's two. Packed rows, where a token sees its own
    document only, need less still: what is counted here is what the row length asks for.

    Args:
        num_matmul_parameters: P, those that multiply: without the embedding lookup, with the head
            (a tied head counts).
        num_layers: L, attention layers.
        hidden: h, number of heads times head size.
        sequence_length: s, tokens in a row.
        num_frozen: F, those of P that have no gradient of their own.
        copies: how often the forward holds each token.
        causal: False where a token sees those after it, too.
    """
    attention = (6.0 if causal else 12.0) * num_layers * hidden * sequence_length
    return copies * (6.0 * num_matmul_parameters - 2.0 * num_frozen + attention)


def device_peak_flops(device: torch.device, precision: str) -> Peak:
    """Peak of one device for matrix products in `precision` (fp32, bf16_autocast or bf16).

    From NVIDIA's data sheet where the GPU is known; measured by a matrix product of about 0.3 s
    otherwise, and always on a CPU, with this process's threads.
    """
    bf16 = precision != "fp32"
    if device.type == "cuda":
        # At "highest" (the default) torch multiplies fp32 without tensor cores.
        kind = "bf16" if bf16 else "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        known = datasheet_peak(torch.cuda.get_device_name(device), kind)
        if known is not None:
            return known
    return measured_peak(device, torch.bfloat16 if bf16 else torch.float32)


def datasheet_peak(device_name: str, kind: str) -> Peak | None:
    """The data sheet's dense peak; `kind` is bf16, tf32 or fp32; None for a GPU that is not listed."""
    words = device_name.replace("-", " ").split()
    for key, sheet in _DATASHEETS.items():
        if all(word in words for word in key.split()):
            teraflops = {"bf16": sheet.bf16, "tf32": sheet.tf32, "fp32": sheet.fp32}[kind]
            return Peak(teraflops * 1e12, f"{sheet.name} {kind} dense {teraflops:g} TFLOP/s")
    return None


def measured_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The best rate that a large square matrix product reaches."""
    size = _GPU_GEMM if device.type == "cuda" else _CPU_GEMM
    left = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(left)
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < _MEASURING_SECONDS or best == float("inf"):
        started = time.perf_counter()
        torch.mm(left, left, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    rate = 2.0 * size**3 / best
    return Peak(rate, f"measured {str(dtype).removeprefix('torch.')} GEMM {readable_flops(rate)}")


def readable_flops(flops_per_second: float) -> str:
    """1.8e11 -> "180 GFLOP/s"."""
    for unit in ("", "k", "M", "G", "T"):
        if flops_per_second < 1000:
            return f"{flops_per_second:.3g} {unit}FLOP/s"
        flops_per_second /= 1000
    return f"{flops_per_second:.4g} PFLOP/s"
