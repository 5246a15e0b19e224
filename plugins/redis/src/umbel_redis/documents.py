"""Records as they stand in Redis, where Celery reads and writes them too.

The value of the key is the result document itself. What a ``Result`` holds beside it is found in one of three places:

- A JSON document that begins with its status takes more fields as its last, ``umbel-expires`` and, of a passing state that
  has one, ``umbel-order``, and is *whole*: nothing else is needed to read it. Other programs ignore the fields; ``read``
  takes them off again.
- For any other document of ours a second key, in the same slot, holds the rest and the digest of the document, so that it
  never speaks for a document that another program has put there since.
- What another program wrote is in the form that the option ``foreign_serializer`` names, and its status is found by the
  fixed way in which that form begins; no body is decoded here, but for JSON that begins with something else.
"""

from __future__ import annotations

import bz2
import json
import lzma
import re
import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from hashlib import sha1
from typing import Any, Final, Literal

from attrs import frozen

from umbel.errors import DecodeError
from umbel.model import FINAL_STATES, Result

_EXPIRES: Final = b', "umbel-expires": '
_ORDER: Final = b', "umbel-order": '
_TRAILER: Final = re.compile(_EXPIRES + rb"(null|[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)(?:" + _ORDER + rb"[0-9]+)?\}")
_TRAILER_LENGTH: Final = 96
_COMPRESSED: Final = b"\0celery-compressed\0"
_DECOMPRESSORS: Final[Mapping[str, Callable[[], Any]]] = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": lzma.LZMADecompressor,
}
_BEGINNING: Final = 4096
"""Bytes of a compressed document that are looked at for its status."""


@frozen
class Form:
    """How documents of one serializer look from outside."""

    content_type: str
    content_encoding: str
    status: re.Pattern[bytes]
    """Matches the beginning of a document up to the status, which is the group."""
    lua: bytes
    """Likewise for a final status, as a pattern of Lua's."""


_STATUS: Final = re.compile(rb'\s*\{\s*"status"\s*:\s*"([^"\\]*)"')

FORMS: Final = {
    "json": Form(
        "application/json",
        "utf-8",
        _STATUS,
        b'^%s*{%s*"status"%s*:%s*"(%u+)"',
    ),
    "msgpack": Form(
        "application/x-msgpack",
        "binary",
        re.compile(rb"(?s)(?:[\x80-\x8f]|\xde..)\xa6status(?:[\xa0-\xbf]|\xd9.)([ -~]*)"),
        b"^.?.?.\xa6status\xa7(%u+)",
    ),
    "pickle": Form(
        "application/x-python-serialize",
        "binary",
        re.compile(rb"(?s)\x80[\x04\x05].{0,12}?\x8c\x06status\x94\x8c.([ -~]*)\x94"),
        b"^\x80.-\x8c\x06status\x94\x8c\x07(%u+)",
    ),
    "yaml": Form(
        "application/x-yaml",
        "utf-8",
        re.compile(rb"(?s)(?:.*?\n)?status: '?([^'\n]*)'?(?:\n|\Z)"),
        b"\nstatus: (%u+)\n",
    ),
}


def side_of(record: str) -> str:
    """The key beside ``record``, in its slot: what stands in the first braces of a name decides about that."""
    return record + ".umbel" if "{" in record else "{" + record + "}.umbel"


def write(result: Result) -> tuple[bytes, bytes]:
    """The value of the record's key, and of the key beside it; empty where that is not needed."""
    document = result.document
    if (
        result.content_type == "application/json"
        and result.content_encoding == "utf-8"
        and document.startswith(_beginnings(result.state))
        and document.endswith(b"}")
    ):
        return document[:-1] + _trailer(result.expires, 0 if result.final else result.order), b""
    rest = [result.state, result.content_type, result.content_encoding, result.expires, result.order]
    side = (b"F" if result.final else b"-") + _digest(document) + json.dumps(rest).encode()
    return document, side


def whole(task_id: str, document: bytes) -> Result | None:
    """The result, if the document says all there is to know."""
    at = document.rfind(_EXPIRES, -_TRAILER_LENGTH)
    if at < 0 or (expires := _expires(document[at:])) is False:
        return None
    status = _STATUS.match(document)
    if status is None:
        return None
    return Result(
        task_id=task_id, state=status[1].decode(errors="replace"), document=document[:at] + b"}", expires=expires
    )


def read(task_id: str, document: bytes, side: bytes | None, form: Form) -> Result:
    """The result that stands in the two keys. Raises ``DecodeError`` where another program's document is not of ``form``."""
    if (result := whole(task_id, document)) is not None:
        return result
    if side and side[1:41] == _digest(document):
        state, content_type, content_encoding, expires, _ = json.loads(side[41:])
        return Result(
            task_id=task_id,
            state=state,
            document=document,
            content_type=content_type,
            content_encoding=content_encoding,
            expires=expires,
        )
    if document.startswith(_COMPRESSED):
        return _compressed(task_id, document, form)
    status = form.status.match(document)
    return Result(
        task_id=task_id,
        state=_status_within(task_id, document, form) if status is None else status[1].decode(errors="replace"),
        document=document,
        content_type=form.content_type,
        content_encoding=form.content_encoding,
    )


