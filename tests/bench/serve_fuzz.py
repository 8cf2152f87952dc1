"""Section fuzz: bad input. Thousands of requests, sensible and not, to a server on Ray; every answer is judged.

Over a tiny version with metadata, with keys and admin routes, behind each proxy. As many cases by schemathesis follow,
made from the server's OpenAPI document by one seed after the other; without the program that is a miss.
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from hypothesis import HealthCheck, Phase, given, settings

from cluster.jobs import free_port
from pipelines.access_keys import KeyFile, default_url
from tests.bench.common import PINAKES
from tests.bench.serve_load import Result, Work
from tests.bench.serve_server import Server
from tests.checkpoints import write_sentence_transformer
from tests.fuzz import REQUESTS, Asked, faults
from tests.local_backend import build_root
from tests.test_filtered_search import METADATA, ROWS

_TIMEOUT_SECONDS = 30.0
_SHOWN = 10
_EXAMPLES = 100  # of an operation in one run; it takes longer and longer to think up another one
# A query whose `budget_ms` is over before its turn comes is told so: 503, with when to come back.
_EXPECTED = '[checks]\nnot_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "503"]\n'
_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def fuzz(work: Work, requests: int = 10_000, program: str | None = None) -> Result:
    """requests: to be sent behind each proxy, and as many cases of schemathesis. program: its path."""
    root = _root(work.folder)
    key = KeyFile(default_url(root)).create("fuzz", scopes=["search", "admin"])[0]
    results: Result = {}
    for proxy in work.proxies:
        with _server(work.folder, root, proxy) as server:
            found, statuses = _send(server.address, key, requests)
            for told, number in found.most_common(_SHOWN):
                print(f"  {number} x {told}")
            alive = _answer(_connect(server.address), Asked("GET", "/health"), None)[0] == 200
            told = ", ".join(f"{status}: {number}" for status, number in sorted(statuses.items()))
            print(f"  {proxy}: {sum(statuses.values())} requests ({told}), {sum(found.values())} faults", flush=True)
            work.judge(f"fuzz_faults_{proxy}", sum(found.values()) + (not alive), 0, at_most=True)
            counts = {str(status): number for status, number in sorted(statuses.items())}
            results[proxy] = {"statuses": counts, "faults": sum(found.values()), "alive": alive}
            if proxy == work.proxies[-1]:
                results["schemathesis"] = _schemathesis(work, server.address, key, program, requests)
    return results


def _root(folder: Path) -> str:
    checkpoint = write_sentence_transformer(str(folder / "model"))
    return build_root(folder, checkpoint, ROWS, METADATA, num_shards=2)


def _server(folder: Path, root: str, proxy: str) -> Server:
    port = free_port()
    content = {
        "root": root,
        "corpus": {"sources": ["-"]},
        "encoder": {"checkpoint": str(folder / "model")},
        "index": {"name": "cats"},
        "serve": {"port": port, "proxy": proxy, "access_log": False, "require_key": True, "admin_routes": True},
    }
    path = folder / f"fuzz-{proxy}.yaml"
    path.write_text(yaml.safe_dump(content))
    return Server([PINAKES, "serve", str(path)], port, folder)


def _send(url: str, key: str, num_requests: int) -> tuple[Counter[str], Counter[int]]:
    """Send the requests one after the other; return the faults and the statuses of the answers, counted."""
    connection, found, statuses = _connect(url), Counter[str](), Counter[int]()
    document = json.loads(_answer(connection, Asked("GET", "/openapi.json"), key)[2])

    @settings(
        max_examples=num_requests,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(REQUESTS)
    def send(asked: Asked) -> None:
        try:
            status, headers, body = _answer(connection, asked, key)
        except (OSError, http.client.HTTPException) as error:
            found[f"no answer to {asked.method} {asked.path}: {error!r}"] += 1
            return
        statuses[status] += 1
        for fault in faults(asked, status, headers, body, document):
            found[f"{fault}: {asked.method} {asked.path} {dict(asked.headers)}"] += 1

    began = time.monotonic()
    send()
    print(f"  {sum(statuses.values())} requests in {time.monotonic() - began:.0f} s")
    return found, statuses


def _connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_SECONDS)


def _answer(connection: http.client.HTTPConnection, asked: Asked, key: str | None) -> tuple[int, dict[str, str], bytes]:
    """Return (status, headers with names in lower case, body). Raises OSError or HTTPException without an answer."""
    headers = {name: value.strip() for name, value in asked.headers.items()}
    if key and not {"X-Api-Key", "Authorization"} & set(headers):
        headers["X-Api-Key"] = key
    try:
        connection.request(asked.method, asked.path, asked.body, headers)
        response = connection.getresponse()
    except (http.client.RemoteDisconnected, ConnectionError):  # it had closed the connection after the last answer
        connection.close()
        connection.request(asked.method, asked.path, asked.body, headers)
        response = connection.getresponse()
    body = response.read()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, body


def _schemathesis(work: Work, url: str, key: str, program: str | None, num_cases: int) -> dict[str, Any]:
    """Have schemathesis try so many cases or more, and judge whether all passed."""
    chosen, cases, failed = program or shutil.which("schemathesis"), 0, 0
    if chosen is None:
        print("  schemathesis is not installed: pip install schemathesis in an environment of its own, and name it")
    else:
        cases, failed = _run_schemathesis(work.folder, chosen, url, key, num_cases)
    work.judge("schemathesis_cases", cases, num_cases)
    work.judge("schemathesis_failed_runs", failed, 0, at_most=True)
    return {"cases": cases, "failed_runs": failed}


def _run_schemathesis(folder: Path, program: str, url: str, key: str, num_cases: int) -> tuple[int, int]:
    config = folder / "schemathesis.toml"
    config.write_text(_EXPECTED)
    command = [program, "--config-file", str(config), "run", f"{url}/openapi.json", "--checks", _CHECKS]
    command += ["--continue-on-failure", "--workers", "2"]
    command += ["--max-examples", str(_EXAMPLES), "--request-timeout", str(_TIMEOUT_SECONDS)]
    command += ["--header", f"X-Api-Key: {key}"]
    cases, made, seed, failed, began = 0, 1, 0, 0, time.monotonic()
    while made and cases < num_cases and not failed:  # many operations have few different cases: a run makes fewer
        phases = "fuzzing" if seed else "examples,coverage,fuzzing"
        done = subprocess.run(
            [*command, "--phases", phases, "--seed", str(seed)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        made = sum(int(number) for number in re.findall(r"(\d+) generated", done.stdout))
        cases, seed, failed = cases + made, seed + 1, int(done.returncode != 0)
        print(f"  schemathesis: {cases} cases in {time.monotonic() - began:.0f} s", flush=True)
        if failed:
            print(done.stdout[-4000:])
    return cases, failed
