"""Tables, JSON, ages."""

from __future__ import annotations

import json
from datetime import UTC

import pytest

from umbel.cli.output import age, clean, clean_lines, emit, moment, shorten, table


def test_columns_are_aligned() -> None:
    text = table(("name", "number"), [("a", 5), ("longer", 10)])
    assert text.splitlines() == ["NAME    NUMBER", "a            5", "longer      10"]
    assert table(("name", "number"), []) == "NAME  NUMBER"
    assert table(("x",), [(None,)]).splitlines() == ["X", "-"]


def test_nothing_steers_the_terminal() -> None:
    assert clean("a\x1b[2Jb\nc\u202e") == "a\\x1b[2Jb\\nc\\u202e"
    assert clean("Füße 하나") == "Füße 하나"
    assert clean_lines("a\n\tb\r\n\x07c") == "a\n        b\n\\x07c"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (-3, "0s"),
        (0.4, "0s"),
        (59.9, "59s"),
        (60, "1m 0s"),
        (200, "3m 20s"),
        (3700, "1h 1m"),
        (90000, "1d 1h"),
        (864000, "10d 0h"),
    ],
)
def test_age(seconds: float | None, text: str) -> None:
    assert age(seconds) == text


def test_moment() -> None:
    assert moment(0, UTC) == "1970-01-01 00:00:00"
    assert moment("soon", UTC) == "-"
    assert moment(1e30, UTC) == "1e+30"


def test_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"inf": float("inf"), "nested": [{"nan": float("nan")}], "object": ValueError("x"), 1: "é"})
    out = capsys.readouterr().out
    assert json.loads(out) == {"inf": "inf", "nested": [{"nan": "nan"}], "object": "x", "1": "é"}
    assert "é" in out


def test_shorten() -> None:
    assert (shorten("abc", 3), shorten("abcd", 3)) == ("abc", "ab…")
