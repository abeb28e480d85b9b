"""The files of a dump, local or remote.

The commit protocol needs one guarantee: `create` either makes a whole, durable file that did not
exist before, or changes nothing.

A remote operation that fails is retried, with growing pauses, for PATIENCE seconds. If it still
fails, or if a local operation fails, a StoreError names the file and says what to do.
"""

import contextlib
import ctypes
import errno
import hashlib
import math
import mmap
import os
import random
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage.errors import CorruptShard, StorageError, StoreError

PATIENCE = float(
    os.environ.get("MOL_STORE_PATIENCE", 300)
)  # seconds of retries while a remote store fails
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two attempts
AT_ONCE = 32  # requests of a bulk read
BATCH = 1024  # files of a bulk read that are asked for before their answers are looked at
FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
ADVICE = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the quota is used up: free some space",
    errno.EROFS: "the file system is read-only: mount it writable, or choose another directory",
    errno.EACCES: "permission denied: make it writable for this user",
    errno.EPERM: "permission denied: make it writable for this user",
    errno.ENOENT: "the directory is gone: was it removed or unmounted during the run? Restore it",
    errno.ENOTDIR: "a file exists where a directory is expected: choose another path",
    errno.EOPNOTSUPP: "the file system has no hard links and cannot rename without replacing; the "
    "commit protocol needs one of the two: choose a directory on another file system",
    errno.EIO: "the disk or the network file system failed: check it",
    errno.ESTALE: "the network file system is gone: mount it again",
}

# What os.link raises where the file system has none; a folder that is not writable fails before.
NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV}

Result = TypeVar("Result")


def cache_folder() -> str | None:
    """MOL_CACHE: where this machine keeps what it read from remote stores; None without it."""
    return os.environ.get("MOL_CACHE") or None


class Entry(NamedTuple):
    """A file below the root: its bytes, seconds since it was last written, whether it is a link."""

    bytes: int
    age: float
    link: bool


