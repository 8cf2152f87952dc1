"""API keys: made once, shown once, kept as hashes in one file that servers read and `pinakes keys` writes.

A key is `pk_<id>_<secret>`. The id (8 hex digits) finds its record and may be logged. The secret is 256 random bits:
nobody can guess it, so a plain SHA-256 of the key is a safe thing to keep, and checking it costs microseconds. (Slow,
salted hashes are for passwords, which people choose.)
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import random
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pipelines.errors import ArtifactError, ConfigError, PinakesError
from pipelines.schema import FORMAT_VERSION
from pipelines.storage import Store

Scope = Literal["search", "admin"]
SCOPES: tuple[Scope, ...] = ("search", "admin")

_log = logging.getLogger("pinakes.access")
_KEY = re.compile(r"pk_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")
_NOBODY = hashlib.sha256(secrets.token_bytes(32)).hexdigest()
_REFRESH_SECONDS = 5.0
_ATTEMPTS, _PAUSE = 20, 0.01  # seconds, at most, before the second; doubled up to six times


def default_url(root: str) -> str:
    """Return where the keys of a root are kept unless the config says otherwise."""
    return f"{root.rstrip('/')}/keys.json"


@dataclass(frozen=True)
class AccessKey:
    """What is kept of a key. created, expires: ISO 8601 with a time zone; expires None: never. sha256: of the key."""

    id: str
    name: str
    scopes: tuple[Scope, ...]
    sha256: str
    created: str
    expires: str | None = None

    def expired(self, now: datetime | None = None) -> bool:
        return self.expires is not None and datetime.fromisoformat(self.expires) <= (now or datetime.now(UTC))


class KeyFile:
    """The file at `url` (a path or any fsspec URL). Every change replaces it whole, or fails if another came first."""

    def __init__(self, url: str) -> None:
        folder, _, self.name = url.replace("\\", "/").rpartition("/")
        self.store = Store(folder or ".")
        if not self.name:
            raise ConfigError("no file is named", where=url, expected="a path or URL of a JSON file")

    @property
    def path(self) -> str:
        return self.store.path(self.name)

    def read(self) -> list[AccessKey]:
        """Return all keys, oldest first; none where there is no file. Raises ArtifactError for a damaged file."""
        return self._load()[0]

    def create(
        self, name: str, scopes: Sequence[str] = ("search",), days: float | None = None
    ) -> tuple[str, AccessKey]:
        """Add a key; return it, for the only time, and its record. days: until it expires.

        Raises ConfigError for an unknown scope, no scope, no name, or days that are not positive.
        """
        wanted = tuple(scope for scope in SCOPES if scope in scopes)
        if not wanted or len(wanted) < len(set(scopes)):
            told = ", ".join(scopes) or "none"
            raise ConfigError(f"these are no scopes: {told}", expected=f"one or more of: {', '.join(SCOPES)}")
        if not name.strip() or not name.isprintable():
            raise ConfigError("the key has no name", expected="printable text that says whose it is")
        if days is not None and not 0 < days < 36_500:
            raise ConfigError(f"a key can't expire in {days} days", expected="more than 0, less than 36,500")
        now = datetime.now(UTC)
        expires = None if days is None else (now + timedelta(days=days)).isoformat(timespec="seconds")
        key_id = secrets.token_hex(4)
        key = f"pk_{key_id}_{secrets.token_urlsafe(32)}"
        record = AccessKey(key_id, name, wanted, _digest(key), now.isoformat(timespec="seconds"), expires)
        self._change(lambda keys: [*keys, record])
        return key, record

    def revoke(self, key_id: str) -> AccessKey:
        """Remove a key and return its record. Raises ConfigError when there is none with this id."""
        found: list[AccessKey] = []

        def without(keys: list[AccessKey]) -> list[AccessKey]:
            found[:] = [key for key in keys if key.id == key_id]
            if not found:
                known = ", ".join(key.id for key in keys) or "none"
                raise ConfigError(f"there is no key {key_id!r}", where=self.path, expected=f"one of: {known}")
            return [key for key in keys if key.id != key_id]

        self._change(without)
        return found[0]

    def _change(self, change: Any) -> None:
        """Replace the keys by what `change` makes of them, again if somebody else wrote in between."""
        for attempt in range(_ATTEMPTS):
            keys, before = self._load()
            content = {"format_version": FORMAT_VERSION, "keys": [asdict(key) for key in change(keys)]}
            try:
                self.store.swap(self.name, (json.dumps(content, indent=1) + "\n").encode(), before)
                return
            except PinakesError:
                if attempt == _ATTEMPTS - 1 or self._load()[1] == before:
                    raise
                time.sleep(random.uniform(0, _PAUSE * 2 ** min(attempt, 6)))

    def _load(self) -> tuple[list[AccessKey], bytes | None]:
        if not self.store.exists(self.name):
            return [], None
        data = self.store.read(self.name)
        try:
            content = json.loads(data)
            if content["format_version"] > FORMAT_VERSION:
                raise ValueError(f"its format is {content['format_version']}, newer than this program's")
            return [_record(entry) for entry in content["keys"]], data
        except (ValueError, KeyError, TypeError) as error:
            hint = "restore it from a copy, or remove it and make new keys with `pinakes keys create`"
            raise ArtifactError(f"the file holds no API keys: {error}", where=self.path, hint=hint) from error


class KeyRing:
    """The keys of a file as a server knows them: in memory, read again every few seconds.

    A revoked key is refused, and a new one taken, at most `refresh_seconds` later. While the file can't be read the
    keys known last stay good; a file that is gone means that there are no keys.
    """

    def __init__(self, file: KeyFile, refresh_seconds: float = _REFRESH_SECONDS) -> None:
        self.file, self.refresh_seconds = file, refresh_seconds
        self._by_id = {key.id: key for key in file.read()}
        self._read_at = time.monotonic()

    @property
    def stale(self) -> bool:
        return time.monotonic() - self._read_at >= self.refresh_seconds

    def __len__(self) -> int:
        return len(self._by_id)

    def refresh(self) -> None:
        """Read the file again. A failure is logged."""
        self._read_at = time.monotonic()
        try:
            self._by_id = {key.id: key for key in self.file.read()}
        except PinakesError as error:
            _log.error("the API keys can't be read; those known last stay good: %s", error.what)

    def find(self, presented: str) -> AccessKey | None:
        """Return the record of a key that is in the file, expired or not, else None.

        The comparison takes the same time for every wrong secret, and for an id that does not exist.
        """
        match = _KEY.fullmatch(presented)
        known = self._by_id.get(match[1]) if match else None
        same = hmac.compare_digest(_digest(presented), known.sha256 if known else _NOBODY)
        return known if same else None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _record(entry: dict[str, Any]) -> AccessKey:
    """Return a checked record of the file. Raises KeyError, TypeError or ValueError for anything else."""
    key = AccessKey(**{**entry, "scopes": tuple(entry["scopes"])})
    key.expired()
    if not set(key.scopes) <= set(SCOPES) or not re.fullmatch(r"[0-9a-f]{64}", key.sha256):
        raise ValueError(f"the key {key.id!r} is not whole")
    return key
