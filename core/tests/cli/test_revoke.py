"""``umbel revoke`` and ``umbel revoked``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from umbel.control import Control
from umbel.revocation import Revocation


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Sequence[str], Mapping[str, Any]]]:
    """What the command asks of ``app.control``, which keeps everything."""
    calls: list[tuple[str, Sequence[str], Mapping[str, Any]]] = []

    def answer(verb: str) -> Any:
        def call(self: Control, *ids: str, **options: Any) -> bool:
            calls.append((verb, ids, options))
            return "x" not in ids

        return call

    for verb in ("revoke", "restore"):
        monkeypatch.setattr(Control, verb, answer(verb))
    return calls


def test_what_is_typed_is_what_is_revoked(umbel: Any, called: Any) -> None:
    done = umbel("revoke", "a", "b", "--terminate", "--grace", "2m", "--expires", "1h")
    assert done.stdout == "a, b: revoked, kept in the result store\n"
    umbel("revoke", "--task", "t", "--header", "tenant=acme", "--header", "mark=a=b")
    assert called == [
        ("revoke", ("a", "b"), {"task": None, "headers": {}, "terminate": True, "grace": 120.0, "expires": 3600.0}),
        (
            "revoke",
            (),
            {
                "task": "t",
                "headers": {"tenant": "acme", "mark": "a=b"},
                "terminate": False,
                "grace": 5.0,
                "expires": None,
            },
        ),
    ]


def test_it_says_where_it_is_not_kept(umbel: Any, called: Any) -> None:
    assert "told to the workers that run now" in umbel("revoke", "x").stdout
    assert json.loads(umbel("revoke", "x", "--json").stdout)["kept"] is False


def test_it_is_taken_back(umbel: Any, called: Any) -> None:
    assert umbel("revoke", "a", "--undo").stdout == "a: may run again\n"
    assert "was not kept" in umbel("revoke", "x", "--undo").stdout
    assert [verb for verb, _, _ in called] == ["restore", "restore"]


@pytest.mark.parametrize(
    ("arguments", "says"), [((), "give IDs"), (("a", "--task", "t"), "give IDs"), (("--header", "x"), "NAME=VALUE")]
)
def test_what_chooses_nothing_is_wrong_usage(umbel: Any, arguments: Sequence[str], says: str) -> None:
    done = umbel("revoke", *arguments)
    assert done.exit_code == 2
    assert says in done.stderr


def test_what_is_kept_is_listed(umbel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        Revocation(until=86400.0, ids=("a", "b")),
        Revocation(until=86400.0, task="t", headers={"k": "v"}, terminate=True),
    ]
    monkeypatch.setattr(Control, "revoked", lambda self: found)
    lines = umbel("revoked").stdout.splitlines()
    assert lines[0].split() == ["REVOKED", "ENDED", "UNTIL"]
    assert "a, b" in lines[1]
    assert "task t with k=v  after 5 s" in lines[2]
    assert json.loads(umbel("revoked", "--json").stdout)[1]["headers"] == {"k": "v"}
    found.clear()
    assert umbel("revoked").stdout == "nothing is revoked\n"


def test_a_store_that_keeps_none_is_said(umbel: Any) -> None:
    done = umbel("revoked", "--results", "disabled")
    assert done.exit_code == 1
    assert "keeps no revocations" in done.stderr
