"""The servers of the serving benchmark as processes: started, waited for, looked into, killed in parts, ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from cluster.jobs import free_port
from tests.bench.common import PINAKES
from tests.bench.serve_data import Corpus

_READY_SECONDS = 240.0
_END_SECONDS = 90.0
_SAMPLE_SECONDS = 0.5
_QUIET = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "RAY_AUTH_MODE": "disabled"}
_ROLES = {"Gateway": "gateway", "shard-": "shard", "Reranker": "reranker", "ProxyActor": "proxy", "haproxy": "proxy"}
"""What a process of our server does, by a word of its title."""


class Server:
    """A server process and all its children, from `with` on; `address` answers by then."""

    def __init__(self, command: Sequence[str], port: int, folder: Path) -> None:
        self.command, self.address = list(command), f"http://127.0.0.1:{port}"
        self.log = folder / f"server-{port}.log"

    def __enter__(self) -> Server:
        started = time.monotonic()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command, env=os.environ | _QUIET, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._tree = psutil.Process(self._process.pid)
        try:
            self._wait_until_ready(started + _READY_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        self.startup_seconds = time.monotonic() - started
        return self

    def __exit__(self, *_: object) -> None:
        """End the process as Ctrl-C does; what of its tree is left after that is killed."""
        members = self.members()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        for member in psutil.wait_procs(members, timeout=5)[1]:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue

    def _wait_until_ready(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.address}/ready", timeout=5) as response:
                    if response.status == 200:
                        return
            except OSError:
                time.sleep(0.25)
        sys.exit(f"{' '.join(self.command)} was never ready:\n{self.log.read_text(errors='replace')[-3000:]}")

    def call(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """Return the decoded JSON of one request. Raises OSError when it is refused."""
        data = None if body is None else json.dumps(body).encode()
        told = {"Content-Type": "application/json", **(headers or {})}
        with urllib.request.urlopen(urllib.request.Request(self.address + path, data, told), timeout=300) as response:
            return json.load(response)

    def members(self) -> list[psutil.Process]:
        try:
            return [self._tree, *self._tree.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def role(self, role: str) -> list[psutil.Process]:
        """Return the processes of one role, by age."""
        found = [member for member in self.members() if _role(member) == role]
        return sorted(found, key=lambda member: member.create_time())

    def kill(self, role: str) -> int:
        """Kill the oldest process of a role with SIGKILL; return its pid."""
        victims = self.role(role)
        if not victims:
            titles = sorted({_title(member) for member in self.members()})
            sys.exit(f"there is no {role} to kill among {titles}")
        victims[0].kill()
        return int(victims[0].pid)

    @contextmanager
    def memory(self) -> Iterator[dict[str, float]]:
        """Give a dict that, at the end, holds the peak resident MiB of the gateways, of the proxies and of all."""
        peaks: dict[str, float] = {}
        ends = threading.Event()

        def sample() -> None:
            while not ends.wait(_SAMPLE_SECONDS):
                for name, value in self.memory_now().items():
                    peaks[name] = max(peaks.get(name, 0.0), value)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield peaks
        finally:
            ends.set()
            thread.join()

    def memory_now(self) -> dict[str, float]:
        now: dict[str, float] = {}
        for member in self.members():
            try:
                size = member.memory_info().rss / 2**20
            except psutil.NoSuchProcess:
                continue
            for name in ("all", _role(member)):
                now[name] = now.get(name, 0.0) + size
        return now


def ours(corpus: Corpus, folder: Path, config: str, **settings: Any) -> Server:
    """Return our server of one config of the corpus. settings: of its `serve` section; rerank=... of the whole."""
    port = free_port()
    rerank = settings.pop("rerank", None)
    pairs = {f"serve.{name}": value for name, value in ({"port": port} | settings).items()}
    pairs |= {"rerank": rerank} if rerank else {}
    chosen = [part for name, value in pairs.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    return Server([PINAKES, "serve", corpus.config(config), *chosen], port, folder)


def baseline(corpus: Corpus, folder: Path, setting: dict[str, Any]) -> Server:
    """Return the alternative over the very same index."""
    port = free_port()
    path = folder / f"baseline-{port}.json"
    path.write_text(json.dumps({**corpus.files(), "port": port, "setting": setting}))
    return Server([sys.executable, "-m", "tests.bench.serve_baseline", str(path)], port, folder)


def _title(member: psutil.Process) -> str:
    try:
        return " ".join(member.cmdline())[:200]
    except psutil.Error:
        return ""


def _role(member: psutil.Process) -> str:
    title = _title(member)
    if not title.startswith("ray::") and "haproxy" not in title:
        return "other"
    return next((role for word, role in _ROLES.items() if word in title), "other")
