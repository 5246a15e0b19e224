"""``umbel worker --graph``: what starts in which order, and whose it is. Nothing runs, nothing is connected."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from umbel.cli.graph import Node, mermaid, tree

STEPS = """
from umbel import Umbel, hookimpl
from umbel.ports.step import Step

class Database(Step):
    name = "database"
    before = ("pool", "not there")

    async def start(self, worker):
        raise AssertionError("nothing starts")

class Feed(Step):
    name = "feed"
    requires = ("intake", "database")

class Steps:
    @hookimpl
    def umbel_add_steps(self, worker):
        assert worker.name
        return [Feed(), Database()]

    @hookimpl
    def umbel_make_pool(self):
        from fakes import FakePool, Fakes

        return FakePool(inline=True, fakes=Fakes())

app = Umbel("tasks", plugins=[Steps()])
"""


@pytest.fixture
def graph(umbel: Any, doubles: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``graph("--json")``: the standard output of ``umbel worker --graph`` of an app with two steps of its own."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    Path("tasks.py").write_text(STEPS)

    def run(*arguments: str) -> str:
        result = umbel("-A", "tasks", "worker", "-P", "fake", "-n", "w1", "--graph", *arguments)
        assert result.exit_code == 0, result.output
        return str(result.stdout)

    return run


def test_the_document_has_the_steps_in_their_order_with_what_they_ask_for(graph: Any) -> None:
    told = json.loads(graph("--json"))
    assert told["worker"] == "w1"
    steps = {step["name"]: step for step in told["steps"]}
    order = list(steps)
    assert {"settlement", "renewal", "pool", "intake", "control", "database", "feed"} <= steps.keys()
    assert order.index("database") < order.index("pool") < order.index("intake") < order.index("feed")
    for step in steps.values():
        assert set(step["requires"]) <= set(step["after"])
        assert all(order.index(name) < order.index(step["name"]) for name in step["after"])
    feed, pool = steps["feed"], steps["pool"]
    assert feed == {
        "name": "feed",
        "requires": ["intake", "database"],
        "after": ["database", "intake"],
        "plugin": "Steps",
        "distribution": None,
        "version": None,
        "object": "tasks:Feed",
    }
    assert (pool["plugin"], pool["distribution"], pool["object"]) == (
        None,
        "umbel-core",
        "umbel.worker.worker:PoolStep",
    )
    assert "database" in pool["after"]
    assert "database" not in pool["requires"]


def test_a_tree_for_people(graph: Any) -> None:
    text = graph()
    assert "started in the order of their numbers and stopped in reverse:" in text.splitlines()[0]
    (feed,) = [line for line in text.splitlines() if " feed " in line]
    assert "└─ feed" in feed
    assert feed.split("feed", 1)[1].split() == ["tasks", "also", "after", "database"]


def test_a_flow_chart_for_pages(graph: Any) -> None:
    lines = graph("mermaid").splitlines()
    assert lines[0] == "flowchart TD"
    assert any(line.endswith(' feed<br>tasks"]') for line in lines)


def test_json_alone_says_what_it_needs(umbel: Any, doubles: ModuleType) -> None:
    result = umbel("-A", "tasks", "worker", "--json")
    assert result.exit_code == 2
    assert "--json prints what --graph shows: give both" in result.stderr


def test_steps_that_cannot_be_put_in_order_are_one_sentence(graph: Any, umbel: Any) -> None:
    Path("tasks.py").write_text(STEPS.replace('"intake", "database"', '"nobody",'))
    result = umbel("-A", "tasks", "worker", "-P", "fake", "--graph")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: worker step 'feed' requires 'nobody', which is not there; steps: ")


def node(name: str, *after: str, distribution: str | None = "umbel-core") -> Node:
    return Node(
        name=name,
        requires=after,
        after=after,
        plugin=None,
        distribution=distribution,
        version="1",
        object="mine.here:X",
    )


def test_each_step_stands_below_the_last_that_it_waits_for() -> None:
    steps = [node("a"), node("b", "a"), node("c", "a"), node("d", "a", "b"), node("e", distribution=None)]
    assert tree(steps).splitlines()[1:] == [
        "  1  a        umbel-core 1",
        "  2  ├─ b     umbel-core 1",
        "  4  │  └─ d  umbel-core 1  also after a",
        "  3  └─ c     umbel-core 1",
        "  5  e        mine.here",
    ]
    assert mermaid(steps).splitlines()[-4:] == ["  s1 --> s2", "  s1 --> s3", "  s1 --> s4", "  s2 --> s4"]


def test_a_name_cannot_steer_a_terminal_or_break_out_of_the_chart() -> None:
    steps = [node('a\x1b[2J"]')]
    assert "\x1b" not in tree(steps) + mermaid(steps)
    assert '"]"]' not in mermaid(steps)
