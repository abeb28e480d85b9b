"""Rows that a dump holds twice, found in flat memory: the keys of all rows are sorted on disk.

A key is a hash of document and chunk. Keys are spread over files by their first byte, so that each
file is small enough to be sorted in memory: 24 bytes a row in all, a 256th of them at a time.
"""

import contextlib
import hashlib
import tempfile

import numpy as np
import numpy.typing as npt

FILES, HASH_BYTES = 256, 16
KEY = np.dtype([("hash", f"S{HASH_BYTES}"), ("shard", "<u4"), ("row", "<u4")])
Keys = npt.NDArray[np.void]


def key_of(doc_id: str, chunk: int) -> bytes:
    """The key of a row, HASH_BYTES long."""
    return hashlib.blake2b(f"{chunk} {doc_id}".encode(), digest_size=HASH_BYTES).digest()


class RowKeys(contextlib.ExitStack):
    """The keys of rows, in temporary files while it is open.

        with RowKeys() as keys:
            keys.add(0, b"".join(key_of(row.doc_id, row.chunk) for row in shard))
            keys.repeated()

    Raises OSError where the folder for temporary files (TMPDIR) is full.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files = [tempfile.TemporaryFile() for _ in range(FILES)]  # noqa: SIM115
        for file in self.files:
            self.enter_context(file)

    def add(self, shard: int, keys: bytes) -> None:
        """The keys of the rows of a shard, from its first one on, joined."""
        hashes = np.frombuffer(keys, np.uint8).reshape(-1, HASH_BYTES)
        found = np.zeros(len(hashes), KEY)
        found["hash"] = hashes.view(KEY["hash"])[:, 0] if len(hashes) else b""
        found["shard"], found["row"] = shard, np.arange(len(hashes))
        file_of = hashes[:, 0]
        order = np.argsort(file_of, kind="stable")
        ends = np.cumsum(np.bincount(file_of, minlength=FILES)).tolist()
        for file, start, end in zip(self.files, [0, *ends], ends, strict=False):
            if start < end:
                file.write(found[order[start:end]].tobytes())

    def repeated(self) -> dict[int, tuple[int, int]]:
        """For each shard with a row that came before: the first such row, and the shard before.

        Rows of a shard behind that one do not count, as a reader that stops there would not see
        them.
        """
        many = [repeated_in(file.read()) for file in self.files if not file.seek(0)]
        rows = np.concatenate(many)
        first: dict[bytes, int] = {}
        found: dict[int, tuple[int, int]] = {}
        for key, shard, row in rows[np.lexsort((rows["row"], rows["shard"]))].tolist():
            if shard not in found:
                if key in first:
                    found[shard] = row, first[key]
                else:
                    first[key] = shard
        return found


def repeated_in(data: bytes) -> Keys:
    """The keys that are in a file twice or more, with all their places."""
    keys = np.frombuffer(data, KEY)
    keys = keys[np.argsort(keys["hash"])]
    same = np.zeros(len(keys) + 1, np.bool_)  # [i]: keys i - 1 and i are the same
    same[1:-1] = keys["hash"][1:] == keys["hash"][:-1]
    return keys[same[1:] | same[:-1]]
