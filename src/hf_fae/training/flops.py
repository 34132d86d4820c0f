"""Utilisation: the floating-point operations of a training step, and the speed that the device could reach."""

import time

import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..utils.randomness import ImageRandom
from .arguments import LoopArguments
from .optimization import Optimization


__all__ = ["FlopMeter", "FlopShare", "matmul_peak"]

# Of measuring the peak: after how much computing and waiting to stop, and how many products there are of each size.
CPU_SECONDS, SECONDS, REPETITIONS = 0.2, 2.0, 7


class FlopMeter(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, convolutions and attention within its context.

    Compiled code runs eagerly there, as only eager operations can be counted. torch's own `FlopCounterMode` also hooks
    into modules, which fails for a forward pass that computes gradients itself (adaptive weights).
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


class FlopShare:
    """The share of the devices' peak speed at which a run trains.

    Args:
        accelerator, optimization, args: of the run.
    """

    def __init__(self, accelerator: Accelerator, optimization: Optimization, args: LoopArguments):
        self.accelerator, self.optimization, self.args = accelerator, optimization, args
        self.flops_per_image = self.peak = None

    def count(self, batch: dict, random: ImageRandom) -> None:
        """Count the operations of forward and backward passes for the single image of a batch, without side effects.

        Results under the counter differ in the last bit, so it cannot be a pass of the training itself. Operations
        that gradient checkpointing repeats do not count.
        """
        module, device = self.optimization.module, self.accelerator.device
        if self.args.gradient_checkpointing:
            module.model.disable_gradient_checkpointing()
        buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        with torch.random.fork_rng([device] if device.type == "cuda" else []), FlopMeter() as meter:
            self.accelerator.backward(self.optimization.objective(batch, random)["loss"])
        self.optimization.optimizer.optimizer.zero_grad()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        if self.args.gradient_checkpointing:
            module.model.enable_gradient_checkpointing()
        self.flops_per_image = meter.flops
        if self.peak is None:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.args.mixed_precision, torch.float32)
            self.peak = matmul_peak(device, dtype) * self.accelerator.num_processes

    def at(self, images_per_second: float) -> float:
        """The share at a speed of all processes."""
        return self.flops_per_image * images_per_second / self.peak


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product on one device: the best of those in 0.2 CPU seconds.

    Measured rather than looked up, so that it holds for CPUs and for GPUs of any name. A CPU without instructions for
    `dtype` takes seconds for a large product: the sizes grow as long as there is time. The first product, which starts
    threads and loads libraries, does not count, nor does the time for which other programs have the cores.
    """
    sizes = (8192,) if device.type == "cuda" else (128, 256, 512, 1024)
    first = torch.ones(sizes[0], sizes[0], device=device, dtype=dtype)
    first @ first
    _synchronize(device)
    best, end, cpu_end = 0.0, time.perf_counter() + SECONDS, time.process_time() + CPU_SECONDS
    for size in sizes:
        left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(REPETITIONS):
            _synchronize(device)
            start = time.perf_counter()
            left @ right
            _synchronize(device)
            now = time.perf_counter()
            best = max(best, 2 * size**3 / (now - start))
            if now > end or time.process_time() > cpu_end:
                return best
    return best


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