class Store:
    """Files under one root; names are relative, with '/' between folders.

    A Store can be pickled and used in forked processes. Its methods raise StoreError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._connect()

    def _connect(self) -> None:
        # Do not cache listings: other writers change the same directory.
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
        """The file system. A forked process gets its own, because s3fs is not fork-safe."""
        if self._process != os.getpid():
            self._connect()
        return self._fs

    def __truediv__(self, name: str) -> str:
        return f"{self.root}/{name}"

    def attempt(self, doing: str, name: str, work: Callable[[], Result]) -> Result:
        """Do `work`; retry it while a remote store fails.

        Raises StoreError. FileNotFoundError, FileExistsError and errors of this package are
        answers and pass unchanged.
        """
        pause, deadline = FIRST_PAUSE, time.monotonic() + PATIENCE
        while True:
            try:
                return work()
            except (FileNotFoundError, FileExistsError, StorageError):
                raise
            except Exception as error:  # every file system library raises its own types
                left = deadline - time.monotonic()
                if self.local or isinstance(error, FINAL) or is_full(error) or left <= 0:
                    raise self.failure(doing, name, error) from error
            time.sleep(min(pause * random.uniform(0.5, 1), left))
            pause = min(2 * pause, LONGEST_PAUSE)

    def failure(self, doing: str, name: str, error: Exception) -> StoreError:
        """The StoreError for a failed operation: the file, and what to do."""
        if self.local:
            advice = ADVICE.get(getattr(error, "errno", None) or 0, str(error))
        elif is_full(error):
            advice = f"the disk of this machine is full ({error}): free some space, also in TMPDIR"
        elif isinstance(error, PermissionError):
            advice = f"the store denies access ({error}): check credentials and bucket policy"
        else:
            advice = f"the store did not answer for {PATIENCE:.0f} s ({describe(error)})"
        return StoreError(f"cannot {doing} {self.path.rstrip('/')}/{name}: {advice}")

    def read(self, name: str, most: int | None = None) -> bytes | None:
        """A file's bytes, or None if it does not exist.

        `most` is for small files: one request is made, without asking for the size first. Raises
        CorruptShard for a file of more than `most` bytes, and for a local one that is not a regular
        file.
        """
        try:
            if self.local and os.path.getsize(self.regular(name)) > (most or math.inf):
                raise too_large(name, most)
            data = self.attempt("read", name, lambda: self._bytes(name, most))
        except FileNotFoundError:
            return None
        return checked(name, data, most)

    def _bytes(self, name: str, most: int | None) -> bytes:
        if self.local or most is None:
            return bytes(self.fs.cat_file(self / name))
        try:
            return bytes(self.fs.cat_file(self / name, start=0, end=most + 1))
        except FileNotFoundError:
            raise
        except Exception:
            if self.fs.info(self / name)["size"] == 0:  # an empty file has no range
                return b""
            raise

    def read_many(self, names: Iterable[str], most: int) -> dict[str, bytes | None]:
        """As `read`, of many small files, by name. AT_ONCE requests to a remote store run at a
        time; those that fail are repeated one by one."""
        found: dict[str, bytes | None] = {}
        wanted = list(names)
        for start in range(0, len(wanted), BATCH):
            batch = wanted[start : start + BATCH]
            answers: dict[str, Any] = (
                dict.fromkeys(batch) if self.local else self._answers(batch, most)
            )
            for name, answer in answers.items():
                if isinstance(answer, FileNotFoundError):
                    found[name] = None
                elif isinstance(answer, bytes):
                    found[name] = checked(name, answer, most)
                else:
                    found[name] = self.read(name, most)
        return found

    def _answers(self, names: Sequence[str], most: int) -> dict[str, Any]:
        """What a remote store answers at first: the bytes of each file, or an exception."""
        options = {"batch_size": AT_ONCE} if self.fs.async_impl else {}
        paths = [self / name for name in names]
        answers = self.fs.cat_ranges(paths, 0, most + 1, on_error="return", **options)
        return dict(zip(names, answers, strict=True))

    def fetched(self, name: str) -> bytes | mmap.mmap:
        """A remote file of any size, mapped: it takes disk in TMPDIR while it is used, not memory.

        Raises FileNotFoundError.
        """
        with tempfile.TemporaryDirectory(prefix="mol-fetched-") as folder:
            own = os.path.join(folder, "file")
            self.attempt("read", name, lambda: self.fs.get_file(self / name, own))
            with self.explaining("read", name):
                return mapped(own)

    def names(self, prefix: str = "") -> list[str]:
        """The names of all files that begin with `prefix`, such as "00003/000", sorted.

        One listing, which a remote store answers in pages, S3 in pages of 1,000 files. A local
        folder is listed, too: one that has the name of a file is noticed when it is read.
        """
        folder, _, start = prefix.rpartition("/")
        top = self / folder if folder else self.root
        if self.local:
            with self.explaining("list", folder):
                found = list(below(top)) if not folder or os.path.isdir(top) else []
        else:
            options = {"prefix": start} if start else {}
            found = self.attempt("list", folder, lambda: list(self.fs.find(top, **options)))
        return sorted(name for path in found if (name := self.below(path)).startswith(prefix))

    def below(self, path: str) -> str:
        """The name of a file whose path begins with the root."""
        return path[len(self.root) + 1 :].replace(os.sep, "/")

    def exists(self, name: str) -> bool:
        """Whether a file of this name exists."""
        found: bool = self.attempt("read", name, lambda: self.fs.exists(self / name))
        return found

    def regular(self, name: str) -> str:
        """The local path of a file that may be opened.

        Raises FileNotFoundError if there is none, CorruptShard for a pipe, a device or a folder,
        and for a link that leaves the directory. Links of the Hugging Face cache, from its
        `snapshots` to its `blobs`, are allowed.
        """
        path = self / name
        if self.without_links(name):
            return path
        with self.explaining("read", name, but=FileNotFoundError):
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise CorruptShard(f"{name}: expected a regular file, found something else")
        real, roots = os.path.realpath(path), [os.path.realpath(self.root)]
        snapshots = Path(roots[0]).parent
        if snapshots.name == "snapshots":
            roots.append(str(snapshots.parent / "blobs"))
        if not any(Path(real).is_relative_to(root) for root in roots):
            raise CorruptShard(
                f"{name}: a link to {real}, outside the dump: copy the file to where the link is"
            )
        return path

    def without_links(self, name: str) -> bool:
        """Whether it is a regular file, and neither it nor a folder below the root is a link."""
        path, parts = self.root, name.split("/")
        try:
            for part in parts[:-1]:
                path = os.path.join(path, part)
                if part == ".." or not stat.S_ISDIR(os.lstat(path).st_mode):
                    return False
            return stat.S_ISREG(os.lstat(os.path.join(path, parts[-1])).st_mode)
        except OSError:
            return False  # `regular` says why

    def make_root(self) -> None:
        """Make the directory. Only this does: one that is removed during a run stays removed."""
        if self.local:
            with self.explaining("make", ""):
                Path(self.root).mkdir(parents=True, exist_ok=True)

    def create(self, name: str, data: bytes) -> bool:
        """Create a file. Returns False, and changes nothing, if it exists already.

        Readers see the whole file or none. The file survives a crash of the machine.
        """
        if self.local:
            with self.explaining("write", name):
                return create_local(self.folder_of(name) / Path(name).name, data)
        try:
            self.attempt("write", name, lambda: self.fs.pipe_file(self / name, data, mode="create"))
        except FileExistsError:
            # It may be ours: the store created it, but its answer was lost.
            return self.read(name) == data
        return True

    def publish(self, local_file: Path, name: str) -> None:
        """Move a finished local file to a name that no other writer uses."""
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
                raise OSError(f"{size} bytes expected, {found} arrived")

        self.attempt("upload", name, upload)
        local_file.unlink()

    def folder_of(self, name: str) -> Path:
        """The local folder of a name, made if needed; never makes the root, see `make_root`."""
        folder = Path(self / name).parent
        if folder != Path(self.root):
            folder.mkdir(exist_ok=True)
        return folder

    def staging_folder(self, name: str) -> Path:
        """A local folder for files that will be published in folder `name`."""
        if self.local:
            with self.explaining("write to", name):
                return self.folder_of(f"{name}/file")
        folder = self.remote_staging
        with self.explaining("write to", str(folder)):
            folder.mkdir(mode=0o700, exist_ok=True)
        if not is_own_folder(folder):
            raise StoreError(
                f"cannot write to {folder}: it is a link or belongs to another user; remove it, or "
                "set TMPDIR to another folder"
            )
        return folder

    @property
    def remote_staging(self) -> Path:
        """The folder on this machine for open shards of a remote dump."""
        key = hashlib.sha256(self.path.encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"mol-topk-{os.getuid()}-{key}"

    def remove(self, name: str) -> None:
        """Remove a file; no error if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            self.attempt("remove", name, lambda: self.fs.rm_file(self / name))

    def entries(self) -> dict[str, Entry]:
        """Every file below the root. Linked folders are not entered."""
        if self.local:
            with self.explaining("list", ""):
                return dict(walk(self.root))

        def find() -> dict[str, dict[str, Any]]:
            found: dict[str, dict[str, Any]] = self.fs.find(self.root, detail=True)
            return found

        now = time.time()
        return {
            self.below(name): Entry(int(info["size"]), now - modified(info), False)
            for name, info in self.attempt("list", "", find).items()
        }

    def top(self) -> dict[str, Entry]:
        """Every file that lies in the root itself. One listing, however many folders there are."""
        if self.local:
            with self.explaining("list", ""):
                return dict(files_of(self.root, os.listdir(self.root)))

        def found() -> list[dict[str, Any]]:
            listed: list[dict[str, Any]] = self.fs.ls(self.root, detail=True)
            return [info for info in listed if info["type"] == "file"]

        now = time.time()
        return {
            info["name"].rsplit("/", 1)[1]: Entry(int(info["size"]), now - modified(info), False)
            for info in self.attempt("list", "", found)
        }

    @contextlib.contextmanager
    def explaining(
        self, doing: str, name: str, but: type[Exception] | tuple[()] = ()
    ) -> Iterator[None]:
        """Turn an OSError into a StoreError that says what to do; `but` passes unchanged."""
        try:
            yield
        except but:
            raise
        except OSError as error:
            raise self.failure(doing, name, error) from error

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return (Store, (self.path,))


