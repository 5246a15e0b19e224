"""The interop matrix, live: every client with every worker on every broker, and the captured messages in our worker.

Each worker runs one task at a time and holds no other, so that an order or an expiry can be arranged by keeping it busy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from attrs import frozen
from cluster import until
from interop_fleet import Client, Fleet
from interop_matrix import BROKERS, FEATURES, FORMS, Cell, cells

pytestmark = pytest.mark.timeout(240)  # the first on RabbitMQ waits for the server, the first with each worker for that

EARLY = 0.1
"""Seconds by which a task may start before its ETA: Umbel's own tolerance, and that of clocks."""


class Talk:
    """One cell: a client, and the worker that it speaks with."""

    def __init__(self, cell: Cell, fleet: Fleet) -> None:
        self.cell, self.fleet = cell, fleet
        self.client: Client = fleet.client(cell.client)
        fleet.worker(cell.worker)
        self.queue = f"interop-{cell.worker}"
        self.name = uuid4().hex
        """For notes: nobody else's."""

    def send(self, task: str, args: list[Any] | None = None, **options: Any) -> str:
        return self.client.send(f"interop.{task}", args, **{"queue": self.queue, **options})

    def run(self, task: str, args: list[Any] | None = None, **options: Any) -> Any:
        return self.client.get(self.send(task, args, **options))

    @contextmanager
    def busy(self, queue: str | None = None) -> Iterator[None]:
        """Within, the worker runs something else, that came by the same queue: so it holds nothing more of it."""
        self.send("hold", [self.name], queue=queue or self.queue)
        self.fleet.note(f"{self.name}.begun")
        try:
            yield
        finally:
            self.fleet.let_go(self.name)


@pytest.fixture
def talk(request: pytest.FixtureRequest, fleet_on: Callable[[str], Fleet]) -> Iterator[Talk]:
    cell: Cell = request.param
    fleet = fleet_on(cell.broker)
    yield Talk(cell, fleet)
    print(fleet.show())  # pytest prints it only for a failed test


def between(*features: str) -> pytest.MarkDecorator:
    """One test for each cell that can be."""
    return pytest.mark.parametrize("talk", list(cells(features)), ids=str, indirect=True)


@between("success")
def test_success(talk: Talk) -> None:
    assert talk.run("add", [2, 3]) == 5
    value = {"nested": [1, 2.5, None, True], "text": "é \N{BLOSSOM}", "empty": {}}
    assert talk.run("echo", [value]) == value


@between("failure")
def test_failure(talk: Talk) -> None:
    if talk.cell.worker == "node":  # it stores that the task failed, and nothing of why
        failed = talk.send("fail", ["Boom"])
        until(lambda: talk.client.look(failed)["state"] == "FAILURE", "the failure is stored")
        if talk.cell.client == "umbel":
            assert talk.client.catch(failed)["class"] == "umbel.errors.TaskFailed"
        return
    for kind, cls, args in [
        ("Boom", "interop_errors.Boom", ["broken", 42]),
        ("ValueError", "builtins.ValueError", ["bad"]),
        ("KeyError", "builtins.KeyError", ["missing"]),
    ]:
        caught = talk.client.catch(talk.send("fail", [kind]))
        assert (caught["class"], caught["args"]) == (cls, args)


@between("retry")
def test_retry(talk: Talk) -> None:
    assert talk.run("flaky", [2]) == 2
    spent = (
        "umbel.errors.MaxRetriesExceeded"
        if talk.cell.client == "umbel"
        else "celery.exceptions.MaxRetriesExceededError"
    )
    assert talk.client.catch(talk.send("hopeless"))["class"] == spent


@between("eta")
def test_eta(talk: Talk) -> None:
    sent = time.time()
    later = talk.send("clock", countdown=1.0)
    now = talk.run("clock")
    ran = talk.client.get(later)
    assert ran >= sent + 1.0 - EARLY
    assert now < ran or now >= sent + 1.0, "what is due later stands in the way"


