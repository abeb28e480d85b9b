"""A store or the hub that does not answer is not bad input."""

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest

from pipeline import cli
from pipeline.corpus_cache import local_copy
from pipeline.corpus_files import find_files
from pipeline.errors import FAILED, ConfigError, FailedError
from pipeline.models import directory
from pipeline.outside import failure, is_outside
from tests.helpers.s3 import free_port


class StatusError(OSError):
    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


class OfflineModeIsEnabled(ConnectionError):
    """As the hub's library names it."""


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "outside"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(errno.ENOSPC, "full"), True),
        (OSError(errno.EIO, "We encountered an internal error"), True),
        (OSError(errno.EBUSY, "Reduce your request rate"), True),
        (type("EndpointConnectionError", (type("ConnectionError", (Exception,), {}),), {})(), True),
        (type("ReadTimeout", (type("TimeoutException", (Exception,), {}),), {})(), True),
        (StatusError(503), True),
        (StatusError(429), True),
        (caused(FileNotFoundError("not in the cache"), ConnectionRefusedError()), True),
        (caused(FileNotFoundError("x"), StatusError(404)), False),
        (StatusError(403), False),
        (FileNotFoundError(errno.ENOENT, "x"), False),
        (PermissionError(errno.EACCES, "x"), False),
        (ValueError("Protocol not known"), False),
        (ImportError("Install s3fs"), False),
        (OfflineModeIsEnabled(), False),
        (ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"), False),
    ],
)
def test_what_is_outside(error: Exception, outside: bool) -> None:
    assert is_outside(error) == outside
    assert type(failure("x", error)) is (FailedError if outside else ConfigError)


def test_a_chain_that_bites_its_tail_ends() -> None:
    one, two = ValueError(), ValueError()
    one.__cause__, two.__cause__ = two, one
    assert not is_outside(one)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 that refuses connections, and a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


@contextmanager
def server(status: int, cut: bool = False) -> Iterator[str]:
    """A web server with one answer; with `cut`, half of a body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"x" * (500 if cut else 1000))
            self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{web.server_port}"
    finally:
        web.shutdown()
        web.server_close()


def test_a_store_that_refuses_connections(capsys: pytest.CaptureFixture[str]) -> None:
    """s3fs's own isfile says that there is no such file."""
    for work in (find_files, local_copy):
        with pytest.raises(FailedError, match=r"corpus s3://bucket/a\.jsonl: cannot be "):
            work("s3://bucket/a.jsonl")
    assert cli.main(lambda: {"files": find_files("s3://bucket/data")}, None) == FAILED
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "error"), [(503, FailedError), (404, ConfigError)])
def test_a_web_server_by_its_status(status: int, error: type[Exception]) -> None:
    with server(status) as url:
        for work in (find_files, local_copy):
            with pytest.raises(error, match=r"a\.jsonl"):
                work(f"{url}/a.jsonl")


def test_a_copy_that_is_cut_is_tried_again() -> None:
    with server(200, cut=True) as url, pytest.raises(FailedError, match="cannot be copied"):
        local_copy(f"{url}/a.jsonl")


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: Exception) -> Any:
        def download(*_: Any, **__: Any) -> None:
            raise caused(FileNotFoundError("Cannot find a cached snapshot"), error)

        return download

    monkeypatch.setattr(directory.huggingface_hub, "snapshot_download", fails(TimeoutError()))
    with pytest.raises(FailedError, match="the hub did not answer"):
        directory.ModelFolder.find("a/b")
    offline = fails(OfflineModeIsEnabled())
    monkeypatch.setattr(directory.huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConfigError, match="the hub does not have it"):
        directory.ModelFolder.find("a/b")


@pytest.mark.parametrize(
    ("error", "code"), [(OSError(errno.ENOSPC, "No space left"), FAILED), (KeyError("x"), None)]
)
def test_a_full_disk_ends_a_script_with_a_message(
    error: Exception, code: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> dict[str, Any]:
        raise error

    if code is None:
        with pytest.raises(KeyError):
            cli.main(work, None)
    else:
        assert cli.main(work, None) == code
        assert "No space left; run the same command again" in capsys.readouterr().err
