"""How much of the machine a run uses: the multiplications of a step, and what the device could do."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode


__all__ = ["FlopMeter", "matmul_peak"]


class FlopMeter:
    """Counts the floating-point operations of matrix products, convolutions and attention within its context.

    Compiled code runs eagerly there, as only eager operations can be counted.
    """

    def __init__(self):
        self.flops = 0

    def __enter__(self) -> "FlopMeter":
        self._stance = torch.compiler.set_stance("force_eager")
        self._counter = FlopCounterMode(display=False)
        self._stance.__enter__()
        self._counter.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._counter.__exit__(*exception)
        self._stance.__exit__(*exception)
        self.flops = self._counter.get_total_flops()


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product on one device: the best of five, after two to warm up.

    Measured rather than looked up, so that it holds for CPUs and for GPUs of any name; it takes about a tenth of a
    second.
    """
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for repetition in range(7):
        _synchronize(device)
        start = time.perf_counter()
        left @ right
        _synchronize(device)
        if repetition >= 2:
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
