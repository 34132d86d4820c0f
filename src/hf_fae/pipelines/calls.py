"""One call of a pipeline, apart from all others: several threads can share a pipeline and its weights."""

import copy
import functools
from collections.abc import Callable

from diffusers import DiffusionPipeline


__all__ = ["SeparateCalls", "separate_call"]


class SeparateCalls(DiffusionPipeline):
    """Base of a pipeline whose calls have their own state: `__call__` is decorated with `separate_call`.

    A call runs on a shallow copy of the pipeline, with the same models and a copy of the scheduler. A callback gets
    this copy: its `scheduler`, `guidance`, `num_timesteps` and `_interrupt` are those of the call alone. On the
    pipeline itself `guidance` and `num_timesteps` are those of the latest call, and `_interrupt = True` stops all
    calls that are running.
    """

    _origin, _is_stopped = None, False

    def init_calls(self) -> None:
        """To be called by `__init__`."""
        self._running = set()

    @property
    def interrupt(self) -> bool:
        """Whether the call is to stop: set `pipe._interrupt = True` in a callback; the latents so far are decoded."""
        return self._is_stopped

    @property
    def _interrupt(self) -> bool:
        return self._is_stopped

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._is_stopped = value
        for call in list(self._running):
            call._is_stopped = value

    @property
    def num_timesteps(self) -> int:
        """Steps of the current or latest call."""
        return self._num_timesteps

    def record(self, **state) -> None:
        """Set attributes that a call is known by, here and on the pipeline that it is a call of."""
        for pipe in filter(None, (self, self._origin)):
            vars(pipe).update(state)


def separate_call(function: Callable) -> Callable:
    """Decorates `__call__` of [`SeparateCalls`]."""

    @functools.wraps(function)
    def call(self, *args, **kwargs):
        run = copy.copy(self)
        state = {"_origin": self, "_running": set(), "_is_stopped": False}
        if getattr(self, "scheduler", None) is not None:
            state["scheduler"] = copy.deepcopy(self.scheduler)
        vars(run).update(state)
        self._running.add(run)
        try:
            output = function(run, *args, **kwargs)
        finally:
            self._running.discard(run)
        self.maybe_free_model_hooks()
        return output

    return call
