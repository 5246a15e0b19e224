"""Records that workflows read: compressed ones too, and no more of them at once than need be."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from umbel import Umbel, group
from umbel.canvas.marks import Mark
from umbel.model import Result, State, evolve
from umbel.testing.harness import in_memory


def compressed(result: Result) -> Result:
    """As a program that compresses its records has written it."""
    return evolve(result, document=zlib.compress(result.document), compression="zlib")


def test_what_a_mark_is_made_of_may_be_compressed() -> None:
    app = Umbel("lab", settings={"results.accept_compression": ["zlib"]})
    document = json.dumps({"status": "SUCCESS", "result": [1], "task_id": "t"}).encode()
    mark = Mark.of(compressed(Result(task_id="t", state=State.SUCCESS, document=document)))
    assert Mark.from_bytes(mark.to_bytes()) == mark
    assert mark.read(app)["result"] == [1]
    app.close()


def test_records_of_members_and_of_workflows_may_be_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    app = Umbel("lab", settings={"results.accept_compression": ["zlib"]})

    @app.task
    def one(value: Any) -> Any:
        return value

    with in_memory(app) as harness, harness.worker():
        store: Any = app.gateway.store  # type: ignore[attr-defined]  # this process has its own connections
        get = store.get

        async def squeezed(task_ids: Sequence[str]) -> Mapping[str, Result]:
            return {task_id: compressed(record) for task_id, record in (await get(task_ids)).items()}

        monkeypatch.setattr(store, "get", squeezed)
        sent = (group([one.s(1), one.s(2)]) | one.s()).apply_async()
        harness.run_until_idle(20)
        assert sent.get(timeout=30) == [1, 2]
        unlock = app.signature("celery.chord_unlock", ("g", one.s().set(task_id="body").to_plain()))
        first = one.delay(5)
        harness.run_until_idle(20)
        unlock.delay(result=[[[first.id, None], None]])
        harness.run_until_idle(20)
        assert app.result("body").get(timeout=30) == [5]


@pytest.mark.parametrize("members", [10, 1_200])
def test_a_group_that_has_ended_is_read_in_a_few_looks(members: int, monkeypatch: pytest.MonkeyPatch) -> None:
    app = Umbel("lab")

    @app.task
    def one(value: Any) -> Any:
        return value

    with in_memory(app) as harness, harness.worker():
        sent = group(one.s(number) for number in range(members)).apply_async()
        harness.run_until_idle(60)
        looks: list[int] = []
        get = app.gateway.get

        def counted(task_ids: Sequence[str]) -> Mapping[str, Result]:
            looks.append(len(task_ids))
            return get(task_ids)

        monkeypatch.setattr(app.gateway, "get", counted)
        monkeypatch.setattr("umbel.canvas.results._LOOK_AGAIN", 0.0)
        assert sent.get(timeout=20) == list(range(members))
        assert sum(looks) == members
        assert len(looks) == -(-members // 500)
