"""The processes of a run: Accelerate as the arguments say, how long one waits for another."""

import contextlib
import os
import re
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend, InitProcessGroupKwargs
from torch import distributed


__all__ = ["PREPARATION", "make_accelerator", "naming_hangs", "set_patience"]

# Other processes wait while one prepares a large data set, measures statistics or saves the result.
PREPARATION = timedelta(hours=6)


def make_accelerator(mixed_precision: str, gradient_accumulation_steps: int = 1, **kwargs) -> Accelerator:
    """An `Accelerator` that does what the arguments say, whatever `accelerate launch` has put into the environment.

    Args:
        mixed_precision, gradient_accumulation_steps, kwargs: as in `Accelerator`.

    Raises:
        ValueError: the environment says something else.
    """
    # `accelerate launch` always sets the precision, by default to "no": that is not a wish.
    launched = (os.environ.get("ACCELERATE_MIXED_PRECISION") or "no").lower()
    if launched not in ("no", mixed_precision):
        raise ValueError(
            f"mixed_precision must be that of accelerate launch (ACCELERATE_MIXED_PRECISION), {launched!r}, got "
            f"{mixed_precision!r}: pass --mixed_precision {launched} to the script, or launch without it"
        )
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=PREPARATION)]
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=gradient_accumulation_steps,
            kwargs_handlers=handlers,
            **kwargs,
        )
    except ValueError as error:
        names = ", ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if "ACCELERATE_" in name)
        raise ValueError(f"the environment ({names or 'without ACCELERATE_*'}) does not suit: {error}") from error
    wanted = {"mixed_precision": mixed_precision, "gradient_accumulation_steps": gradient_accumulation_steps}
    for name, value in wanted.items():
        if (actual := getattr(accelerator, name)) != value:
            raise ValueError(
                f"{name} must be that of the environment (ACCELERATE_{name.upper()}), {actual!r}, got {value!r}"
            )
    backend = accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:
        raise ValueError(
            f"compile must say what is compiled, but accelerate launch asks for the dynamo backend {backend.value!r} "
            "(ACCELERATE_DYNAMO_BACKEND): pass --compile to the script, and launch without it"
        )
    if accelerator.distributed_type.value in ("DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(
            f"accelerate launch must use DDP or FSDP2, got {accelerator.distributed_type.value}: "
            "see docs/guides/training-runs.md"
        )
    return accelerator


def set_patience(patience: timedelta) -> None:
    """From now on a process waits so long for the others; nothing for a single process."""
    if distributed.is_initialized():
        # The oldest supported torch has it under its private name only.
        set_timeout = getattr(distributed, "set_timeout", None) or distributed.distributed_c10d._set_pg_timeout
        set_timeout(patience, distributed.group.WORLD)


@contextlib.contextmanager
def naming_hangs(patience: timedelta):
    """Turn the backends' errors about a process that does not answer into one sentence.

    Raises:
        TimeoutError: another process did not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if distributed.is_initialized() and re.search(r"timed ?out|timeout", str(error), re.IGNORECASE):
            raise TimeoutError(
                f"process {distributed.get_rank()} of {distributed.get_world_size()} waited {patience} for another "
                "one, which hangs or has ended: see its output, or raise process_timeout if its steps take so long"
            ) from error
        raise
