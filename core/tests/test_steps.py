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


def early(name: str, *before: str) -> Step:
    cls = type(name, (Step,), {"name": name, "before": before})
    made: Step = cls()
    return made


def test_a_step_may_say_itself_what_is_to_start_after_it() -> None:
    assert names(step("a"), step("b"), early("mine", "b")) == ["a", "mine", "b"]
    assert names(step("a"), step("b", "a"), early("mine", "a")) == ["mine", "a", "b"]
    assert names(step("a"), early("mine", "absent")) == ["a", "mine"]


def test_what_two_steps_say_of_each_other_may_be_a_circle() -> None:
    with pytest.raises(UmbelError, match="in a circle: "):
        in_order([step("a"), step("b", "a"), type("c", (Step,), {"name": "c", "requires": ("b",), "before": ("a",)})()])
    both = [step("a", "mine"), early("mine", "a")]
    assert [each.name for each in in_order(both)] == ["mine", "a"]


def test_a_string_in_the_place_of_names_is_told_from_its_letters() -> None:
    wrong = type("a", (Step,), {"name": "a", "requires": ("pool")})()
    with pytest.raises(UmbelError, match=r"'a': requires is a string, not a tuple: write \('pool',\)"):
        in_order([wrong, step("pool")])
