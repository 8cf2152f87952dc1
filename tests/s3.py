"""A real S3 API on this machine (moto's server), optionally one that fails on purpose."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from s3fs import S3FileSystem
from werkzeug.serving import make_server

_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


class Faults:
    """WSGI middleware that answers every n-th request with an error instead of passing it on; 0 passes all."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app, self.every, self.status, self.hits = app, 0, "503 Slow Down", 0
        self._count = itertools.count(1)
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            fail = bool(self.every) and next(self._count) % self.every == 0
            self.hits += fail
        if not fail:
            return self.app(environ, start_response)
        code = self.status.partition(" ")[2].replace(" ", "")
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        start_response(self.status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]


@contextmanager
def s3_server(bucket: str = "pinakes-test") -> Iterator[tuple[str, Faults]]:
    """Run the server, point the environment at it, make the bucket; give (root URL, fault switch)."""
    from moto.server import DomainDispatcherApplication, create_backend_app

    faults = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faults, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    changed = {**_CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
    before = {key: os.environ.get(key) for key in changed}
    os.environ.update(changed)
    S3FileSystem.clear_instance_cache()  # an earlier server's instances would still ask at its port
    try:
        boto3.client("s3").create_bucket(Bucket=bucket)
        yield f"s3://{bucket}", faults
    finally:
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)
        server.shutdown()
        thread.join()
        server.server_close()
