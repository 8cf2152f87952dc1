"""The small pieces of a page: text made safe, tables, and values in the words that people read."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Html(str):
    """Text that is markup already; any other string is escaped when it enters the page."""

    __slots__ = ()


def to_text(value: Any) -> Html:
    """Escape a value; what no page may hold (control characters, half surrogate pairs) becomes U+FFFD."""
    if isinstance(value, Html):
        return value
    clean = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value))
    return Html(html.escape(clean, quote=True))


def join(parts: Iterable[str]) -> Html:
    return Html("".join(parts))


def to_table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Html:
    if not rows:
        return Html("")
    head = join(f'<th scope="col">{to_text(cell)}</th>' for cell in header)
    body = join(
        f'<tr><th scope="row">{to_text(row[0])}</th>{join(f"<td>{to_text(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return Html(
        f'<div class="scroll"><table><caption>{to_text(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def to_facts(caption: str, pairs: Iterable[tuple[str, Any]]) -> Html:
    rows = join(
        f'<tr><th scope="row">{to_text(key)}</th><td>{to_text(value)}</td></tr>'
        for key, value in pairs
        if value is not None and value != ""
    )
    if not rows:
        return Html("")
    caption = to_text(caption)
    return Html(
        f'<div class="scroll"><table class="facts"><caption>{caption}</caption><tbody>{rows}</tbody></table></div>'
    )


def as_mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def as_number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def size_of(entry: Any) -> float:
    return as_number(as_mapping(entry).get("bytes")) or 0.0


def in_words(key: Any) -> str:
    text = str(key).removeprefix("num_").replace("_", " ").strip()
    return text[:1].upper() + text[1:]


def on_one_line(value: Any) -> str:
    """Return a value on one line: mappings as `a = 1, b = 2`, lists with commas."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {on_one_line(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(on_one_line, value))
    return "" if value is None else str(value)


def to_count(value: Any) -> str | None:
    number = as_number(value)
    return f"{number:,.0f}" if number is not None and number == int(number) else None


def short_count(value: Any) -> str | None:
    number = as_number(value)
    if number is None or number < 1e7:
        return to_count(value)
    return f"{number / 1e6:,.1f} M" if number < 1e9 else f"{number / 1e9:,.2f} G"


def to_percent(share: float, digits: int = 1) -> str:
    return f"{share * 100:.{digits}f}%"


def to_bytes(count: float | None) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count is not None and (count < 1000 or unit == "TB"):
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count = count / 1000 if count is not None else None
    return ""


def to_milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def to_duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
