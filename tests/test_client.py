"""The client against the real API on a socket, and against servers that misbehave."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from traceback import format_exception
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from cluster.api import SearchRequest, build_api
from pipelines import client_transport
from pipelines.access_keys import KeyFile
from pipelines.client import Client, SearchResult
from pipelines.config import ServeConfig
from pipelines.errors import (
    AccessError,
    ArtifactError,
    BusyError,
    ConfigError,
    PinakesError,
    QualityError,
    ServiceError,
)
from pipelines.retrieve import Retriever
from tests.local_backend import TEXTS, LocalBackend, served
from tests.test_api import Odd
from tests.test_pipeline import pinakes, pinakes_json

CONFIG = ServeConfig(access_log=False, max_k=50)


@pytest.fixture(scope="module")
def backend(local_root: str) -> LocalBackend:
    return LocalBackend(local_root, ["cats"], CONFIG)


@pytest.fixture(scope="module")
def url(backend: LocalBackend) -> Iterator[str]:
    with served(build_api(lambda: backend, CONFIG)) as url:
        yield url


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a client meant to wait; it does not."""
    told: list[float] = []
    monkeypatch.setattr(client_transport, "sleep", told.append)
    return told


@contextmanager
def scripted(*answers: bytes | None) -> Iterator[tuple[str, list[bytes]]]:
    """Run a server that reads a request a connection and sends the next of `answers`, or None: nothing until the end.

    Gives its address and the requests' first lines.
    """
    asked: list[bytes] = []
    over = threading.Event()

    def run(listener: socket.socket) -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                data = connection.recv(65536)
                while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < _length(data):
                    data += connection.recv(65536)
                asked.append(data)
                if answer is None:
                    over.wait()
                else:
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=run, args=(listener,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        over.set()
        thread.join()


def _length(request: bytes) -> int:
    for line in request.partition(b"\r\n\r\n")[0].split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return 0


def reply(status: int, body: bytes, *headers: str, kind: str = "application/json") -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def answered(text: str) -> bytes:
    hit = {"row": 0, "score": 1.0, "id": "p", "title": "", "text": text, "new_in_a_later_server": 1}
    return json.dumps({"alias": "a", "version": "v", "encoder": "e", "took_ms": {}, "hits": [hit]}).encode()


# The real API


def test_a_search_is_typed_and_equals_the_retriever(url: str, local_root: str) -> None:
    with Client(url) as client:
        found = client.search(TEXTS[5], k=4, explain=True)
    expected = Retriever.open(local_root, "cats").search([TEXTS[5]], 4)[0]
    assert [(h.row, h.passage) for h in found.hits] == [(h.row, h.passage) for h in expected]
    assert [h.score for h in found.hits] == pytest.approx([h.score for h in expected], abs=1e-6)
    assert (found.alias, found.complete, found.answers, found.skipped) == ("cats", True, None, [])
    assert found.explain == {"depth": 4, "search_params": {}}
    assert found.took_ms["total"] > 0


def test_a_batch_comes_in_order_with_its_errors_between(url: str) -> None:
    queries = [TEXTS[i % len(TEXTS)] for i in range(1100)]
    queries[3] = " "
    with Client(url) as client:
        outcomes = list(client.search_batch(iter(queries), k=1))
    assert len(outcomes) == len(queries)
    for i, outcome in enumerate(outcomes):
        if i == 3:
            assert isinstance(outcome, ConfigError)
            assert "blank" in str(outcome)
        else:
            assert isinstance(outcome, SearchResult)
            assert outcome.hits[0].passage.text == queries[i]


def test_a_line_that_was_refused_says_when_to_come_back(backend: LocalBackend) -> None:
    groups = iter(range(100))

    def act(request: SearchRequest) -> None:
        if next(groups) == 1:
            raise BusyError("full", retry_seconds=6.2)

    odd = Odd(backend, act)
    with served(build_api(lambda: odd, CONFIG)) as url, Client(url) as client:
        outcomes = list(client.search_batch(TEXTS[:1] * 65, k=1, explain=True))
    assert isinstance(outcomes[0], SearchResult)
    assert outcomes[0].took_ms["total"] > 0
    assert isinstance(outcomes[64], BusyError)
    assert outcomes[64].retry_seconds == 7


def test_a_batch_may_be_left_early_and_the_client_used_again(url: str) -> None:
    with Client(url) as client:
        outcomes = client.search_batch(TEXTS * 10, k=1)
        assert isinstance(next(outcomes), SearchResult)
        outcomes.close()  # type: ignore[attr-defined]
        assert client.search(TEXTS[0], k=1).hits[0].passage.id == "p0"


def test_what_is_served_is_typed(url: str, backend: LocalBackend) -> None:
    with Client(url) as client:
        (alias,) = client.aliases()
        assert (alias.name, {v.state for v in alias.versions}) == ("cats", {"current", "previous"})
        assert client.versions() == alias.versions
        assert alias.versions[0].facts["metric"] == "ip"
        assert client.passage("p7").text == TEXTS[7]
        assert client.passage("p7", "cats", alias.previous).id == "p7"
        assert client.ready()


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda c: c.search("x", k=51), ConfigError, "at most 50"),
        (lambda c: c.search("x", alias="dogs"), ArtifactError, "no alias 'dogs'"),
        (lambda c: c.search("x", colour="red"), ConfigError, "colour"),
        (lambda c: c.passage("../../etc/passwd"), ArtifactError, "no passage '../../etc/passwd'"),
        (lambda c: list(c.search_batch(["x"], alias="dogs")), ArtifactError, "dogs"),
        (lambda c: c.ask("GET", "/nowhere"), ArtifactError, "Not Found"),
        (lambda c: c.ask("DELETE", "/search"), ConfigError, "Method"),
    ],
)
def test_refusals_are_our_own_errors(url: str, ask: Callable[[Client], Any], error: type, message: str) -> None:
    with Client(url) as client, pytest.raises(PinakesError) as caught:
        ask(client)
    assert type(caught.value) is error
    assert message in caught.value.what


