"""Real messages of other clients: every one is read, written again, and means the same."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from umbel import Umbel, protocol
from umbel.model import Message
from umbel.protocol import STANDARD_HEADERS, make_body, make_headers, read_invocation

CORPUS = Path(__file__).parent / "corpus"
ENTRIES: list[Mapping[str, Any]] = [
    {**entry, "file": path.name}
    for path in sorted(CORPUS.glob("0*.json"))
    for entry in json.loads(path.read_text(encoding="utf-8"))
]
SIGNED = "application/data"
"""Signed bodies are read by the serializer ``auth``, which is not there yet."""
TASKS = [entry for entry in ENTRIES if entry["kind"] == "task" and entry.get("content_type") != SIGNED]
RESULTS = [entry for entry in ENTRIES if entry["kind"] == "result"]

SERIALIZERS = ("json", "pickle", "yaml", "msgpack")
COMPRESSORS = ("zlib", "bzip2", "lzma", "brotli", "zstd")


def name_of(entry: Mapping[str, Any]) -> str:
    return f"{entry['file'][:2]}-{entry['name']}"


@pytest.fixture(scope="module")
def app() -> Umbel:
    settings = {"codec.accept": SERIALIZERS, "codec.accept_compression": COMPRESSORS}
    return Umbel("corpus", settings=settings)


def invocation_of(entry: Mapping[str, Any], app: Umbel) -> protocol.Invocation:
    headers = entry.get("headers") or {}
    body = app.codec.decode(base64.b64decode(entry["body_base64"]), entry["content_type"], headers.get("compression"))
    return read_invocation(headers, body)


@pytest.mark.parametrize("entry", TASKS, ids=name_of)
def test_every_captured_task_message_is_read(entry: Mapping[str, Any], app: Umbel) -> None:
    got = invocation_of(entry, app)
    headers, decoded = entry.get("headers") or {}, entry["decoded"]
    if headers.get("task"):
        assert (got.task, got.id) == (headers["task"], headers["id"])
        args, kwargs = decoded[0], decoded[1]
    else:
        assert (got.task, got.id) == (decoded["task"], decoded["id"])
        args, kwargs = decoded["args"], decoded["kwargs"]
    if "__" not in json.dumps([args, kwargs]):  # markers of the corpus for values that JSON does not have
        assert json.loads(json.dumps([list(got.args), got.kwargs])) == [args or [], kwargs or {}]
    if headers.get("timelimit"):
        assert [got.time_limit, got.soft_time_limit] == headers["timelimit"]


@pytest.mark.parametrize("entry", TASKS, ids=name_of)
def test_what_was_read_can_be_written_and_read_again(entry: Mapping[str, Any], app: Umbel) -> None:
    first = invocation_of(entry, app)
    headers = make_headers(
        first.task,
        first.id,
        eta=first.eta,
        expires=first.expires,
        retries=first.retries,
        time_limit=first.time_limit,
        soft_time_limit=first.soft_time_limit,
        root_id=first.root_id,
        parent_id=first.parent_id,
        group=first.group,
        group_index=first.group_index,
        shadow=first.shadow,
        origin=first.origin or "",
        ignore_result=first.ignore_result,
        replaced_task_nesting=first.replaced_task_nesting,
        stamped_headers=first.stamped_headers,
        stamps=first.stamps,
        headers=first.headers,
    )
    body = make_body(first.args, first.kwargs, first.embed)
    encoded = app.codec.encode(json.loads(json.dumps(body, default=str)))
    again = read_invocation(headers, app.codec.decode(encoded.body, encoded.content_type))
    same = ("id", "task", "eta", "expires", "retries", "time_limit", "soft_time_limit", "root_id", "parent_id", "group",
            "group_index", "shadow", "ignore_result", "replaced_task_nesting", "stamps")  # fmt: skip
    for field in same:
        assert getattr(again, field) == getattr(first, field), field
    assert json.dumps(again.embed.to_plain()) == json.dumps(first.embed.to_plain(), default=str)


@pytest.mark.parametrize("entry", [e for e in TASKS if (e.get("headers") or {}).get("origin")], ids=name_of)
def test_celery_sends_the_headers_that_we_send(entry: Mapping[str, Any]) -> None:
    ours = make_headers("t", "1").keys()
    theirs = entry["headers"].keys() & STANDARD_HEADERS - {"compression"}
    assert ours >= theirs


@pytest.mark.parametrize("entry", RESULTS, ids=name_of)
def test_every_captured_result_is_read(entry: Mapping[str, Any], app: Umbel) -> None:
    decoded = entry["decoded"]
    if not isinstance(decoded, dict) or "status" not in decoded or not isinstance(decoded.get("result"), dict):
        return
    if "exc_type" in decoded["result"]:
        exc = protocol.exception_from_plain(decoded["result"], decoded.get("traceback"))
        again = protocol.exception_to_plain(exc)
        assert again["exc_type"] == decoded["result"]["exc_type"]
        assert again["exc_module"] == decoded["result"]["exc_module"]


def test_a_message_of_ours_has_the_shape_of_a_captured_one(app: Umbel) -> None:
    captured = next(e for e in TASKS if e["file"].startswith("03") and e["name"] == "add-plain")

    @app.task(name="wire.add")
    def add(x: int, y: int) -> int:
        return x + y

    ours: Message = add.message((2, 3), task_id=captured["headers"]["id"])
    assert ours.headers.keys() == captured["headers"].keys()
    volatile = {"origin"}
    for header in captured["headers"].keys() - volatile:
        assert ours.headers[header] == captured["headers"][header], header
    assert ours.body == base64.b64decode(captured["body_base64"])
    assert ours.content_type == captured["content_type"]
    assert ours.content_encoding == captured["content_encoding"]
