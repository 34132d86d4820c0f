"""What really went wrong at the Hub, in a sentence that says what to do.

diffusers and transformers turn a refused token, a gated repository, an outage and a missing network into one message
about cached files. The real cause is in the chain of exceptions behind it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


__all__ = ["explain_hub_error", "hub_errors"]

UNREACHABLE = "the Hub cannot be reached: check the network and HF_ENDPOINT, or name a folder instead"
OFFLINE = "it is not in the cache and HF_HUB_OFFLINE forbids downloads: unset it, or run `hf download` first"
STATUS = {
    401: "the Hub refuses the access token: log in again with `hf auth login`, or correct or unset HF_TOKEN",
    403: "the access token lacks the permission: use one that can read this repository (`hf auth login`)",
    404: "the Hub has no such file or repository: check the name",
    429: "the Hub refuses more requests for now: wait some minutes, or log in with `hf auth login`",
}
MISSING = "the Hub has no such repository, or it is private: check the name, and log in with `hf auth login` if it is"
GATED = "the repository is gated: request access on its page at the Hub, then log in with `hf auth login`"
NOWHERE = "there is no such folder, and repositories of the Hub have no such names"
REVISION = "the repository has no such revision: check its name"


@contextlib.contextmanager
def hub_errors(place: str) -> Iterator[None]:
    """Errors of the Hub, with their cause; all others pass.

    Args:
        place: what is loaded.

    Raises:
        OSError: the Hub refuses, fails or does not answer, or `place` is neither a folder nor a repository's name.
    """
    try:
        yield
    except Exception as error:  # each library has its own ways to fail
        cause = explain_hub_error(error)
        if cause is None and not Path(place).exists() and any(isinstance(e, HFValidationError) for e in _chain(error)):
            cause = NOWHERE
        if cause is None:
            raise
        raise OSError(f"{place!r} cannot be loaded: {cause}") from error


def explain_hub_error(error: BaseException) -> str | None:
    """Cause and remedy of an error of the Hub somewhere behind `error`; None where the Hub is not to blame."""
    found = None
    for cause in _chain(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return OFFLINE
        if isinstance(cause, GatedRepoError):
            return GATED
        if isinstance(cause, RepositoryNotFoundError):
            return MISSING
        if isinstance(cause, RevisionNotFoundError):
            return REVISION
        if isinstance(cause, LocalEntryNotFoundError):
            found = found or UNREACHABLE  # unless there is more behind it
        elif isinstance(cause, HfHubHTTPError) and not isinstance(cause, EntryNotFoundError):
            status = cause.response.status_code
            return STATUS.get(status, f"the Hub answers with an error ({status}): try again later")
        elif isinstance(cause, (httpx.TransportError, ConnectionError)):
            return UNREACHABLE
    return found


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those behind it, each once; what it was raised from comes before what was handled meanwhile."""
    seen, waiting = set(), [error]
    while waiting:
        current = waiting.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            yield current
            waiting += [current.__context__, current.__cause__]