def test_keys_are_sent_and_missed(local_root: str, tmp_path: Path) -> None:
    config = ServeConfig(access_log=False, require_key=True)
    backend, file = LocalBackend(local_root, ["cats"], config), KeyFile(str(tmp_path / "keys.json"))
    key, _ = file.create("a")
    with served(build_api(lambda: backend, config, file)) as url:
        with Client(url, key) as client:
            assert client.search("x").hits
        for wrong in (None, key[:-1] + "~"):
            with Client(url, wrong) as client:
                assert client.ready() is (wrong is None)
                with pytest.raises(AccessError):
                    client.search("x")


def test_threads_share_a_client(url: str) -> None:
    with Client(url) as client, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: client.search(text, k=1).hits[0].passage.text, TEXTS * 2))
    assert found == TEXTS * 2


def test_an_application_may_be_mounted_below_a_path(backend: LocalBackend) -> None:
    app = Starlette(routes=[Mount("/find", build_api(lambda: backend, CONFIG))])
    with served(app) as url, Client(f"{url}/find/") as client:
        assert client.search(TEXTS[2], k=1).hits[0].passage.id == "p2"


def test_the_command_asks_a_server(url: str) -> None:
    told = pinakes_json("search", TEXTS[4], "--url", url, "-k", "2")
    assert (told["query"], told["hits"][0]["id"], len(told["hits"])) == (TEXTS[4], "p4", 2)
    assert "[p4]" in pinakes("search", TEXTS[4], "--url", url)
    assert "no reranker" in pinakes("search", "x", "--url", url, "--with", "rerank", code=2)
    assert "no stage" in pinakes("search", "x", "--url", url, "--with", "magic", code=2)
    assert "does not answer" in pinakes("search", "x", "--url", "http://127.0.0.1:9", code=8)
    assert "no address of a server" in pinakes("search", "x", "--url", "http://127.0.0.1:abc", code=2)


# Busy, broken, slow


def test_a_busy_server_is_asked_again_when_it_said_so(backend: LocalBackend, waits: list[float]) -> None:
    tries = iter(range(100))

    def act(request: SearchRequest) -> None:
        if (number := next(tries)) < 2:
            raise BusyError("full", retry_seconds=3, status=(429, 503)[number])

    odd = Odd(backend, act)
    with served(build_api(lambda: odd, CONFIG)) as url, Client(url) as client:
        assert client.search(TEXTS[1], k=1).hits[0].passage.id == "p1"
    assert [1 <= wait <= 4 for wait in waits] == [True, True]
    assert waits[1] >= 3


def test_patience_ends_with_the_time(backend: LocalBackend, waits: list[float]) -> None:
    def act(request: SearchRequest) -> None:
        raise BusyError("full", retry_seconds=100)

    odd = Odd(backend, act)
    with (
        served(build_api(lambda: odd, CONFIG)) as url,
        Client(url, timeout=50) as client,
        pytest.raises(BusyError) as caught,
    ):
        client.search("x")
    assert (caught.value.retry_seconds, caught.value.status, waits) == (100.0, 503, [])


def test_a_proxy_that_is_busy_in_its_own_words_is_understood(waits: list[float]) -> None:
    words = reply(503, b"<h1>Service Unavailable</h1>", "Retry-After: 2", "Connection: close", kind="text/html")
    answers = words, reply(200, answered("found"), "Connection: close")
    with scripted(*answers) as (url, asked), Client(url) as client:
        assert client.search("x").hits[0].passage.text == "found"
    assert (len(asked), len(waits)) == (2, 1)


def test_an_idle_connection_that_was_dropped_is_replaced() -> None:
    # Each answer promises to keep the connection, and then the server closes it all the same.
    with scripted(reply(200, answered("one")), reply(200, answered("two"))) as (url, asked), Client(url) as client:
        assert [client.search("x").hits[0].passage.text for _ in range(2)] == ["one", "two"]
    assert len(asked) == 2


