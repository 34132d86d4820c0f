"""What one of several processes does for all of them."""

from collections.abc import Callable


__all__ = ["on_main_process"]


def on_main_process(is_main: bool, call: Callable):
    """Call on the main process; every process gets the result, which must be picklable.

    Raises:
        ValueError: the call raised it; every process raises it, so that none waits for another.
    """
    from accelerate.utils import broadcast_object_list

    result = error = None
    if is_main:
        try:
            result = call()
        except ValueError as problem:
            error = problem
    result, message = broadcast_object_list([result, error and str(error)])
    if error is not None:
        raise error
    if message is not None:
        raise ValueError(message)
    return result
