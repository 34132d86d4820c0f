"""Operations against closed forms."""

import time

import pytest
import torch
from factories import tiny_lightning_dit
from torch.utils.flop_counter import FlopCounterMode

from hf_fae.training.flops import FlopMeter, matmul_peak


def test_products_forward_and_backward():
    left, right = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    with FlopMeter() as meter:
        (left @ right).sum().backward()
    assert meter.flops == 3 * 2 * 3 * 5 * 7  # one product forward, two backward


def test_a_model_is_counted_as_torch_counts_it():
    model = tiny_lightning_dit()
    inputs = torch.randn(2, model.config.in_channels, 4, 4), torch.rand(2), torch.tensor([0, 1])
    counts = []
    for counter in (FlopMeter(), FlopCounterMode(display=False)):
        with counter:
            model(*inputs).sample.square().mean().backward()
        counts.append(counter.flops if isinstance(counter, FlopMeter) else counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_peak_is_a_rate_of_this_machine_and_cheap(dtype):
    start = time.process_time()
    assert 1e8 < matmul_peak(torch.device("cpu"), dtype) < 1e15
    assert time.process_time() - start < 1  # also where the CPU has no instructions for it
