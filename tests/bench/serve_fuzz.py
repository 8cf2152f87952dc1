"""Bad input: thousands of requests, sensible and not, to a server that lives; every answer is judged.

    python -m tests.bench.serve_fuzz [--url http://HOST:PORT] [--key KEY] [--requests 10000] [--schemathesis PROGRAM]

Without --url a server is started in this process over a tiny real version. With schemathesis installed (or named), a
run of it over the server's OpenAPI document follows. The last line says what was found, with `ok` or `miss`.
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

from tests.fuzz import REQUESTS, Asked, faults

_TIMEOUT_SECONDS = 30.0
_SHOWN = 10
_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--schemathesis", help="the program, where it is not on the PATH")
    arguments = parser.parse_args()
    with _server(arguments.url) as url:
        found, statuses = fuzz(url, arguments.key, arguments.requests)
        for told, number in found.most_common(_SHOWN):
            print(f"{number} x {told}")
        alive = _answer(_connect(url), Asked("GET", "/health"), None)[0] == 200
        tool = schemathesis(url, arguments.key, arguments.schemathesis, arguments.requests)
    told = ", ".join(f"{status}: {number}" for status, number in sorted(statuses.items()))
    good = not found and alive and tool in ("passed", "absent")
    print(
        f"fuzz: {sum(statuses.values())} requests ({told}), {sum(found.values())} faults, "
        f"server {'alive' if alive else 'gone'}, schemathesis {tool} {'ok' if good else 'miss'}"
    )


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


def schemathesis(url: str, key: str | None, program: str | None, num_requests: int) -> str:
    """Run schemathesis over the server's document; return "passed", "failed" or "absent"."""
    chosen = program or shutil.which("schemathesis")
    if chosen is None:
        return "absent"
    document = json.loads(_answer(_connect(url), Asked("GET", "/openapi.json"), key)[2])
    operations = sum(len(methods) for methods in document["paths"].values())
    command = [chosen, "run", f"{url}/openapi.json", "--checks", _CHECKS, "--phases", "examples,coverage,fuzzing"]
    command += ["--max-examples", str(-(-num_requests // operations)), "--request-timeout", str(_TIMEOUT_SECONDS)]
    command += ["--continue-on-failure", *(["--header", f"X-Api-Key: {key}"] if key else [])]
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
        output.seek(0)
        told = output.read()
    print(told[-3000:] if done.returncode else "\n".join(re.findall(r"^.*(?:generated|cases|passed).*$", told, re.M)))
    return "failed" if done.returncode else "passed"


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
