"""Stamps: the same for all, or as a visitor says for each part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from umbel import StampingVisitor, Umbel, chain, chord, group
from umbel.testing.harness import Harness, in_memory


@pytest.fixture
def app() -> Umbel:
    app = Umbel("lab")

    @app.task(name="one")
    def one(*value: Any) -> Any:
        return value[-1] if value else None

    @app.task(name="seen", bind=True)
    def seen(self: Any, *_: Any) -> Any:
        return [dict(self.request.stamps), list(self.request.stamped_headers)]

    @app.task(name="instead", bind=True)
    def instead(self: Any) -> None:
        raise self.replace(group([app.tasks["seen"].s()]))

    return app


@pytest.fixture
def harness(app: Umbel) -> Iterator[Harness]:
    with in_memory(app) as harness, harness.worker():
        yield harness


class Telling(StampingVisitor):
    """Writes down what it is asked, and stamps each part with the name of the question."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def on_signature(self, sig: Any, **headers: Any) -> Mapping[str, Any]:
        self.asked.append("signature")
        return {"args": sig.args[0] if sig.args else None}

    def on_chain_start(self, chain: Any, **headers: Any) -> Mapping[str, Any]:
        return self._told("chain")

    def on_chain_end(self, chain: Any, **headers: Any) -> None:
        self.asked.append("chain end")

    def on_group_start(self, group: Any, **headers: Any) -> Mapping[str, Any]:
        return self._told("group")

    def on_group_end(self, group: Any, **headers: Any) -> None:
        self.asked.append("group end")

    def on_chord_body(self, sig: Any, **headers: Any) -> Mapping[str, Any]:
        return self._told("body")

    def on_callback(self, callback: Any, **headers: Any) -> Mapping[str, Any]:
        return self._told("callback")

    def on_errback(self, errback: Any, **headers: Any) -> Mapping[str, Any]:
        return self._told("errback")

    def _told(self, what: str) -> Mapping[str, Any]:
        self.asked.append(what)
        return {f"in_{what}": True}


def stamps(harness: Harness) -> dict[Any, dict[str, Any]]:
    """By the first argument of each call."""
    found = {}
    for call in harness.calls("one"):
        assert list(call.stamped_headers or ()) == list(call.stamps)
        found[call.args[-1]] = dict(call.stamps)
    return found


def test_a_visitor_says_what_each_part_is_stamped_with(app: Umbel, harness: Harness) -> None:
    one, visitor = app.tasks["one"], Telling()
    linked = chain(one.s("link 1"), one.s("link 2"))
    canvas = chain(
        one.si("first").link(linked),
        chord([one.si("member").link_error(one.si("never"))], one.si("body")),
        group([one.si("end")]),
    ).stamp(visitor, tenant="acme")
    canvas.apply_async()
    harness.run_until_idle(20)
    assert stamps(harness) == {
        "first": {"tenant": "acme", "in_chain": True, "args": "first"},
        "link 1": {"tenant": "acme", "in_chain": True, "in_callback": True, "args": "link 1"},
        "link 2": {"tenant": "acme", "in_chain": True, "in_callback": True, "args": "link 2"},
        "member": {"tenant": "acme", "in_chain": True, "in_group": True, "args": "member"},
        "body": {"tenant": "acme", "in_chain": True, "in_body": True, "args": "body"},
        "end": {"tenant": "acme", "in_chain": True, "in_group": True, "args": "end"},
    }
    assert visitor.asked == [
        *("chain", "signature", "callback", "chain", "signature", "signature", "chain end"),
        *("group", "signature", "errback", "signature", "group end", "body", "signature"),
        *("group", "signature", "group end", "chain end"),
    ]


def test_members_of_a_generator_are_stamped_as_they_are_made(app: Umbel, harness: Harness) -> None:
    one = app.tasks["one"]
    group(one.s(number) for number in range(3)).stamp(Telling(), tenant="acme").apply_async()
    harness.run_until_idle(20)
    assert stamps(harness)[2] == {"tenant": "acme", "in_group": True, "args": 2}


def test_what_is_no_stamp_is_an_option(app: Umbel, harness: Harness) -> None:
    class Hurried(StampingVisitor):
        def on_signature(self, sig: Any, **headers: Any) -> Mapping[str, Any]:
            return {"priority": 9, "hurried": True, "stamped_headers": ["hurried"]}

    app.tasks["one"].s("x").stamp(Hurried(), tenant="acme").apply_async()
    harness.run_until_idle(20)
    assert stamps(harness) == {"x": {"tenant": "acme", "hurried": True}}
    assert harness.published[-1].priority == 9


def test_of_two_stamps_of_one_name_the_later_stands_or_both_do(app: Umbel) -> None:
    call = app.tasks["one"].s().stamp(tenant="a")
    assert call.stamp(tenant="b").options["tenant"] == "b"
    both = call.stamp(tenant="b", append_stamps=True).stamp(tenant=["c"], append_stamps=True)
    assert both.options["tenant"] == ["a", "b", "c"]
    assert both.options["stamped_headers"] == ["tenant"]


def test_a_task_sees_its_stamps_and_hands_them_to_what_it_is_replaced_by(app: Umbel, harness: Harness) -> None:
    sent = app.tasks["seen"].s().stamp(tenant="acme").apply_async()
    replaced = app.tasks["instead"].s().stamp(tenant="acme").apply_async()
    harness.run_until_idle(20)
    assert sent.get(timeout=30) == [{"tenant": "acme"}, ["tenant"]]
    assert replaced.get(timeout=30) == [[{"tenant": "acme"}, ["tenant"]]]