def _compressed(task_id: str, document: bytes, form: Form) -> Result:
    """A document that Celery compressed; its beginning is looked at, the rest is for who reads it."""
    name, _, body = document[len(_COMPRESSED) :].partition(b"\0")
    compression = name.decode(errors="replace")
    if (decompressor := _DECOMPRESSORS.get(compression)) is None:
        raise DecodeError(
            f"the record of task {task_id} is compressed as {compression[:40]!r}, and its state cannot be seen: set "
            "result_compression to gzip, bzip2 or lzma where Celery writes it"
        )
    try:
        status = form.status.match(decompressor().decompress(body, _BEGINNING))
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
        status = None
    if status is None:
        raise DecodeError(
            f"the record of task {task_id}, compressed by another program, is no result document in {form.content_type}:"
            " name its form with [results.options] foreign_serializer"
        )
    return Result(
        task_id=task_id,
        state=status[1].decode(errors="replace"),
        document=body,
        content_type=form.content_type,
        content_encoding=form.content_encoding,
        compression=compression,
    )


def _status_within(task_id: str, document: bytes, form: Form) -> str:
    try:
        fields = json.loads(document) if form is FORMS["json"] else None
    except (ValueError, RecursionError):
        fields = None
    status = fields.get("status") if isinstance(fields, dict) else None
    if not isinstance(status, str):
        raise DecodeError(
            f"the record of task {task_id}, written by another program, is no result document in {form.content_type}:"
            " name its form with [results.options] foreign_serializer"
        )
    return status


@lru_cache(1000)
def _beginnings(state: str) -> tuple[bytes, ...]:
    quoted = json.dumps(state)
    if quoted != f'"{state}"':  # with escapes it would not be found again
        return ()
    return (f'{{"status": {quoted}'.encode(), f'{{"status":{quoted}'.encode())


@lru_cache(1000)
def _trailer(expires: float | None, order: int) -> bytes:
    return _EXPIRES + json.dumps(expires).encode() + (_ORDER + b"%d}" % order if order else b"}")


@lru_cache(1000)
def _expires(trailer: bytes) -> float | Literal[False] | None:
    """The inverse of ``_trailer``; False: it is none."""
    found = _TRAILER.fullmatch(trailer)
    if found is None:
        return False
    return None if found[1] == b"null" else float(found[1])


def _digest(document: bytes) -> bytes:
    return sha1(document, usedforsecurity=False).hexdigest().encode()


# --- in the server -------------------------------------------------------------------------------

PUT: Final = r"""
-- KEYS: records. ARGV: pattern of a foreign final status; then for each record its document, its lifetime in ms ('': for ever),
-- what goes beside it ('': nothing), and its order ('': it is final). A record in a final state stays, and so does a passing
-- one that is later. Of final records with one lifetime and nothing beside them only the documents are given, after the lifetime.
local FINAL = {FINAL_STATES}
-- Keys that are made here lie in the slot of the record that they are made from.
local function side_of(record)
  if string.find(record, '{', 1, true) then return record .. '.umbel' end
  return '{' .. record .. '}.umbel'
end
local function stays(record, order)
  local document = redis.call('GET', record)
  local side = redis.call('GET', side_of(record))
  local function later(known) return order ~= '' and known and tonumber(known) > tonumber(order) end
  if side and string.sub(side, 2, 41) == redis.sha1hex(document) then
    return string.sub(side, 1, 1) == 'F' or later(string.match(side, ' (%d+)%]$'))
  end
  if later(string.match(document, ', "umbel%-order": (%d+)}$')) then return true end
  local status = string.match(document, '^%s*{%s*"status"%s*:%s*"([^"]*)"') or string.match(document, ARGV[1])
  if not status then
    local read, fields = pcall(cjson.decode, document)
    status = read and type(fields) == 'table' and fields.status
  end
  return FINAL[status]
end
local function set(key, value, lifetime, condition)
  if lifetime == '' then
    if condition then return redis.call('SET', key, value, condition) end
    return redis.call('SET', key, value)
  end
  if condition then return redis.call('SET', key, value, 'PX', lifetime, condition) end
  return redis.call('SET', key, value, 'PX', lifetime)
end
local alike = #ARGV == #KEYS + 2
for number, record in ipairs(KEYS) do
  local at = 4 * number - 2
  local document, lifetime, side, order = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  if alike then document, lifetime, side, order = ARGV[number + 2], ARGV[2], '', '' end
  local new = set(record, document, lifetime, 'NX')
  if new or not stays(record, order) then
    if not new then set(record, document, lifetime) end
    if side ~= '' then
      set(side_of(record), side, lifetime)
    elseif not new then
      redis.call('DEL', side_of(record))
    end
    redis.call('PUBLISH', record, document)
  end
end
""".replace("FINAL_STATES", ", ".join(f"{state} = true" for state in sorted(FINAL_STATES)))
