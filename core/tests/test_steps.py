"""A worker's components come in the order that their requirements say."""

from __future__ import annotations

import itertools

import pytest

from umbel.errors import UmbelError
from umbel.ports.step import Step
from umbel.worker.steps import in_order


def step(name: str, *requires: str) -> Step:
    cls = type(name, (Step,), {"name": name, "requires": requires})
    made: Step = cls()
    return made


def names(*steps: Step) -> list[str]:
    return [each.name for each in in_order(steps)]


def test_each_comes_after_those_it_requires_in_whatever_order_they_are_given() -> None:
    steps = [step("a", "b"), step("b", "c", "d"), step("c", "d"), step("d"), step("e", "a")]
    for given in itertools.permutations(steps):
        order = names(*given)
        assert sorted(order) == list("abcde")
        for each in steps:
            assert all(order.index(required) < order.index(each.name) for required in each.requires)


def test_what_requires_nothing_stays_where_it_was_given() -> None:
    assert names(step("c"), step("a"), step("b")) == ["c", "a", "b"]
    assert names(step("a", "b"), step("b"), step("c")) == ["b", "a", "c"]
    assert names(step("settlement", "renewal"), step("renewal"), step("intake", "settlement"), step("mine")) == [
        "renewal", "settlement", "intake", "mine",
    ]  # fmt: skip


def test_no_steps_are_no_trouble() -> None:
    assert names() == []


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(UmbelError, match="two worker steps are named 'a'"):
        in_order([step("a"), step("a")])


def test_a_missing_requirement_names_both_and_what_there_is() -> None:
    with pytest.raises(UmbelError, match="'a' requires 'x', which is not there; steps: a, b"):
        in_order([step("a", "x"), step("b")])


def test_a_circle_is_told_step_by_step() -> None:
    with pytest.raises(UmbelError, match=r"in a circle: \w → \w → \w → \w"):
        in_order([step("a", "b"), step("b", "c"), step("c", "a")])
    with pytest.raises(UmbelError, match="in a circle: a → a"):
        in_order([step("a", "a")])


def test_a_long_chain_is_no_trouble() -> None:
    steps = [step(f"s{n}", *([f"s{n + 1}"] if n < 200 else [])) for n in range(201)]
    assert names(*steps)[0] == "s200"
