"""Typed tasks: what a caller gives is what the function gets, and what it returns is what ``get()`` returns."""

from __future__ import annotations

import dataclasses
import enum
import math
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from attrs import define

from umbel import Umbel
from umbel.errors import DecodeError, EncodeError
from umbel.model import Message
from umbel.task import Task
from umbel.worker.execution import TaskExecutor
from umbel.worker.outcomes import Records

from .fakes import Fakes, close_runner


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


class Level(enum.IntEnum):
    HIGH = 3


@define
class Point:
    x: int
    y: float = 0.0


@define
class Order:
    id: UUID
    placed: datetime
    total: Decimal
    colour: Colour
    points: list[Point]
    notes: dict[str, Point | None]


@dataclasses.dataclass
class Leg:
    start: date
    length: timedelta
    stop: Point


ORDER = Order(
    id=UUID("12345678-1234-5678-1234-567812345678"),
    placed=datetime(2030, 1, 2, 3, 4, 5, 6, UTC),
    total=Decimal("1.50"),
    colour=Colour.BLUE,
    points=[Point(1, 2.5), Point(3)],
    notes={"a": Point(4), "b": None},
)
LEG = Leg(date(2030, 1, 2), timedelta(minutes=1.5), Point(9))


def order(value: Order) -> Order:
    return value


def leg(value: Leg) -> Leg:
    return value


def scalars(
    moment: datetime, day: date, hour: time, span: timedelta, id: UUID, amount: Decimal, colour: Colour, level: Level
) -> tuple[datetime, date, time, timedelta, UUID, Decimal, Colour, Level]:
    return moment, day, hour, span, id, amount, colour, level


def nested(value: dict[str, list[tuple[int, Point]]]) -> dict[str, list[tuple[int, Point]]]:
    return value


def sets(value: set[int], frozen: frozenset[Colour]) -> tuple[set[int], frozenset[Colour]]:
    return value, frozen


def optional(value: Point | None = None, *, other: int | str = 3) -> Point | None:
    return value


def many(*points: Point, **named: Leg) -> list[Point]:
    assert all(isinstance(each, Leg) for each in named.values())
    return list(points)


async def later(value: Order) -> Order:
    return value


def bound(self: Task[..., Any], value: Point) -> Point:
    assert isinstance(self, Task)
    return value


def loose(anything, value: Any):  # type: ignore[no-untyped-def]  # the point
    return [anything, value]


