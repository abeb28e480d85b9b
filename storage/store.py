"""A directory of a dump, local or remote, with the one guarantee the commit protocol needs:
`create` either makes a whole, durable file that was not there before, or changes nothing."""

import os
import tempfile
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage.errors import StorageError


class Store:
    """Files under one root; names are relative, with '/' between folders. Picklable."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.fs, root = fsspec.core.url_to_fs(self.path)
        self.root = str(root).rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)

    def __truediv__(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes | None:
        """A file's bytes, or None where there is none."""
        try:
            data: bytes = self.fs.cat_file(self / name)
        except FileNotFoundError:
            return None
        return data

    def create(self, name: str, data: bytes) -> bool:
        """Make the file; False where there is one already, which then stays as it is.

        Readers see the whole file or none, and it survives a crash of the machine.
        """
        if not self.local:
            try:
                self.fs.pipe_file(self / name, data, mode="create")
            except FileExistsError:
                return False
            return True
        target = Path(self / name)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".creating-", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.link(temporary, target)  # unlike rename, refuses to replace
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)
        sync_folder(target.parent)
        return True

    def publish(self, local_file: Path, name: str) -> None:
        """Move a finished local file to a name that nobody else uses."""
        if not self.local:
            self.fs.put_file(str(local_file), self / name)
            local_file.unlink()
            return
        with local_file.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(local_file, self / name)
        sync_folder(Path(self / name).parent)

    def staging_folder(self, name: str) -> Path:
        """A local folder for files to be published under `name`; beside it where that is local."""
        if not self.local:
            return Path(tempfile.gettempdir())
        folder = Path(self / name)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def remove(self, name: str) -> None:
        if self.fs.exists(self / name):
            self.fs.rm_file(self / name)

    def files(self) -> dict[str, int]:
        """Every file below the root with its size in bytes."""
        self.fs.invalidate_cache()
        found = self.fs.find(self.root, detail=True)
        return {name[len(self.root) + 1 :]: int(info["size"]) for name, info in found.items()}

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return (Store, (self.path,))


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable: a rename or link is not, before this."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        raise StorageError(f"{folder}: fsync failed: {error}") from error
    finally:
        os.close(handle)
