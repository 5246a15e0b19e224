"""Records as they stand in Redis, where Celery reads and writes them too.

The value of the key is the result document itself. What a ``Result`` holds beside it is found in one of three places:

- A JSON document that begins with its status takes one more field as its last, ``umbel-expires``, and is *whole*: nothing
  else is needed to read it. Other programs ignore the field; ``read`` takes it off again.
- For any other document of ours a second key, in the same slot, holds the rest and the digest of the document, so that it
  never speaks for a document that another program has put there since.
- What another program wrote is in the form that the option ``foreign_serializer`` names, and its status is found by the
  fixed way in which that form begins; no body is decoded here, but for JSON that begins with something else.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from hashlib import sha1
from typing import Final, Literal

from attrs import frozen

from umbel.errors import DecodeError
from umbel.model import FINAL_STATES, Result

_EXPIRES: Final = b', "umbel-expires": '
_TRAILER: Final = re.compile(_EXPIRES + rb"(null|[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\}")
_TRAILER_LENGTH: Final = 48
_COMPRESSED: Final = b"\0celery-compressed\0"


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
        return document[:-1] + _trailer(result.expires), b""
    rest = [result.state, result.content_type, result.content_encoding, result.expires]
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
        state, content_type, content_encoding, expires = json.loads(side[41:])
        return Result(
            task_id=task_id,
            state=state,
            document=document,
            content_type=content_type,
            content_encoding=content_encoding,
            expires=expires,
        )
    if document.startswith(_COMPRESSED):
        raise DecodeError(
            f"the record of task {task_id} is compressed: unset result_compression where Celery writes it"
        )
    status = form.status.match(document)
    return Result(
        task_id=task_id,
        state=_status_within(task_id, document, form) if status is None else status[1].decode(errors="replace"),
        document=document,
        content_type=form.content_type,
        content_encoding=form.content_encoding,
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
def _trailer(expires: float | None) -> bytes:
    return _EXPIRES + json.dumps(expires).encode() + b"}"


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
-- KEYS: records. ARGV: pattern of a foreign final status; then for each record its document, its lifetime in ms ('': for ever)
-- and what goes beside it ('': nothing). A record in a final state stays.
local FINAL = {FINAL_STATES}
-- Keys that are made here lie in the slot of the record that they are made from.
local function side_of(record)
  if string.find(record, '{', 1, true) then return record .. '.umbel' end
  return '{' .. record .. '}.umbel'
end
local function ended(record)
  local document = redis.call('GET', record)
  local side = redis.call('GET', side_of(record))
  if side and string.sub(side, 2, 41) == redis.sha1hex(document) then return string.sub(side, 1, 1) == 'F' end
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
for number, record in ipairs(KEYS) do
  local at = 3 * number - 1
  local document, lifetime, side = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local new = set(record, document, lifetime, 'NX')
  if new or not ended(record) then
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
