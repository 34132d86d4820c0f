"""Seconds of a job, which the benchmarks share."""

import time
from collections.abc import Callable

import torch


__all__ = ["timed"]


def timed(job: Callable[[], object], device: str, *, cpu_clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that a job takes; on a GPU its kernels have finished before and after.

    Args:
        cpu_clock: on a CPU, `time.process_time` counts the work of its threads, whatever else the machine does.
    """
    is_gpu = device.startswith("cuda")
    clock = time.perf_counter if is_gpu else cpu_clock
    if is_gpu:
        torch.cuda.synchronize()
    start = clock()
    job()
    if is_gpu:
        torch.cuda.synchronize()
    return clock() - start
