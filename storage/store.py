"""A directory of a dump, local or remote, with the one guarantee the commit protocol needs:
`create` either makes a whole, durable file that was not there before, or changes nothing.

Remote operations are tried again, with growing pauses, for as long as PATIENCE says. What still
fails, and every local failure, is a StoreError that names the file and what to do.
"""

import contextlib
import errno
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage.errors import StoreError

PATIENCE = float(os.environ.get("MOL_STORE_PATIENCE", 300))  # seconds that a store may be away
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two attempts
FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
ADVICE = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the quota is used up: free some space",
    errno.EROFS: "the file system is read-only: mount it writable, or choose another directory",
    errno.EACCES: "permission denied: make it writable for this user",
    errno.EPERM: "permission denied: make it writable for this user",
    errno.ENOENT: "the directory is gone: was it removed or unmounted under the run? Put it back",
    errno.ENOTDIR: "a file stands where a directory is meant: choose another path",
    errno.EIO: "the disk or the network file system failed: check it",
    errno.ESTALE: "the network file system is gone: mount it again",
}

Result = TypeVar("Result")


class Store:
    """Files under one root; names are relative, with '/' between folders. Picklable, and usable
    in a forked process."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._connect()

    def _connect(self) -> None:
        # Listings must not be remembered: other writers are at work on the same directory.
        options = {"use_listings_cache": False} if "://" in self.path else {}
        try:
            self._fs, root = fsspec.core.url_to_fs(self.path, **options)
        except (ValueError, ImportError) as error:  # unknown protocol, package not installed
            raise StoreError(f"{self.path}: {error}") from None
        self.root = str(root).rstrip("/")
        self.local = isinstance(self._fs, LocalFileSystem)
        self._process = os.getpid()

    @property
    def fs(self) -> Any:
        """The file system; a forked process gets one of its own (s3fs is not fork-safe)."""
        if self._process != os.getpid():
            self._connect()
        return self._fs

    def __truediv__(self, name: str) -> str:
        return f"{self.root}/{name}"

    def attempt(self, doing: str, name: str, work: Callable[[], Result]) -> Result:
        """Do `work`; again and again on a remote store that fails for a time. Raises StoreError,
        or FileNotFoundError and FileExistsError as they are: they are answers."""
        pause, deadline = FIRST_PAUSE, time.monotonic() + PATIENCE
        while True:
            try:
                return work()
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # every library below has kinds of its own
                left = deadline - time.monotonic()
                if self.local or isinstance(error, FINAL) or left <= 0:
                    raise self.failure(doing, name, error) from error
            time.sleep(min(pause * random.uniform(0.5, 1), left))
            pause = min(2 * pause, LONGEST_PAUSE)

    def failure(self, doing: str, name: str, error: Exception) -> StoreError:
        """What went wrong with a file, as a person wants to read it."""
        if self.local:
            advice = ADVICE.get(getattr(error, "errno", None) or 0, str(error))
        elif isinstance(error, PermissionError):
            advice = f"the store refuses ({error}): check credentials and bucket policy"
        else:
            advice = f"the store did not answer for {PATIENCE:.0f} s ({describe(error)})"
        return StoreError(f"cannot {doing} {self.path.rstrip('/')}/{name}: {advice}")

    def read(self, name: str) -> bytes | None:
        """A file's bytes, or None where there is none."""
        try:
            data: bytes = self.attempt("read", name, lambda: self.fs.cat_file(self / name))
        except FileNotFoundError:
            return None
        return data

    def make_root(self) -> None:
        """Make the directory. Nothing else does: one that vanishes under a run stays away."""
        if self.local:
            with self.explaining("make", ""):
                Path(self.root).mkdir(parents=True, exist_ok=True)

    def create(self, name: str, data: bytes) -> bool:
        """Make the file; False where there is one already, which then stays as it is.

        Readers see the whole file or none, and it survives a crash of the machine.
        """
        if self.local:
            with self.explaining("write", name):
                return create_local(self.folder_of(name) / Path(name).name, data)
        try:
            self.attempt("write", name, lambda: self.fs.pipe_file(self / name, data, mode="create"))
        except FileExistsError:
            # Maybe it is ours: the store did as it was told, and its answer was lost on the way.
            return self.read(name) == data
        return True

    def publish(self, local_file: Path, name: str) -> None:
        """Move a finished local file to a name that nobody else uses."""
        if self.local:
            with self.explaining("write", name):
                with local_file.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(local_file, self / name)
                sync_folder(Path(self / name).parent)
            return
        size = local_file.stat().st_size

        def upload() -> None:
            self.fs.put_file(str(local_file), self / name)
            found = self.fs.info(self / name)["size"]
            if found != size:
                raise OSError(f"{found} bytes arrived of {size}")

        self.attempt("upload", name, upload)
        local_file.unlink()

    def folder_of(self, name: str) -> Path:
        """The local folder of a name, made if need be; never the root, see `make_root`."""
        folder = Path(self / name).parent
        if folder != Path(self.root):
            folder.mkdir(exist_ok=True)
        return folder

    def staging_folder(self, name: str) -> Path:
        """A local folder for files to be published under `name`; beside it where that is local."""
        if self.local:
            with self.explaining("write to", name):
                return self.folder_of(f"{name}/file")
        folder = self.remote_staging
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def remote_staging(self) -> Path:
        """Where this machine keeps the open shards of a remote dump."""
        key = hashlib.sha256(self.path.encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"mol-topk-{os.getuid()}-{key}"

    def remove(self, name: str) -> None:
        """Remove the file where there is one."""
        with contextlib.suppress(FileNotFoundError):
            self.attempt("remove", name, lambda: self.fs.rm_file(self / name))

    def files(self) -> dict[str, int]:
        """Every file below the root with its size in bytes."""
        return {name: int(info["size"]) for name, info in self._find().items()}

    def ages(self) -> dict[str, float]:
        """Every file below the root with the seconds since it was last written."""
        now = time.time()
        return {name: now - modified(info) for name, info in self._find().items()}

    def _find(self) -> dict[str, dict[str, Any]]:
        def find() -> dict[str, dict[str, Any]]:
            found: dict[str, dict[str, Any]] = self.fs.find(self.root, detail=True)
            return found

        found = self.attempt("list", "", find)
        return {name[len(self.root) + 1 :]: info for name, info in found.items()}

    @contextlib.contextmanager
    def explaining(self, doing: str, name: str) -> Iterator[None]:
        """Turn an OSError into a StoreError that says what to do."""
        try:
            yield
        except OSError as error:
            raise self.failure(doing, name, error) from error

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return (Store, (self.path,))


def create_local(target: Path, data: bytes) -> bool:
    """Write beside the target, make it durable, and link it: a link never replaces a file."""
    handle, temporary = tempfile.mkstemp(prefix=".creating-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.link(temporary, target)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    sync_folder(target.parent)
    return True


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable: a rename or link is not, before this."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def modified(info: dict[str, Any]) -> float:
    """When a file was last written, in seconds since 1970, as each file system calls it."""
    for key in ("mtime", "LastModified", "last_modified", "updated"):
        value = info.get(key)
        if value is not None:
            return float(value if isinstance(value, int | float) else value.timestamp())
    return time.time()  # unknown: young, so that nothing is done to it


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
