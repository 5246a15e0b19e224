"""Generated canvases, each message delivered three times, come to what they must, and leave nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
from canvas_model import Failed, Lab, Misbehaving, canvas_of, expected, reconciled, trees
from cluster import FULL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from umbel import group
from umbel.canvas.sending import shown_of
from umbel.errors import UmbelError
from umbel.model import FINAL_STATES
from umbel_memory.memory import memories

EXAMPLES = 300 if FULL else 12
LARGEST = 400 if FULL else 40
"""Tasks in one canvas."""

relaxed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not FULL,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
some_trees = trees(depth=5 if FULL else 3, width=20 if FULL else 5, largest=LARGEST)


def check(lab: Lab, tree: Any, harness: Any) -> None:
    """Send it, let it end, and look at everything that must hold."""
    lab.inputs.clear()
    # In a group that something follows, so that there is a workflow, whatever the tree is.
    sent = (group([canvas_of(tree, lab.call)]) | lab.identity.s()).apply_async()
    harness.run_until_idle(60)
    reconciled(lab, harness)
    record = shown_of(lab.app, sent.workflow)
    assert record is not None
    assert record.state in FINAL_STATES, "the workflow has not ended"
    calls: dict[int, Any] = {}
    try:
        value = expected(("group", [tree]), calls=calls)
    except Failed:
        assert record.state == "FAILURE"
        with pytest.raises((UmbelError, ValueError)):
            sent.get(timeout=30)
    else:
        assert record.state == "SUCCESS"
        assert sent.get(timeout=30) == value
    assert set(lab.once.values()) <= {1}, "a body has started twice"
    assert lab.inputs.keys() <= calls.keys(), "what was not to start has started"
    assert all(inputs == {repr(calls[label])} for label, inputs in lab.inputs.items()), "inputs in their order"


@relaxed
@given(some_trees)
def test_each_ends_as_it_must_with_every_message_delivered_three_times(tree: Any) -> None:
    lab = Lab(Misbehaving(copies=3))
    with lab.running() as harness:
        check(lab, tree, harness)


@relaxed
@given(some_trees, st.integers(0, 2**32))
def test_each_ends_as_it_must_with_a_store_that_loses_answers(tree: Any, seed: int) -> None:
    lab = Lab(misbehaving := Misbehaving(copies=2, faults=0.0, seed=seed))
    with lab.running() as harness:
        sent = (group([canvas_of(tree, lab.call)]) | lab.identity.s()).apply_async()
        misbehaving._faults = 0.1
        harness.run_until_idle(60)
        reconciled(lab, harness)
        misbehaving._faults = 0.0
        reconciled(lab, harness)
        record = shown_of(lab.app, sent.workflow)
        assert record is not None
        assert record.state in FINAL_STATES
        try:
            value = expected(("group", [tree]))
        except Failed:
            assert record.state == "FAILURE"
        else:
            assert sent.get(timeout=30) == value
        assert set(lab.once.values()) <= {1}, "a body has started twice"


def test_nothing_is_left_when_its_time_is_over() -> None:
    lab = Lab(Misbehaving(copies=2))
    with lab.running() as harness:
        for tree in (
            ("chord", [("task", "ok", 0), ("task", "ok", 4)], ("task", "ok", 8)),
            ("chord", [("task", "ok", 12), ("task", "fail", 16)], ("task", "ok", 20)),
        ):
            check(lab, tree, harness)
        memory = memories.get(harness._url)
        assert memory.joins.live(harness.clock.time())
        harness.advance(days=8)
        now = harness.clock.time()
        for what in (memory.joins, memory.records, memory.claims):
            left = {key: kept for key, kept in what.live(now).items() if "workflows/reconciler" not in str(key)}
            assert not left
