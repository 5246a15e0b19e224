"""The truth table of groups, row by row."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from umbel.canvas.rules import Verdict, decide

STATES = ("SUCCESS", "FAILURE", "REVOKED")


def by_hand(need: Any, size: int | None, states: dict[int, str]) -> tuple[Verdict, tuple[int, ...]]:
    """The table, as the documentation has it."""
    good = [slot for slot in sorted(states) if states[slot] == "SUCCESS"]
    bad = [slot for slot in sorted(states) if states[slot] != "SUCCESS"]
    over = size is not None and len(states) == size
    match need:
        case int() if len(good) >= need:
            return Verdict.SUCCEED, tuple(good[:need])
        case _ if not over:
            return Verdict.WAIT, ()
        case "settled":
            return Verdict.SUCCEED, tuple(sorted(states))
        case "all" if not bad:
            return Verdict.SUCCEED, tuple(good)
    return Verdict.FAIL, tuple(bad)


@pytest.mark.parametrize("need", ["all", "settled", 1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 3, None])
def test_every_row(need: Any, size: int | None) -> None:
    for number in range((size or 3) + 1):
        for states in product(STATES, repeat=number):
            given = dict(enumerate(states))
            found = decide(need, size, given)
            assert (found.verdict, found.members) == by_hand(need, size, given), given


def test_members_count_in_their_order_however_they_come() -> None:
    assert decide("all", 3, {2: "SUCCESS", 0: "SUCCESS", 1: "SUCCESS"}).members == (0, 1, 2)
    assert decide(2, 5, {4: "SUCCESS", 1: "SUCCESS"}).members == (1, 4)
    assert decide("all", 2, {1: "FAILURE", 0: "REVOKED"}).members == (0, 1)