@between("expires")
def test_expires(talk: Talk) -> None:
    """The worker says so in the result. RabbitMQ drops what has expired before a worker had it: then nobody says anything."""
    with talk.busy():
        expired = talk.send("note", [1, f"expired-{talk.name}"], expires=0.3)
        in_time = talk.send("note", [2, f"in-time-{talk.name}"], expires=60)
        time.sleep(0.4)
    assert talk.client.get(in_time) == 2
    if talk.cell.broker == "redis" or talk.client.look(expired)["state"] != "PENDING":
        late = "umbel.errors.TaskRevoked" if talk.cell.client == "umbel" else "celery.exceptions.TaskRevokedError"
        assert talk.client.catch(expired)["class"] == late
    assert not talk.fleet.noted(f"expired-{talk.name}")


@between("priority")
def test_priority(talk: Talk) -> None:
    queue = f"{talk.queue}-priority"
    with talk.busy(queue):
        sent = [talk.send("priority", queue=queue, priority=priority) for priority in (3, 9, 6)]
        talk.fleet.wait_for(len(sent), queue)
    order = [seen for seen, _ in sorted((talk.client.get(id) for id in sent), key=lambda answer: answer[1])]
    lowest_first = (talk.cell.broker, talk.cell.worker) == ("redis", "celery")
    assert order == ([3, 6, 9] if lowest_first else [9, 6, 3])


@between("ignore_result")
def test_ignore_result(talk: Talk) -> None:
    ignored = talk.send("note", [1, talk.name], ignore_result=True)
    assert talk.run("add", [1, 1]) == 2  # runs after it
    assert talk.fleet.note(talk.name) == 1
    assert talk.client.look(ignored)["state"] == "PENDING"


@between("link")
def test_link(talk: Talk) -> None:
    sent = talk.send("add", [2, 3], link=["interop.note", [talk.name]])
    assert talk.client.get(sent) == 5
    assert talk.fleet.note(talk.name) == 5
    (child,) = talk.client.look(sent)["children"]
    assert talk.client.get(child) == 5


@between("errback")
def test_errback(talk: Talk) -> None:
    sent = talk.send("fail", ["Boom"], link_error=["interop.on_error", []])
    assert talk.fleet.note(f"error-{sent}") == sent
    assert talk.client.catch(sent)["class"] == "interop_errors.Boom"


@between("chain")
def test_chain(talk: Talk) -> None:
    steps = [["interop.add", [10]], ["interop.echo", []]]
    assert talk.run("add", [1, 2], steps=steps) == 13
    broken = talk.send("fail", ["Boom"], steps=steps)
    assert talk.client.catch(broken)["class"] == "interop_errors.Boom", "the last of a chain fails with the first"


SAMPLES = {
    "json": "{'bytes': b'text', 'text': 'é'}",
    "msgpack": "{'bytes': b'\\x00\\xff', 'list': [1, 2.5, None]}",
    "yaml": "{'list': [1, 2.5, None], 'text': 'é'}",
    "pickle": "{'set': {1}, 'tuple': (1, b'\\x00\\xff')}",
}
"""What each serializer carries, as Python writes it."""


@between(*FORMS)
def test_form(talk: Talk) -> None:
    if talk.cell.feature in SAMPLES:
        sample = SAMPLES[talk.cell.feature]
        assert talk.run("describe", literal=sample, serializer=talk.cell.feature) == sample
    else:
        sample = SAMPLES["json"].replace("text", "text" * 1000)
        assert talk.run("describe", literal=sample, compression=talk.cell.feature) == sample


# --- beside the matrix --------------------------------------------------------------------------


@pytest.mark.parametrize("broker", BROKERS)
@pytest.mark.parametrize("worker", ["umbel", "celery"])
def test_protocol_1_of_celery_node(broker: str, worker: str, fleet_on: Callable[[str], Fleet]) -> None:
    fleet = fleet_on(broker)
    fleet.worker(worker)
    node = fleet.client("node")
    assert node.get(node.send("interop.add", [2, 3], queue=f"interop-{worker}", protocol=1)) == 5


