"""``docs/reference/interop.md`` says what the matrix says."""

from __future__ import annotations

from pathlib import Path

import pytest
from interop_matrix import BROKERS, FEATURES, FORMS, IMPOSSIBLE, PEERS, Cell, Impossible, cannot, works

PAGE = Path(__file__).parents[2] / "docs/reference/interop.md"
EVERY = [Cell(b, c, w, f) for b in BROKERS for c in PEERS for w in PEERS for f in (*FEATURES, *FORMS)]


@pytest.mark.parametrize("table", [works(), cannot()], ids=["works", "cannot"])
def test_the_page_has_the_tables_of_the_matrix(table: str) -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert table in written, "python tests/interop/interop_matrix.py writes them anew"


@pytest.mark.parametrize("one", IMPOSSIBLE, ids=lambda one: one.why[:40])
def test_every_reason_is_needed(one: Impossible) -> None:
    others = [other for other in IMPOSSIBLE if other is not one]
    assert any(one.holds(cell) and not any(other.holds(cell) for other in others) for cell in EVERY)


def test_nothing_between_umbel_and_celery_is_impossible() -> None:
    assert not [str(cell) for cell in EVERY if any(one.holds(cell) for one in IMPOSSIBLE) and "node" not in str(cell)]
