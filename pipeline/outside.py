"""Which errors have an outside reason: the same command may succeed later, with nothing changed.

Outside: a connection that is refused, cut or too slow; a server that answers 5xx, 408, 425 or 429;
a disk that is full or fails. Not outside: what does not exist, is not allowed, is not installed, or
cannot be read, and the hub while HF_HUB_OFFLINE is set. storage/store.py has a rule of its own: any
failure of a dump's store is a StoreError, after minutes of retries.
"""

import errno
from collections.abc import Iterator

from pipeline.errors import ConfigError, FailedError

TRANSPORT = frozenset(
    """
    ConnectionError TimeoutError TransportError NetworkError TimeoutException Timeout
    ClientConnectionError ClientPayloadError ServerTimeoutError ConnectTimeoutError ReadTimeoutError
    HTTPClientError ChunkedEncodingError ProtocolError IncompleteRead IncompleteReadError
    XetDownloadError gaierror
    """.split()  # noqa: SIM905
)
"""Names that Python, httpx, requests, aiohttp, urllib3, botocore and hf-xet give such errors. By
name, since a file system is known only when a path asks for it."""
NUMBERS = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EBUSY, errno.EAGAIN, errno.EMFILE,
    errno.ENFILE, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE,
}  # fmt: skip
STATUSES = {408, 425, 429}
OFFLINE = "OfflineModeIsEnabled"


def failure(message: str, error: BaseException) -> ConfigError | FailedError:
    """The error to raise: FailedError where the reason is outside, ConfigError otherwise."""
    return FailedError(message) if is_outside(error) else ConfigError(message)


def is_outside(error: BaseException) -> bool:
    """Whether the error, or one that it was raised from, has an outside reason."""
    found = list(chain(error))
    if any(OFFLINE in f"{type(each).__name__} {each}" for each in found):
        return False
    return any(map(is_transport, found))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def is_transport(error: BaseException) -> bool:
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in STATUSES
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & TRANSPORT) or getattr(error, "errno", None) in NUMBERS


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error stands for, by the names of httpx, requests and aiohttp."""
    found = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", None))
    return found if isinstance(found, int) and found >= 100 else None