def run(app: Umbel, fakes: Fakes, task: Task[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Send, run here, store, and get."""
    handle = task.delay(*args, **kwargs)
    message = fakes.broker.find(handle.id).message
    executor = TaskExecutor(app, "here")
    outcome = Records(app, "here").from_plain(executor.execute(("run", message.to_plain(), "default", 1, "")), message)
    fakes.shelf.records |= {result.task_id: result for result in outcome.results}
    close_runner(executor)
    return handle.get(1)


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (order, (ORDER,), {}),
        (leg, (LEG,), {}),
        (nested, ({"a": [(1, Point(2)), (3, Point(4))]},), {}),
        (optional, (Point(1),), {"other": "text"}),
        (optional, (None,), {}),
        (optional, (), {}),
        (later, (ORDER,), {}),
    ],
)
def test_values_of_ones_own_classes_round_trip(app: Umbel, fakes: Fakes, function: Any, args: Any, kwargs: Any) -> None:
    task = app.task(typed=True)(function)
    assert run(app, fakes, task, *args, **kwargs) == (args[0] if args else None)


def test_scalars_round_trip(app: Umbel, fakes: Fakes) -> None:
    values = (
        ORDER.placed, LEG.start, time(3, 4, 5), LEG.length, ORDER.id, ORDER.total, Colour.RED, Level.HIGH,
    )  # fmt: skip
    got = run(app, fakes, app.task(typed=True)(scalars), *values)
    assert got == values
    assert [type(value) for value in got] == [type(value) for value in values]


def test_sets_round_trip(app: Umbel, fakes: Fakes) -> None:
    got = run(app, fakes, app.task(typed=True)(sets), {1, 2}, frozenset({Colour.RED}))
    assert got == ({1, 2}, frozenset({Colour.RED}))


def test_variable_arguments_are_structured_each(app: Umbel, fakes: Fakes) -> None:
    points = [Point(1), Point(2)]
    assert run(app, fakes, app.task(typed=True)(many), *points, a=LEG, b=LEG) == points


def test_a_bound_task_is_typed_but_for_itself(app: Umbel, fakes: Fakes) -> None:
    assert run(app, fakes, app.task(typed=True, bind=True)(bound), Point(1)) == Point(1)


def test_what_has_no_annotation_is_left_as_it_came(app: Umbel, fakes: Fakes) -> None:
    assert run(app, fakes, app.task(typed=True)(loose), {"x": 1}, [2]) == [{"x": 1}, [2]]


def test_what_travels_is_plain_data(app: Umbel, fakes: Fakes) -> None:
    handle = app.task(typed=True)(order).delay(ORDER)
    body = fakes.broker.find(handle.id).message.body
    assert b'"points": [{"x": 1, "y": 2.5}, {"x": 3, "y": 0.0}]' in body
    assert b'"colour": 2' in body


def test_a_task_that_is_not_typed_gets_what_the_serializer_gives(app: Umbel, fakes: Fakes) -> None:
    assert run(app, fakes, app.task(optional), {"x": 1}) == {"x": 1}
    with pytest.raises(EncodeError):
        app.tasks[f"{__name__}.optional"].delay(Point(1))


@pytest.mark.parametrize(
    ("function", "argument", "what"),
    [(order, {"id": "x"}, "argument 'value' does not fit"), (nested, {"a": [["x", {}]]}, "argument 'value'")],
)
def test_an_argument_that_does_not_fit_fails_the_task_naming_the_parameter(
    app: Umbel, fakes: Fakes, function: Any, argument: Any, what: str
) -> None:
    with pytest.raises(DecodeError, match=what):
        run(app, fakes, app.task(typed=True)(function), argument)


def test_arguments_that_do_not_fit_the_signature_are_a_type_error_as_in_any_call(app: Umbel, fakes: Fakes) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'nope'"):
        run(app, fakes, app.task(typed=True)(order), nope=1)


def test_a_result_that_does_not_fit_says_so_at_get(app: Umbel, fakes: Fakes) -> None:
    def lies() -> int:
        return "text"  # type: ignore[return-value]  # the point

    with pytest.raises(DecodeError, match="the result does not fit"):
        run(app, fakes, app.task(typed=True)(lies))


def test_what_cannot_be_turned_into_plain_data_raises_at_the_call(app: Umbel, fakes: Fakes) -> None:
    class Odd:
        pass

    with pytest.raises(EncodeError):
        app.task(typed=True)(loose).delay(Odd(), 1)
    assert fakes.broker.empty


def test_a_moment_that_is_not_one_says_which_argument(app: Umbel, fakes: Fakes) -> None:
    def at(moment: datetime) -> None: ...

    with pytest.raises(DecodeError, match="argument 'moment'"):
        run(app, fakes, app.task(typed=True)(at), "soon")


def test_nothing_is_lost_on_the_way(app: Umbel, fakes: Fakes) -> None:
    def number(value: float) -> float:
        return value

    task = app.task(typed=True)(number)
    assert run(app, fakes, task, 0.1 + 0.2) == 0.1 + 0.2
    assert math.isinf(run(app, fakes, task, math.inf))


def test_messages_and_outcomes_are_plain_data_for_a_pipe(app: Umbel, fakes: Fakes) -> None:
    import marshal

    handle = app.task(typed=True)(order).delay(ORDER)
    message = fakes.broker.find(handle.id).message
    payload = ("run", marshal.loads(marshal.dumps(message.to_plain())), "default", 1, "")
    answer = TaskExecutor(app, "here").execute(payload)
    records = Records(app, "here")
    assert records.from_plain(marshal.loads(marshal.dumps(answer)), message) == records.from_plain(answer, message)
    assert Message.from_plain(message.to_plain()) == message
