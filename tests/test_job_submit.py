"""`ray job submit --working-dir . -- pinakes run …` against a running head with token authentication."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.jobs import free_port
from pipelines import publish
from tests.test_pipeline import Job

REPOSITORY = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head started as a user would, in a process of its own; gives the environment of a client with the token."""
    port, dashboard = free_port(), free_port()
    env = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "HOME": str(tmp_path_factory.mktemp("home")),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PINAKES_CACHE": str(tmp_path_factory.mktemp("cache")),
    }
    env.pop("RAY_ADDRESS", None)
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}"]
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", *ports]
    log = tmp_path_factory.mktemp("head") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    client = {**env, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    try:
        deadline = time.monotonic() + 90
        while status(client["RAY_ADDRESS"], TOKEN) != 200:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield client
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End the head and its daemons: they share the process group that we made, so nothing else is touched."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def status(address: str, token: str | None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{address}/api/jobs/", headers=headers), timeout=5
        ) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_a_submitted_job_does_the_whole_job(head: dict[str, str], tmp_path: Path) -> None:
    assert status(head["RAY_ADDRESS"], None) == 401
    job = Job(tmp_path)
    command = [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", "pinakes", "run", job.config()]
    done = subprocess.run(command, cwd=REPOSITORY, env=head, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "alias cats ->" in done.stdout
    assert publish.read_version(str(tmp_path / "root"), "cats")["num_rows"] == 300
    refused = subprocess.run(
        command, cwd=REPOSITORY, env={**head, "RAY_AUTH_TOKEN": "f" * 32}, capture_output=True, text=True
    )
    assert refused.returncode != 0
