"""HTTP from the standard library: connections that stay open, patience with a busy server, refusals as our errors."""

from __future__ import annotations

import http.client
import json
import random
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any
from urllib.parse import quote, urlsplit

from pipelines.errors import (
    AccessError,
    ArtifactError,
    BusyError,
    ConfigError,
    PinakesError,
    QualityError,
    ServiceError,
)

_ONCE = "/admin/"
"""Paths whose requests are sent once: a rollback that was done, and whose answer was lost, must not be done again."""
_REFUSALS: dict[int, type[PinakesError]] = {401: AccessError, 403: AccessError, 404: ArtifactError, 409: QualityError}


class Transport:
    """The connections to the server at `url`; threads may share them. timeout: seconds for a request and its tries.

    Raises ConfigError for what is no address of a server, or no key; a key is never repeated.
    """

    def __init__(self, url: str, key: str | None, timeout: float) -> None:
        self._kind, self._host, self._port, self._prefix = _address(url)
        self.url, self.timeout = url.strip().rstrip("/"), timeout
        self._headers = {"Accept": "application/json, application/x-ndjson"}
        self._headers |= {"Authorization": f"Bearer {checked}"} if (checked := _checked_key(key)) else {}
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the connections that are idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    @contextmanager
    def answer(
        self, method: str, path: str, content: Mapping[str, Any] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """Give the good answer to a request, its body unread; the connection is kept if the body is read whole.

        Raises what a refusal means: BusyError (429, 503, after patience), AccessError (401, 403), ArtifactError (404),
        QualityError (409), ConfigError (other 4xx); ServiceError for 5xx, and when there is no answer at all.
        """
        connection, response = self._open(method, path, content)
        try:
            yield response
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self.no_answer(path, error) from error
        except BaseException:
            connection.close()
            raise
        self._keep(connection, response)

    def _open(
        self, method: str, path: str, content: Mapping[str, Any] | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Return a good answer with its body unread, after as many tries as the time and the path allow."""
        body = None if content is None else json.dumps(content).encode()
        deadline, tries = monotonic() + self.timeout, 0
        while True:
            connection, response = self._send(method, path, body, deadline)
            if response.status < 300:
                return connection, response
            error = self._refusal(path, response)
            self._keep(connection, response)
            if path.startswith(_ONCE):
                raise error
            # A little later than was said, and not at the same moment as everybody else who was told so.
            tries += 1
            wait = max(getattr(error, "retry_seconds", 0.0), 0.05 * 2**tries) * (1 + random.random() / 4)
            if not isinstance(error, BusyError) or monotonic() + wait > deadline:
                raise error
            sleep(wait)

    def _send(
        self, method: str, path: str, body: bytes | None, deadline: float
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        headers = {**self._headers, **({} if body is None else {"Content-Type": "application/json"})}
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle and not path.startswith(_ONCE) else None
            fresh = connection is None
            connection = connection or self._kind(self._host, self._port)
            connection.timeout = max(0.001, deadline - monotonic())
            if connection.sock is not None:
                connection.sock.settimeout(connection.timeout)
            try:
                connection.request(method, self._prefix + path, body, headers)
                return connection, connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                # Servers close connections that were idle for long, which is only seen when the next request fails.
                if fresh or isinstance(error, TimeoutError):
                    raise self.no_answer(path, error) from error

    def _keep(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        """Keep the connection for the next request, unless the server closes it or the answer was not read whole."""
        if response.will_close or not response.isclosed():
            connection.close()
            return
        with self._lock:
            self._idle.append(connection)

    def _refusal(self, path: str, response: http.client.HTTPResponse) -> PinakesError:
        """Return the error that a refusal means, with its body read."""
        try:
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            return self.no_answer(path, error)
        try:
            problem = dict(json.loads(data))
        except (ValueError, TypeError):  # not from the API, but from a proxy before it
            problem = {"detail": data[:200].decode("utf-8", "replace").strip() or response.reason}
        return refused({**problem, "status": response.status}, self.url + path, response.headers)

    def no_answer(self, path: str, error: Exception) -> ServiceError:
        if isinstance(error, TimeoutError):
            hint = "give the client a longer timeout, or look whether the server is overloaded"
            return ServiceError(
                f"there was no answer within {self.timeout:g} seconds", where=self.url + path, hint=hint
            )
        hint = "check the address, and that `pinakes serve` is running there"
        if isinstance(error, ssl.SSLCertVerificationError):
            hint = "name its authority's certificates by SSL_CERT_FILE, if the server is the one that you mean"
        return ServiceError(f"the server does not answer: {error}", where=self.url + path, hint=hint)


def _address(url: str) -> tuple[type[http.client.HTTPConnection], str, int | None, str]:
    """Return the kind of connection, host, port and path of an address."""
    refusal = ConfigError("this is no address of a server", where=url, expected="http://HOST:PORT or https://HOST")
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
        if parts.scheme not in ("http", "https") or not host.encode("idna") or not host.isprintable() or " " in host:
            raise refusal
    except ValueError:  # of the port, the brackets, or a name that is too long
        raise refusal from None
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind, host, port, quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=")


def _checked_key(key: str | None) -> str:
    """Return a key without the blanks around it, as files hold them; none as an empty one."""
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        hint = "copy it again as `pinakes keys create` printed it"
        raise ConfigError("the API key holds a character that no key has", expected="pk_…, in one line", hint=hint)
    return key


def refused(problem: Mapping[str, Any], where: str, headers: Any = None) -> PinakesError:
    """Return the error that a problem's JSON stands for."""
    status, what = int(problem["status"]), str(problem.get("detail", "it did not say why"))
    request = str(problem.get("instance", "")).rpartition(":")[2]
    told = {"where": where, "hint": f"the server's log knows it as request {request}" if request else ""}
    if status in (429, 503):
        after = str((headers or {}).get("Retry-After") or problem.get("retry_after") or 1)
        return BusyError(what, retry_seconds=float(after) if after.isdecimal() else 1.0, status=status, **told)
    if status in _REFUSALS:
        return _REFUSALS[status](what, **told)
    return ServiceError(what, **told) if status >= 500 else ConfigError(what, where=where)