def too_large(name: str, most: int | None) -> CorruptShard:
    return CorruptShard(f"{name}: expected at most {most:,} bytes, found more: not ours")


def checked(name: str, data: bytes, most: int | None) -> bytes:
    """The bytes of a file. Raises CorruptShard for more than `most`."""
    if most is not None and len(data) > most:
        raise too_large(name, most)
    return data


def mapped(path: str | os.PathLike[str]) -> bytes | mmap.mmap:
    """The bytes of a local file. Raises OSError."""
    with open(path, "rb") as file:
        empty = os.fstat(file.fileno()).st_size == 0
        return b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def below(folder: str) -> Iterator[str]:
    """The path of all that is below a local folder. Linked folders are not entered."""
    for top, folders, names in os.walk(folder, onerror=throw):
        yield from (os.path.join(top, name) for name in (*folders, *names))


def walk(root: str) -> Iterator[tuple[str, Entry]]:
    """(name, Entry) of each regular file below a local folder, and of each link to one."""
    for folder, _, names in os.walk(root, onerror=throw):
        for name, entry in files_of(folder, names):
            path = os.path.join(folder, name)
            yield os.path.relpath(path, root).replace(os.sep, "/"), entry


def files_of(folder: str, names: list[str]) -> Iterator[tuple[str, Entry]]:
    """(name, Entry) of those of a folder's names that are regular files, or links to one."""
    now = time.time()
    for name in names:
        path = os.path.join(folder, name)
        with contextlib.suppress(FileNotFoundError):  # removed since, or a link to nothing
            link, status = os.path.islink(path), os.stat(path)
            if stat.S_ISREG(status.st_mode):
                yield name, Entry(status.st_size, now - status.st_mtime, link)


