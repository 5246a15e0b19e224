"""Result documents of ours are Celery's, byte for byte: what a store keeps needs no bridge."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from umbel import Umbel, protocol

ENTRIES: list[Mapping[str, Any]] = json.loads(
    (Path(__file__).parent / "corpus" / "06-results.json").read_text(encoding="utf-8")
)
STANDARD = {"status", "result", "traceback", "children", "date_done", "group_id", "parent_id", "task_id"}


def documents() -> list[Mapping[str, Any]]:
    """Task results that Celery itself has written as JSON, uncompressed; rpc replies among them."""
    plain = [e for e in ENTRIES if e.get("content_type") == "application/json" and "-node-" not in e["name"]]
    return [e for e in plain if "status" in e["decoded"] and base64.b64decode(e["body_base64"])[:1] == b"{"]


def test_the_corpus_has_every_kind_of_end() -> None:
    assert {"SUCCESS", "FAILURE", "REVOKED", "RETRY", "PROGRESS"} == {e["decoded"]["status"] for e in documents()}


@pytest.mark.parametrize("entry", documents(), ids=lambda entry: entry["name"])
def test_a_document_of_ours_is_the_captured_one(entry: Mapping[str, Any]) -> None:
    theirs = entry["decoded"]
    document = protocol.result_document(
        theirs["task_id"],
        theirs["status"],
        theirs["result"],
        traceback=theirs["traceback"],
        children=theirs["children"],
        done=protocol.parse_time(theirs["date_done"]),
        group_id=theirs.get("group_id"),
        parent_id=theirs.get("parent_id"),
        extra={name: value for name, value in theirs.items() if name not in STANDARD},
    )
    ours = Umbel("corpus").result_codec.encode(document)
    assert (ours.content_type, ours.content_encoding) == ("application/json", "utf-8")
    body = base64.b64decode(entry["body_base64"])
    assert json.loads(ours.body) == json.loads(body)
    assert list(json.loads(ours.body)) == list(json.loads(body)), (
        "in the same order: some readers look at the beginning"
    )
    assert ours.body == body
