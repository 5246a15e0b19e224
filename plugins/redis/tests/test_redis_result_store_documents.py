"""Records as they stand in Redis, without one."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from umbel.errors import DecodeError
from umbel.model import Result
from umbel_redis.documents import FORMS, read, side_of, whole, write

JSON = FORMS["json"]
CAPTURED = [
    item
    for item in json.loads(
        (Path(__file__).parents[3] / "tests/wire/corpus/06-results.json").read_text(encoding="utf-8")
    )
    if item["kind"] == "result" and item.get("serializer") in FORMS and "compressed" not in item["name"]
]


def result(state: str = "SUCCESS", document: bytes | None = None, **fields: Any) -> Result:
    plain = {"status": state, "result": 5, "task_id": "1"}
    return Result(
        task_id="1", state=state, document=json.dumps(plain).encode() if document is None else document, **fields
    )


@pytest.mark.parametrize("expires", [None, 86400.0, 0.25, 1e-7, 1e20])
@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "HALF WAY"])
def test_a_json_document_needs_no_second_key(state: str, expires: float | None) -> None:
    for separators in ((", ", ": "), (",", ":")):
        document = json.dumps({"status": state, "result": {"a": 1}}, separators=separators).encode()
        put = result(state, document, expires=expires)
        value, side = write(put)
        assert side == b""
        assert whole("1", value) == put == read("1", value, None, JSON)
        plain = json.loads(value)
        assert plain.pop("umbel-expires") == expires
        assert plain == json.loads(document)


@pytest.mark.parametrize(
    "put",
    [
        result(document=b""),
        result(document=b"{}"),
        result(document=b'{"status": "FAILURE"}'),
        result(document=b'{"status": "SUCCESS"} '),
        result(state='a"b\\', document=json.dumps({"status": 'a"b\\'}).encode()),
        result(state="ü", document=json.dumps({"status": "ü"}).encode()),
        result(content_type="application/x-other", expires=3.5),
        result(content_encoding="utf-16"),
        result(content_type="application/x-msgpack", document=b"\x81\xa6status\xa7SUCCESS"),
    ],
    ids=lambda put: repr(put.document),
)
def test_any_other_comes_back_whole_with_the_help_of_one(put: Result) -> None:
    value, side = write(put)
    assert value == put.document
    assert whole("1", value) is None
    assert read("1", value, side, JSON) == put


def test_what_stands_beside_a_record_does_not_speak_for_anothers_document() -> None:
    _, side = write(result("STARTED", content_type="application/x-msgpack", document=b"\x81"))
    foreign = b'{"task_id": "1", "status": "SUCCESS", "result": 1}'
    assert read("1", foreign, side, JSON) == Result(task_id="1", state="SUCCESS", document=foreign)


@pytest.mark.parametrize("item", CAPTURED, ids=lambda item: item["name"])
def test_what_celery_was_seen_to_write_is_read(item: dict[str, Any]) -> None:
    document = base64.b64decode(item["body_base64"])
    found = read("1", document, None, FORMS[item["serializer"]])
    assert (found.state, found.content_type) == (item["decoded"]["status"], item["content_type"])
    assert found.document == document


def test_the_capture_has_every_form_and_end() -> None:
    assert {item["serializer"] for item in CAPTURED} == set(FORMS)
    assert {item["decoded"]["status"] for item in CAPTURED} >= {"SUCCESS", "FAILURE", "REVOKED", "RETRY"}


@pytest.mark.parametrize(
    "document",
    [
        b'{"status": "SUCCESS", "result": {"a": 1, "umbel-expires": 5}}',
        b'{"status": "SUCCESS", "result": "x, \\"umbel-expires\\": 5}"}',
        b'{"status": "SUCCESS", "result": ", \\"umbel-expires\\": 5}',
        b'{"result": 1, "status": "SUCCESS", "umbel-expires": 5}',
        b'{"status": "SUCCESS", "result": 1, "umbel-expires": "5"}',
    ],
)
def test_only_our_own_last_field_makes_a_document_whole(document: bytes) -> None:
    assert whole("1", document) is None


def test_a_record_and_what_stands_beside_it_lie_in_one_slot() -> None:
    from redis.crc import key_slot

    for record in ("celery-task-meta-1", "p_celery-task-meta-ü", "celery-task-meta-{a}b", "{x}_celery-task-meta-1"):
        assert key_slot(record.encode()) == key_slot(side_of(record).encode())


@pytest.mark.parametrize(
    "document",
    [
        b"\0celery-compressed\0application/x-gzip\0abc",
        b"",
        b"[]",
        b"5",
        b"{}",
        b'{"status": 5}',
        b"\x80\x04",
        b'{"status',
    ],
)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_is_no_document_is_refused_and_named(document: bytes, form: Any) -> None:
    with pytest.raises(DecodeError, match="the record of task the-id"):
        read("the-id", document, None, form)