def is_own_folder(folder: Path) -> bool:
    """Whether it is a folder of this user, not a link to one: anyone can write to /tmp."""
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(folder)
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return False


def throw(error: OSError) -> None:
    raise error


def create_local(target: Path, data: bytes) -> bool:
    """Write a durable file next to the target and link it: a link never replaces a file.

    Without hard links (exFAT, some network and FUSE file systems) it is renamed, also without
    replacing a file. Raises OSError with EOPNOTSUPP where the file system can do neither.
    """
    handle, temporary = tempfile.mkstemp(prefix=".creating-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        try:
            os.link(temporary, target)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            rename_new(temporary, target)
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):  # renamed
            os.unlink(temporary)
    sync_folder(target.parent)
    return True


def rename_new(source: str, target: Path) -> None:
    """Rename a file; FileExistsError if the target exists (Linux: renameat2, RENAME_NOREPLACE)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, no_replace = -100, 1
    if rename and not rename(at_cwd, os.fsencode(source), at_cwd, os.fsencode(target), no_replace):
        return
    number = ctypes.get_errno() if rename else errno.ENOSYS
    if number in {errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP}:
        number = errno.EOPNOTSUPP
    raise OSError(number, os.strerror(number), str(target))


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable; without this a rename or link is not."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def modified(info: dict[str, Any]) -> float:
    """When a file was last written, in seconds since 1970; the key differs by file system."""
    for key in ("mtime", "LastModified", "last_modified", "updated"):
        value = info.get(key)
        if value is not None:
            return float(value if isinstance(value, int | float) else value.timestamp())
    return time.time()  # unknown: treat it as new, so that gc keeps it


def is_full(error: Exception) -> bool:
    """Whether a local disk is full, such as that of TMPDIR."""
    return getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT}


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
