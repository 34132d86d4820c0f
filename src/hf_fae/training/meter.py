"""Means of logged values over an interval, kept on the device; speed and memory of a run."""

import resource
import sys
import time

import torch

from ..objectives.base import Mean


__all__ = ["Meter", "peak_memory"]


class Meter:
    """Means of logged values over an interval of steps; the host synchronises with the device only in `means`."""

    def __init__(self):
        self.start(images_seen=0)

    def start(self, images_seen: int, sums: dict[str, torch.Tensor] | None = None) -> None:
        """Begin a new interval, or continue one with the `sums` (2,) of values and counts up to here."""
        self._sums, self._start, self._images = dict(sums or {}), time.perf_counter(), images_seen
        self._input_seconds = 0.0

    def add(self, name: str, value: torch.Tensor | Mean) -> None:
        """Add a scalar, or a `Mean`; values that are not finite are left out."""
        total, count = value if isinstance(value, Mean) else (value, torch.ones_like(value))
        pair = torch.stack([total.detach().float(), count.detach().float()])
        pair = torch.where(torch.isfinite(pair).all(), pair, 0.0)
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def means(self, reduce) -> dict[str, float | None]:
        """Mean by name over all processes, None if no finite value was added; `reduce(tensor)` sums over processes."""
        return {name: total / count if count else None for name, (total, count) in self.sums(reduce).items()}

    def sums(self, reduce) -> dict[str, list[float]]:
        """Sum and count of the values by name over all processes."""
        if not self._sums:
            return {}
        return dict(zip(self._sums, reduce(torch.stack(list(self._sums.values()))).tolist(), strict=True))

    def speed(self, images_seen: int) -> dict[str, float]:
        """Images per second of all processes, and the share of time spent waiting for data."""
        seconds = time.perf_counter() - self._start
        return {
            "images_per_second": (images_seen - self._images) / seconds,
            "input_wait": self._input_seconds / seconds,
        }

    def waiting_for_data(self):
        """Within this context the loop waits for its next batch."""
        return _Stopwatch(self, "_input_seconds")

    def paused(self):
        """Within this context the clock stops: validation and checkpoints are not training."""
        return _Stopwatch(self, "_start")


class _Stopwatch:
    """Adds the seconds within its context to an attribute."""

    def __init__(self, owner, attribute):
        self.owner, self.attribute = owner, attribute

    def __enter__(self):
        self.entered = time.perf_counter()

    def __exit__(self, *exception):
        seconds = time.perf_counter() - self.entered
        setattr(self.owner, self.attribute, getattr(self.owner, self.attribute) + seconds)


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on its GPU, or resident if it has none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / (2**30 if sys.platform == "darwin" else 2**20)
