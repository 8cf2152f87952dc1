"""Every error Pinakes raises on purpose, and the exit code each gives the `pinakes` command.

    PinakesError                1   something we refuse or cannot do
    ├── ConfigError             2   a config file, option or request that cannot be meant
    ├── InputError              3   the corpus, questions or query: missing, empty, malformed, too much quarantined
    ├── CheckpointError         4   a model directory that is unrecognised, incomplete or not what was declared
    ├── ArtifactError           5   a part, shard, manifest or alias that is missing, damaged or does not belong
    ├── StorageError            6   the store refused: full, forbidden, unreachable, lost a race
    ├── QualityError            7   a version that misses its target; nothing was published or promoted
    └── ServiceError            8   the search service can't be reached, or does not answer as one
        ├── BusyError           8   it has too much to do, or too little time: ask again after `retry_seconds`
        └── AccessError         8   it wants a key, another key, or one with more rights

A message says what was wrong and where, what was expected, and the next step.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class PinakesError(Exception):
    """Explain a refusal: `what` happened `where`, what was `expected`, and the `hint` to go on.

    All four are plain strings and the error pickles, so it survives the trip from a worker to the driver.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", expected: str = "", hint: str = "") -> None:
        self.what, self.where, self.expected, self.hint = what, where, expected, hint
        lines = [what]
        lines += [f"  where:    {where}"] if where else []
        lines += [f"  expected: {expected}"] if expected else []
        lines += [f"  next:     {hint}"] if hint else []
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.expected, self.hint)

    def as_dict(self) -> dict[str, str]:
        """Return the message's pieces for `--json` and HTTP problem bodies."""
        pieces = {"error": type(self).__name__, "what": self.what, "where": self.where}
        return {k: v for k, v in {**pieces, "expected": self.expected, "next": self.hint}.items() if v}


def from_traceback(text: str) -> PinakesError | None:
    """Return the error of ours that a printed traceback ends with; None when it ends with another."""
    name, colon, told = text.rpartition(f"\n{__name__}.")[2].partition(": ")
    kind = globals().get(name)
    if not (colon and isinstance(kind, type) and issubclass(kind, PinakesError)):
        return None
    if "\nTraceback (most recent" in told:  # of what was raised from it
        return None
    what, *pieces = re.split(r"\n  (where|expected|next): +", told.strip())
    found = dict(zip(pieces[::2], pieces[1::2], strict=True))
    return kind(what, where=found.get("where", ""), expected=found.get("expected", ""), hint=found.get("next", ""))


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate most like `name`, whatever its case, or None when none is near."""
    by_folded = {candidate.casefold(): candidate for candidate in candidates}
    found = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.5)
    return by_folded[found[0]] if found else None


def _rebuild(kind: type[PinakesError], what: str, where: str, expected: str, hint: str) -> PinakesError:
    return kind(what, where=where, expected=expected, hint=hint)


class ConfigError(PinakesError):
    exit_code = 2


class InputError(PinakesError):
    exit_code = 3


class CheckpointError(PinakesError):
    exit_code = 4


class ArtifactError(PinakesError):
    exit_code = 5


class StorageError(PinakesError):
    exit_code = 6


class QualityError(PinakesError):
    exit_code = 7


class ServiceError(PinakesError):
    exit_code = 8


class BusyError(ServiceError):
    """Refuse for now. retry_seconds: after which asking again makes sense; status: 503, or 429 for one's own excess."""

    def __init__(self, what: str, *, retry_seconds: float = 1.0, status: int = 503, **pieces: str) -> None:
        super().__init__(what, **pieces)
        self.retry_seconds, self.status = retry_seconds, status

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_busy, (self.what, self.retry_seconds, self.status, self.where, self.expected, self.hint)


class AccessError(ServiceError):
    pass


def _rebuild_busy(what: str, seconds: float, status: int, where: str, expected: str, hint: str) -> BusyError:
    return BusyError(what, retry_seconds=seconds, status=status, where=where, expected=expected, hint=hint)
