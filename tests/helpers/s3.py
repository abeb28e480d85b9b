"""An S3 server (moto) in a process of its own, and a proxy in front of it that fails on purpose."""

import http.client
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import botocore.config

HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}
FAULTS = ("error before", "error after", "cut before", "cut after", "stall", "trickle")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class MotoServer:
    """`with MotoServer() as server`: an S3 server on loopback at server.port."""

    def __enter__(self) -> "MotoServer":
        self.port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                assert time.monotonic() < deadline, "moto does not start"
                time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
            config=botocore.config.Config(s3={"addressing_style": "path"}),
        )


class FaultyProxy:
    """Forwards requests, but makes a share `rate` of them fail in one of FAULTS, chosen by `seed`.

    With "error before" and "cut before" the server gets no request. With "error after" and "cut
    after" it does the request, and the answer is lost. A stall takes `stall` seconds, which is
    longer than the client waits. While `down` is set, no request gets through. `happened` counts
    the faults, `requests` and `sent` what was asked for, and the bytes of the server's answers.
    """

    def __init__(self, upstream: int, rate: float, seed: int = 0, stall: float = 3.0) -> None:
        self.upstream, self.rate, self.stall = upstream, rate, stall
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.happened: Counter[str] = Counter()
        self.requests = self.sent = 0  # requests, bytes of bodies that were answered
        self.down = False

    def __enter__(self) -> "FaultyProxy":
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                try:
                    proxy.handle(self)
                except (ConnectionError, TimeoutError):
                    self.close_connection = True

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def choose(self) -> str | None:
        with self.lock:
            self.requests += 1
            if self.down:
                return "error before"
            if self.random.random() >= self.rate:
                return None
            fault = self.random.choice(FAULTS)
            self.happened[fault] += 1
            return fault

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        if request.headers.get("Expect") == "100-continue":
            request.send_response_only(100)
            request.end_headers()
        body = read_body(request)
        fault = self.choose()
        if fault in ("error before", "cut before"):
            return self.fail(request, fault)
        if fault == "stall":
            time.sleep(self.stall)
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=30)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP}
        headers = {k: v for k, v in headers.items() if k.lower() != "expect"}
        if body:
            headers["Content-Length"] = str(len(body))
        connection.request(request.command, request.path, body, headers)
        response = connection.getresponse()
        data = response.read()
        with self.lock:
            self.sent += len(data)
        if fault in ("error after", "cut after"):
            return self.fail(request, fault)
        request.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in HOP_BY_HOP:
                request.send_header(name, value)
        length = response.getheader("Content-Length", str(len(data)))
        request.send_header(
            "Content-Length", length if request.command == "HEAD" else str(len(data))
        )
        request.end_headers()
        if fault == "trickle" and len(data) > 100:
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                request.wfile.write(part)
                request.wfile.flush()
                time.sleep(0.3)
        else:
            request.wfile.write(data)

    def fail(self, request: BaseHTTPRequestHandler, fault: str) -> None:
        if fault.startswith("cut"):
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        body = b"<Error><Code>InternalError</Code><Message>planted</Message></Error>"
        request.send_response(500)
        request.send_header("Content-Type", "application/xml")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


def read_body(request: BaseHTTPRequestHandler) -> bytes:
    if "chunked" in request.headers.get("Transfer-Encoding", ""):
        parts = []
        while size := int(request.rfile.readline().split(b";")[0], 16):
            parts.append(request.rfile.read(size))
            request.rfile.readline()
        request.rfile.readline()
        return b"".join(parts)
    return request.rfile.read(int(request.headers.get("Content-Length") or 0))


def environment(port: int) -> dict[str, str]:
    """Environment variables for s3fs and its users to reach a server at `port`."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
