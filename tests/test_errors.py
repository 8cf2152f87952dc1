"""An error of ours that was printed in a traceback, as Ray Serve hands on what a replica raised, is read back whole."""

from __future__ import annotations

import traceback

from hypothesis import given
from hypothesis import strategies as st

from pipelines import errors
from pipelines.errors import ConfigError, PinakesError, from_traceback

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PinakesError)]
LINE = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp", "Zs"]), min_size=1, max_size=20)


def printed(error: BaseException) -> str:
    return "A replica failed. Error:\n" + "".join(traceback.format_exception(error))


@given(kind=st.sampled_from(KINDS), what=LINE, where=LINE, expected=st.just("") | LINE, hint=st.just("") | LINE)
def test_it_is_read_back_whole(kind: type[PinakesError], what: str, where: str, expected: str, hint: str) -> None:
    error = kind(f"{what}\n  - one\n  - other", where=where, expected=expected, hint=hint)
    found = from_traceback(printed(error))
    assert type(found) is kind
    assert found.as_dict() == error.as_dict()


def printed_from(error: Exception, cause: Exception) -> str:
    """Return the traceback of an error that was raised from another."""
    try:
        try:
            raise cause
        except type(cause) as before:
            raise error from before
    except type(error) as raised:
        return printed(raised)


def test_one_that_was_raised_from_another_is_the_later_one() -> None:
    found = from_traceback(printed_from(ConfigError("the config can't be read"), OSError("no such file")))
    assert isinstance(found, ConfigError)
    assert found.what == "the config can't be read"


def test_an_error_of_somebody_else_is_none_even_if_it_came_from_ours() -> None:
    assert from_traceback(printed_from(ValueError("theirs"), ConfigError("ours"))) is None
    for text in ("", "pipelines.errors.Nothing: x", "\npipelines.errors.re: x", "\npipelines.errors.ConfigError"):
        assert from_traceback(text) is None
