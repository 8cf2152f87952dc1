"""Bad input: thousands of requests, sensible and not, to a server that lives; every answer is judged.

    python -m tests.bench.serve_fuzz [--url http://HOST:PORT] [--key KEY] [--requests 10000] [--schemathesis PROGRAM]

Without --url a server is started in this process over a tiny real version. With schemathesis installed (or named), as
many cases of its own follow, made from the server's OpenAPI document by one seed after the other. The last line says
what was found, with `ok` or `miss`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from hypothesis import HealthCheck, Phase, given, settings

from tests.bench.common import keep
from tests.fuzz import REQUESTS, Asked, faults

_TIMEOUT_SECONDS = 30.0
_SHOWN = 10
_WHOLE = 10_000  # requests, and as many cases: fewer are not kept
_EXAMPLES = 100  # of an operation in one run; it takes longer and longer to think up another one
_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--requests", type=int, default=_WHOLE)
    parser.add_argument("--schemathesis", help="the program, where it is not on the PATH")
    arguments = parser.parse_args()
    with _server(arguments.url) as url:
        found, statuses = fuzz(url, arguments.key, arguments.requests)
        for told, number in found.most_common(_SHOWN):
            print(f"{number} x {told}")
        alive = _answer(_connect(url), Asked("GET", "/health"), None)[0] == 200
        tool, cases = schemathesis(url, arguments.key, arguments.schemathesis, arguments.requests)
    told = ", ".join(f"{status}: {number}" for status, number in sorted(statuses.items()))
    good = not found and alive and tool in ("passed", "absent")
    print(
        f"fuzz: {sum(statuses.values())} requests ({told}), {sum(found.values())} faults, "
        f"server {'alive' if alive else 'gone'}, schemathesis {tool} ({cases} cases) {'ok' if good else 'miss'}"
    )
    if arguments.requests >= _WHOLE:
        counts = {str(status): number for status, number in sorted(statuses.items())}
        faulty = {"faults": sum(found.values()), "alive": alive}
        keep("serve", {"fuzz": {"statuses": counts, **faulty, "schemathesis": tool, "cases": cases}}, merge=True)


def fuzz(url: str, key: str | None, num_requests: int) -> tuple[Counter[str], Counter[int]]:
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
            found[f"{fault}: {asked.method} {asked.path}"] += 1

    began = time.monotonic()
    send()
    print(f"{sum(statuses.values())} requests in {time.monotonic() - began:.0f} s")
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


def schemathesis(url: str, key: str | None, program: str | None, num_cases: int) -> tuple[str, int]:
    """Have schemathesis try so many cases or more; return "passed", "failed" or "absent", and how many there were."""
    chosen = program or shutil.which("schemathesis")
    if chosen is None:
        return "absent", 0
    command = [chosen, "run", f"{url}/openapi.json", "--checks", _CHECKS, "--continue-on-failure", "--workers", "2"]
    command += ["--max-examples", str(_EXAMPLES), "--request-timeout", str(_TIMEOUT_SECONDS)]
    command += ["--header", f"X-Api-Key: {key}"] if key else []
    cases, made, seed, began = 0, 1, 0, time.monotonic()
    while made and cases < num_cases:  # many operations have few different cases: a run makes fewer than it might
        phases = "fuzzing" if seed else "examples,coverage,fuzzing"
        done = subprocess.run(
            [*command, "--phases", phases, "--seed", str(seed)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        made = sum(int(number) for number in re.findall(r"(\d+) generated", done.stdout))
        cases, seed = cases + made, seed + 1
        if done.returncode:
            print(done.stdout[-3000:])
            return "failed", cases
        print(f"schemathesis: {cases} cases in {time.monotonic() - began:.0f} s", flush=True)
    return "passed" if cases >= num_cases else "failed", cases


@contextmanager
def _server(url: str | None) -> Iterator[str]:
    """Give `url`, or the address of a server of our own."""
    if url is not None:
        yield url.rstrip("/")
        return
    from cluster.api import build_api
    from pipelines.config import ServeConfig
    from tests.checkpoints import write_sentence_transformer
    from tests.local_backend import LocalBackend, build_root, served

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_sentence_transformer(str(Path(folder) / "model"))
        backend = LocalBackend(build_root(Path(folder), checkpoint), ["cats"], ServeConfig(access_log=False))
        with served(build_api(lambda: backend, backend.config)) as address:
            yield address


if __name__ == "__main__":
    sys.exit(main())
