"""The tasks of an app, by name."""

from __future__ import annotations

from typing import Any

import pytest

from umbel import Umbel
from umbel.errors import UnknownTask


def add(x: int, y: int) -> int:
    return x + y


def test_a_task_is_found_by_its_name(app: Umbel) -> None:
    task = app.task(add)
    assert app.tasks[f"{__name__}.add"] is task
    assert list(app.tasks) == [task.name]
    assert len(app.tasks) == 1
    assert task.name in app.tasks
    assert "add" not in app.tasks


def test_an_unknown_name_is_answered_with_the_nearest(app: Umbel) -> None:
    app.task(name="shop.send_mail")(add)
    with pytest.raises(UnknownTask, match=r"'shop.send_mial'; did you mean 'shop.send_mail'\?"):
        app.tasks["shop.send_mial"]


def test_a_name_like_no_other_is_answered_with_where_to_look(app: Umbel) -> None:
    with pytest.raises(UnknownTask, match="is its module in the settings' app or imports"):
        app.tasks["other.thing"]


def test_two_functions_cannot_have_one_name(app: Umbel) -> None:
    app.task(name="shop.sum")(add)

    def other() -> None: ...

    with pytest.raises(ValueError, match=r"two tasks are named 'shop.sum': .*add and .*other; give one of them a name"):
        app.task(name="shop.sum")(other)
    assert app.tasks["shop.sum"].run is add


def test_a_module_that_is_reloaded_replaces_its_tasks(app: Umbel) -> None:
    source = "def job(): return {}"
    for version in (1, 2):
        scope: dict[str, Any] = {"__name__": "shop.tasks"}
        exec(source.format(version), scope)
        app.task(scope["job"])
    assert app.tasks["shop.tasks.job"]() == 2