@pytest.mark.parametrize("broker", BROKERS)
@pytest.mark.parametrize("client", ["umbel", "celery"])
@pytest.mark.parametrize("way", [["umbel", "celery", "node"], ["celery", "umbel", "node"]], ids="-".join)
def test_a_chain_through_workers_of_every_kind(
    broker: str, client: str, way: list[str], fleet_on: Callable[[str], Fleet]
) -> None:
    """Each worker sends the next step to the queue that the step names; celery-node, which sends nothing, comes last."""
    fleet = fleet_on(broker)
    for peer in way:
        fleet.worker(peer)
    first, *others = (f"interop-{peer}" for peer in way)
    steps = [["interop.add", [10 * number], {"queue": queue}] for number, queue in enumerate(others, 1)]
    sender = fleet.client(client)
    assert sender.get(sender.send("interop.add", [1, 2], queue=first, steps=steps)) == 33


# --- captured messages --------------------------------------------------------------------------

CORPUS = Path(__file__).parents[1] / "wire/corpus"


@frozen
class Captured:
    """One captured task message, as an answer to: what is it to become?"""

    name: str
    entry: Mapping[str, Any]

    def __str__(self) -> str:
        return self.name

    @property
    def headers(self) -> Mapping[str, Any]:
        """Of protocol 1 the body, which holds them."""
        body = self.entry["decoded"]
        return body if isinstance(body, Mapping) else self.entry["headers"]

    @property
    def call(self) -> tuple[str, list[Any], Mapping[str, Any], Mapping[str, Any]]:
        """Task, arguments, keyword arguments, and what rides beside them."""
        body = self.entry["decoded"]
        args, kwargs, embed = (body["args"], body["kwargs"], body) if isinstance(body, Mapping) else body
        return self.headers["task"], args, kwargs, embed or {}

    @property
    def runs(self) -> bool:
        """Chords, and the tasks of Celery's own that map, need a workflow engine; signed messages need keys, and are tested
        where their serializer is."""
        if self.entry["content_type"] == "application/data":
            return False
        task, _, _, embed = self.call
        text = json.dumps({part: embed.get(part) for part in ("callbacks", "errbacks", "chain", "chord")})
        return not task.startswith("celery.") and '"chord": {' not in text and '"celery.chord"' not in text

    @property
    def value(self) -> Any:
        task, args, kwargs, _ = self.call
        x, y = [*args, *kwargs.values(), None, None][:2]
        values = {"wire.add": lambda: x + y, "wire.mul": lambda: x * y, "wire.xsum": lambda: sum(x)}
        values |= {"wire.onerr1": lambda: x, "wire.retryme": lambda: self.headers["retries"]}
        return values.get(task, lambda: [args, kwargs])()

    def moment(self, header: str) -> datetime:
        moment = datetime.fromisoformat(self.headers.get(header) or "2026-01-01")
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def captured() -> Iterator[Captured]:
    for file in sorted(CORPUS.glob("0[123459]-*.json")):
        for entry in json.loads(file.read_text()):
            if (one := Captured(f"{file.name[:2]}-{entry['name']}", entry)).runs:
                yield one


@pytest.mark.parametrize("message", list(captured()), ids=str)
def test_a_captured_message_runs(message: Captured, fleet_on: Callable[[str], Fleet]) -> None:
    fleet = fleet_on("redis" if message.entry["broker"] == "redis" else "rabbitmq")
    fleet.worker("umbel")
    client, id = fleet.client("umbel"), message.headers["id"]
    fleet.client("celery").ask("replay", queue="interop-umbel", entry=message.entry)
    if message.moment("eta") > datetime.now(UTC) or message.headers.get("ignore_result"):
        assert client.get(client.send("interop.add", [1, 1], queue="interop-umbel")) == 2  # comes after it
        assert client.look(id)["state"] == "PENDING"
    elif message.headers.get("expires") and message.moment("expires") < datetime.now(UTC):
        assert client.catch(id)["class"] == "umbel.errors.TaskRevoked"
    else:
        assert client.get(id) == message.value
        number = message.value
        for step in reversed(message.call[3].get("chain") or []):
            number *= step["args"][0]
            assert client.get(step["options"]["task_id"]) == number


def test_messages_of_every_captured_file_run() -> None:
    assert {one.name[:2] for one in captured()} == {"01", "02", "03", "04", "05", "09"}


def test_every_feature_is_tested() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert tested >= set(FEATURES)