def test_a_switch_is_not_asked_for_again_when_its_answer_is_lost() -> None:
    asked: list[str] = []

    class Forgetful(BaseHTTPRequestHandler):
        """Answer the first request of a connection; read any other, and drop the connection."""

        protocol_version, answers = "HTTP/1.1", True

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            if self.answers:
                self.wfile.write(reply(200, answered("one")))
            self.close_connection, self.answers = not self.answers, False

    with ThreadingHTTPServer(("127.0.0.1", 0), Forgetful) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{server.server_port}") as client:
            for path in ("/search", "/admin/rollback", "/search"):
                client.ask("POST", path, {})
        server.shutdown()
    assert asked.count("/admin/rollback") == 1


def test_a_switch_that_was_refused_is_not_asked_for_again(waits: list[float]) -> None:
    with (
        scripted(reply(503, b"{}", "Retry-After: 1", "Connection: close")) as (url, asked),
        Client(url) as client,
        pytest.raises(BusyError),
    ):
        client.ask("POST", "/admin/promote", {})
    assert (len(asked), waits) == (1, [])


def test_a_batch_that_breaks_off_is_asked_for_from_there_on() -> None:
    lines = [json.dumps({"index": i, **json.loads(answered(f"text {i}"))}).encode() + b"\n" for i in range(3)]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
    broken = head + b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in lines[:2]) + b"40\r\n{"
    rest = head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(lines[2]), lines[2])
    with scripted(broken, rest) as (url, asked), Client(url) as client:
        found = [outcome.hits[0].passage.text for outcome in client.search_batch(["a", "b", "c"])]  # type: ignore[union-attr]
    assert found == ["text 0", "text 1", "text 2"]
    again = json.loads(asked[1].partition(b"\r\n\r\n")[2])
    assert again == {"queries": ["c"], "alias": "a", "version": "v"}


def test_a_batch_that_never_comes_on_is_given_up() -> None:
    empty = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with (
        scripted(empty) as (url, _),
        Client(url) as client,
        pytest.raises(ServiceError, match="broke off after 0 of 2"),
    ):
        list(client.search_batch(["a", "b"]))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "does not answer"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not answer"),
        (reply(200, b"<html>", "Connection: close"), "does not answer"),
        (reply(200, b"[]", "Connection: close"), "no JSON object"),
        (reply(200, b"{", "Connection: close").replace(b"Length: 1", b"Length: 9"), "does not answer"),
        (reply(500, b"{}", "Connection: close"), "did not say why"),
        (reply(502, b"Bad gateway", "Connection: close"), "Bad gateway"),
    ],
)
def test_what_is_no_answer_is_told_as_such(answer: bytes, message: str) -> None:
    with scripted(answer) as (url, _), pytest.raises(ServiceError, match=message) as caught:
        Client(url).search("x")
    assert url in caught.value.where


def test_a_server_that_is_silent_is_left_in_time() -> None:
    with scripted(None) as (url, _), pytest.raises(ServiceError, match=r"no answer within 0\.2 seconds"):
        Client(url, timeout=0.2).search("x")
    assert Client("http://127.0.0.1:9").ready() is False


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:8000", "ftp://x", "http://", "file:///etc/passwd", "http://x:abc", "http://x:99999"),
        *("http://[::1", "http://a b:1", f"http://{'a' * 64}.org", "http://a..b"),
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="no address"):
        Client(url)


@pytest.mark.parametrize("key", ["pk_1–secret", "pk_1\nsecret", "pk_1 secret", "pk_1\x00secret"])
def test_what_is_no_key_is_refused_without_repeating_it(key: str, url: str) -> None:
    with pytest.raises(ConfigError, match="the API key") as caught:
        Client("http://x", key)
    assert "secret" not in "".join(format_exception(caught.value))
    told = pinakes("search", "x", "--url", url, "--key", key, code=2) if "\0" not in key else ""
    assert "secret" not in told


def test_blanks_around_a_key_and_an_address_are_left_out() -> None:
    with scripted(reply(200, answered("one"), "Connection: close")) as (url, asked):
        assert Client(f" {url}/ä b/\n", "pk_1_x\n").search("x").hits
    assert asked[0].startswith(b"POST /%C3%A4%20b/search ")
    assert b"Authorization: Bearer pk_1_x\r\n" in asked[0]


def test_a_shut_gate_is_a_quality_error() -> None:
    shut = json.dumps({"status": 409, "detail": "recall is lower", "instance": "urn:pinakes:request:7"}).encode()
    with scripted(reply(409, shut, "Connection: close")) as (url, _), pytest.raises(QualityError) as caught:
        Client(url).ask("POST", "/admin/promote", {})
    assert "request 7" in caught.value.hint
