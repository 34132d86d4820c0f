"""How much of the machine a run uses: the multiplications of a step, and what the device could do."""

import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


__all__ = ["FlopMeter", "matmul_peak"]


class FlopMeter(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, convolutions and attention within its context.

    Compiled code runs eagerly there, as only eager operations can be counted. torch's own `FlopCounterMode` hooks into
    modules as well, which a forward pass that takes gradients itself (adaptive weights) does not survive.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0
        self._eagerly = torch.compiler.set_stance("force_eager")

    def __enter__(self) -> "FlopMeter":
        self._eagerly.__enter__()
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._eagerly.__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        return result


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
