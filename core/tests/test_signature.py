"""A call as a value."""

from __future__ import annotations

from typing import Any

import pytest

from umbel import Umbel
from umbel.canvas.signature import Signature, plain_signatures
from umbel.errors import DecodeError

from .fakes import Fakes


def add(x: int, y: int, z: int = 0) -> int:
    return x + y + z


def test_the_wire_form_has_six_keys_always() -> None:
    assert Signature(task="t").to_plain() == {
        "task": "t", "args": [], "kwargs": {}, "options": {}, "subtask_type": None, "immutable": False,
    }  # fmt: skip


def test_what_is_written_reads_back(app: Umbel) -> None:
    signature = app.task(add).signature((1,), {"z": 2}, queue="mail", task_id="id-1")
    assert Signature.from_plain(signature.to_plain()) == signature
    assert Signature.from_plain({"task": "t"}) == Signature(task="t")
    assert Signature.from_plain({"task": "t", "args": None, "kwargs": None, "options": None}) == Signature(task="t")


@pytest.mark.parametrize(
    "plain",
    [{}, {"task": 3}, {"task": "t", "args": "ab"}, {"task": "t", "args": 3}, {"task": "t", "kwargs": [1]},
     {"task": "t", "options": "x"}],
)  # fmt: skip
def test_what_is_no_signature_is_a_decode_error(plain: dict[str, Any]) -> None:
    with pytest.raises(DecodeError):
        Signature.from_plain(plain)


def test_results_come_in_front_of_the_arguments(app: Umbel) -> None:
    assert app.task(add).s(2, 3).after(1).args == (1, 2, 3)


def test_an_immutable_signature_ignores_results(app: Umbel) -> None:
    signature = app.task(add).si(2, 3)
    assert signature.immutable
    assert signature.after(1) is signature


def test_setting_options_makes_another_value(app: Umbel) -> None:
    first = app.task(add).s(1)
    second = first.set(queue="mail").set(priority=3)
    assert first.options == {}
    assert second.options == {"queue": "mail", "priority": 3}


def test_sending_puts_arguments_in_front_and_keywords_over(app: Umbel, fakes: Fakes) -> None:
    signature = app.task(add).signature((2,), {"z": 9}, queue="mail", priority=1)
    signature.apply_async((1,), {"z": 3}, priority=4)
    (message,) = fakes.broker.messages("mail")
    assert message.body.startswith(b'[[1, 2], {"z": 3}')
    assert message.priority == 4


def test_a_signature_by_name_is_sent_to_a_task_that_is_not_here(app: Umbel, fakes: Fakes) -> None:
    app.signature("elsewhere.task", (1,)).delay()
    assert [m.task for m in fakes.broker.messages()] == ["elsewhere.task"]


def test_a_signature_of_no_app_cannot_be_sent() -> None:
    with pytest.raises(ValueError, match=r"app\.signature"):
        Signature(task="t").delay()


def test_links_are_given_as_one_or_several_signatures_or_dictionaries(app: Umbel) -> None:
    one = app.task(add).s(1)
    assert plain_signatures(None) == []
    assert plain_signatures(one) == [one.to_plain()]
    assert plain_signatures(one.to_plain()) == [one.to_plain()]
    assert plain_signatures([one, one.to_plain(), [one]]) == [one.to_plain()] * 3
    with pytest.raises(TypeError, match="not int"):
        plain_signatures(3)
