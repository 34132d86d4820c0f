"""Reading from an unreliable network or disk: transient errors are retried, broken files are skipped."""

import asyncio
import errno
import itertools
import logging
import lzma
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator


__all__ = ["read_rows", "wait_before_retry"]

logger = logging.getLogger(__name__)

WAITS = (1, 5, 25)  # seconds before the second, third and fourth attempt
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
FINAL_ERRNOS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)  # no path, and never will be one
# `datasets` raises the last two on JSON of another form than that of the first rows.
BROKEN = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, AttributeError, TypeError)
NETWORK_LIBRARIES = ("aiohttp", "botocore", "httpx", "requests")  # not all of their errors are OSErrors


def wait_before_retry(error: Exception, failures: int) -> None:
    """Wait after a transient error; raise any other, or one that came too often.

    Args:
        failures: consecutive errors before this one.
    """
    library = type(error).__module__.split(".")[0]
    transient = isinstance(error, (OSError, asyncio.TimeoutError)) or library in NETWORK_LIBRARIES
    is_final = isinstance(error, OSError) and error.errno in FINAL_ERRNOS
    if not transient or isinstance(error, FINAL) or is_final or failures >= len(WAITS):
        raise error
    logger.warning("retrying in %d s: %s: %s", WAITS[failures], type(error).__name__, error)
    time.sleep(WAITS[failures])


def read_rows(rows, broken: Callable[[int], object]) -> Iterator[tuple[int, dict]]:
    """(number, row) of an `IterableDataset`, usually one shard.

    After a transient error the rows are reopened and those already read are skipped. Where the file itself is broken,
    such as a tar or parquet file that ends too early, the rows end: `broken` is called with the number of the row
    that could not be read.
    """
    number = failures = 0
    while True:
        try:
            # `iter` rather than `__iter__`: the latter would split the rows among the workers of a loader. One by one,
            # since `datasets` 4 cannot batch rows of a WebDataset if some lack a file.
            for columns in itertools.islice(rows.iter(batch_size=1), number, None):
                yield number, {name: values[0] for name, values in columns.items()}
                number, failures = number + 1, 0
            return
        except Exception as error:
            if _is_broken(error):
                logger.warning("a shard ends early at row %d: %s: %s", number, type(error).__name__, error)
                broken(number)
                return
            wait_before_retry(error, failures)
            failures += 1


def _is_broken(error):
    # pyarrow's errors are ValueErrors, or bare OSErrors without a number, which no system call raises.
    return isinstance(error, BROKEN) or (type(error) is OSError and error.errno is None)
