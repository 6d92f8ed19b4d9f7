import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmtrain.observe.flops import (
    datasheet_peak,
    device_peak_flops,
    measured_peak,
    readable_flops,
    training_flops_per_token,
)

PRECISIONS = ["fp32", "bf16", "bf16_autocast"]


def test_the_formula_against_torchs_own_counter() -> None:
    """Forward and backward of a small decoder block, counted operation by operation."""
    layers, hidden, length, vocabulary = 3, 32, 64, 100
    projections = [[torch.randn(hidden, hidden, requires_grad=True) for _ in range(4)] for _ in range(layers)]
    head = torch.randn(hidden, vocabulary, requires_grad=True)
    x = torch.randn(length, hidden, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = x
        for query, key, value, out in projections:
            scores = (y @ query) @ (y @ key).T
            y = scores.softmax(-1) @ (y @ value) @ out
        (y @ head).sum().backward()  # type: ignore[no-untyped-call]
    num_parameters = layers * 4 * hidden * hidden + hidden * vocabulary
    ours = training_flops_per_token(num_parameters, layers, hidden, length) * length
    full_square = 6.0 * layers * hidden * length * length  # the counter has no causal kernel
    assert counter.get_total_flops() == pytest.approx(ours + full_square)


@pytest.mark.parametrize(
    ("name", "kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "fp32", 60),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA H200 NVL", "bf16", 835),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GeForce RTX 4090", "fp32", 82.6),
    ],
)
def test_datasheet_peaks(name: str, kind: str, teraflops: float) -> None:
    peak = datasheet_peak(name, kind)
    assert peak is not None and peak.flops_per_second == pytest.approx(teraflops * 1e12)
    assert f"{kind} dense" in peak.source


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA GB200", "Tesla V100-SXM2-16GB"])
def test_other_gpus_are_measured_instead(name: str) -> None:
    assert datasheet_peak(name, "bf16") is None


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cpu_is_measured_in_the_dtype_of_the_compute(precision: str) -> None:
    peak = device_peak_flops(torch.device("cpu"), precision)
    assert peak.flops_per_second > 1e8
    assert peak.source.startswith(f"measured {'float32' if precision == 'fp32' else 'bfloat16'} GEMM ")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; runs on a machine with CUDA")
def test_a_gpu_reaches_less_than_its_datasheet() -> None:
    device = torch.device("cuda", 0)
    stated = datasheet_peak(torch.cuda.get_device_name(device), "bf16")
    if stated is None:
        pytest.skip(f"{torch.cuda.get_device_name(device)} is not in the table; runs on those that are")
    assert measured_peak(device, torch.bfloat16).flops_per_second < 1.05 * stated.flops_per_second


def test_readable() -> None:
    assert [readable_flops(rate) for rate in (12, 1.8e11, 9.89e14, 2.25e15)] == [
        "12 FLOP/s",
        "180 GFLOP/s",
        "989 TFLOP/s",
        "2.25 PFLOP/s",
    ]


def test_frozen_weights_cost_no_gradient_of_theirs() -> None:
    """Forward and the gradient of what goes in: two thirds of a trained weight's work."""
    assert training_flops_per_token(90, 0, 0, 8, num_frozen=90) == training_flops_per_token(60, 0, 0, 8)
