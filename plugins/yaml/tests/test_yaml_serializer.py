"""What the YAML serializer promises: the wire's documents, every growth bounded, and one error for all damage."""

from __future__ import annotations

import enum
import importlib.util
import json
import math
import tracemalloc
from base64 import b64decode
from collections import OrderedDict, namedtuple
from datetime import datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml  # type: ignore[import-untyped]  # its types are a distribution of their own
from hypothesis import example, given, settings
from hypothesis import strategies as st
from yaml.constructor import SafeConstructor  # type: ignore[import-untyped]  # likewise

from umbel.errors import DecodeError, EncodeError
from umbel.model import State
from umbel.ports.serializer import Serializer
from umbel_yaml.serializer import YamlSerializer


def without_libyaml() -> Serializer:
    """The serializer as it is where PyYAML was built without libyaml."""
    spec = importlib.util.find_spec("umbel_yaml.serializer")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "__with_libyaml__", False)
        spec.loader.exec_module(module)
    made = module.YamlSerializer()
    assert isinstance(made, Serializer)
    return made


YAML = YamlSerializer()
PURE = without_libyaml()
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text("utf-8"))
FOLDED = {"result-fail-yaml"}
"""libyaml folds long quoted text at another blank than PyYAML's own emitter does; it reads the same."""
modest = settings(max_examples=50, deadline=None)
either = pytest.mark.parametrize("codec", [YAML, PURE], ids=["libyaml", "pure"])


def by_name(entry: dict[str, Any]) -> str:
    return str(entry["name"])


# --- what peers send ----------------------------------------------------------------------------


def test_identity_on_the_wire() -> None:
    assert (YAML.name, YAML.content_type, YAML.content_encoding) == ("yaml", "application/x-yaml", "utf-8")
    assert YAML.safe
    assert YamlSerializer.__dict__["api_version"] == (1, 0)


def test_libyaml_is_used_where_there_is_one() -> None:
    module = importlib.import_module("umbel_yaml.serializer")
    assert yaml.__with_libyaml__
    assert issubclass(module._Dumper, yaml.CSafeDumper)
    assert issubclass(module._Loader, yaml.cyaml.CParser)


@either
@pytest.mark.parametrize("entry", GOLDEN, ids=by_name)
def test_a_recorded_body_decodes_to_what_was_recorded(codec: Serializer, entry: dict[str, Any]) -> None:
    assert codec.loads(b64decode(entry["body_base64"])) == entry["decoded"]


@either
@pytest.mark.parametrize("entry", GOLDEN, ids=by_name)
def test_what_celery_wrote_is_written_byte_for_byte(codec: Serializer, entry: dict[str, Any]) -> None:
    body = b64decode(entry["body_base64"])
    written = codec.dumps(codec.loads(body))
    if codec is YAML and entry["name"] in FOLDED:
        assert yaml.safe_load(written) == entry["decoded"]
    else:
        assert written == body


@either
def test_anchors_aliases_and_merge_keys_of_peers_are_read(codec: Serializer) -> None:
    shared = [1, {"a": 2}]
    assert codec.loads(yaml.safe_dump([shared, {"k": shared}]).encode()) == [shared, {"k": shared}]
    assert codec.loads(b"- &base {a: 1, b: 2}\n- {<<: *base, b: 3}\n") == [{"a": 1, "b": 2}, {"a": 1, "b": 3}]


# --- there and back -----------------------------------------------------------------------------


def unfolded(moment: Any) -> Any:
    """``fold`` is not on the wire: it chooses between two offsets of a zone, and the text holds the chosen one."""
    return moment.replace(fold=0)


offsets = st.none() | st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
moments = st.datetimes(timezones=offsets).map(unfolded)
keys = st.text() | st.integers(-(2**63), 2**64 - 1) | st.binary() | st.dates() | st.booleans() | st.none()
scalars = keys | st.integers() | st.floats() | moments
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.sets(st.text()),
    max_leaves=15,
)


def told(value: Any) -> Any:
    """A text that tells 1 from 1.0 and from True, -0.0 from 0.0, and NaN from nothing, in whatever order of keys."""
    match value:
        case dict():
            return sorted(f"{told(key)}: {told(item)}" for key, item in value.items())
        case set():
            return {"set": sorted(value)}
        case list():
            return [told(item) for item in value]
        case datetime():
            return value.isoformat()
    return repr(value)


@either
@modest
@given(value=values)
@example(value=[math.nan, math.inf, -math.inf, -0.0, 1e17, 1e-7])
@example(value=[10**4000, -(10**4000), 2**64])
@example(
    value=["", " ", "~", "null", "yes", "1", "1:30", "=", "<<", "2030-01-02", "- a", "a: b", "#", "!x", "&a", "*a"]
)
@example(
    value=["\x00", "\x07", "\x7f", "\x85", "\u2028", "\ufeff", "\ufffe", "🌼", "a\nb", "a\n", "\n", "\t", "x " * 100]
)
def test_what_went_in_comes_out(codec: Serializer, value: Any) -> None:
    assert told(codec.loads(codec.dumps(value))) == told(value)


@modest
@given(value=values)
def test_what_is_written_a_celery_worker_reads(value: Any) -> None:
    assert told(yaml.safe_load(YAML.dumps(value))) == told(value)


@modest
@given(value=values)
def test_what_a_celery_worker_writes_is_read(value: Any) -> None:
    assert told(YAML.loads(yaml.safe_dump(value).encode())) == told(value)


@either
def test_keys_are_sorted_and_text_is_escaped_to_ascii(codec: Serializer) -> None:
    assert codec.dumps({"b": [1], "a": "é"}) == b'a: "\\xE9"\nb:\n- 1\n'
    assert codec.loads("é: 🌼".encode()) == {"é": "🌼"}


@either
def test_tuples_become_lists(codec: Serializer) -> None:
    point = namedtuple("point", "x y")
    assert codec.loads(codec.dumps(((1, 2), point(3, 4)))) == [[1, 2], [3, 4]]


@either
def test_what_occurs_twice_is_written_twice(codec: Serializer) -> None:
    shared = [datetime(2030, 1, 2)]
    assert codec.dumps([shared, shared]) == b"- - 2030-01-02 00:00:00\n- - 2030-01-02 00:00:00\n"


@either
def test_a_subclass_goes_as_what_it_is(codec: Serializer) -> None:
    class Level(enum.IntEnum):
        HIGH = 9

    class Moment(datetime):
        pass

    class Ratio(float):
        pass

    value = OrderedDict({State.SUCCESS: [State.FAILURE, Level.HIGH, Moment(2030, 1, 2), Ratio(0.5)]})
    assert codec.dumps(value) == b"SUCCESS:\n- FAILURE\n- 9\n- 2030-01-02 00:00:00\n- 0.5\n"


# --- what is refused ----------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"


class Opaque:
    pass


@either
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (frozenset(), "builtins.frozenset"),
        (Colour.RED, "Colour"),
        (Opaque(), "Opaque"),
        (bytearray(b"x"), "builtins.bytearray"),
        (timedelta(1), "datetime.timedelta"),
        (1j, "builtins.complex"),
        (time(3, 4), "datetime.time: pass it as text"),
        (Decimal("1.50"), "decimal.Decimal: pass it as text"),
        (UUID(int=1), "uuid.UUID: pass it as text"),
    ],
)
def test_a_type_without_a_form_is_named_with_the_remedy(codec: Serializer, value: object, named: str) -> None:
    with pytest.raises(EncodeError, match=rf"no form for .*{named}.*typed=True"):
        codec.dumps([{"deep": value}])


@either
def test_an_offset_with_seconds_is_refused(codec: Serializer) -> None:
    moment = datetime(1900, 1, 2, tzinfo=timezone(timedelta(hours=1, seconds=15)))
    with pytest.raises(EncodeError, match="offset with seconds"):
        codec.dumps(moment)


@either
def test_what_contains_itself_or_nests_too_deep_is_refused(codec: Serializer) -> None:
    ring: list[Any] = []
    ring.append({"ring": ring})
    deep: Any = None
    for _ in range(100_000):
        deep = [deep]
    for value in (ring, deep):
        with pytest.raises(EncodeError, match="contains itself, or nests too deep"):
            codec.dumps(value)


class Spiteful(dict[str, int]):
    def items(self) -> Any:
        raise KeyError("items")


@either
def test_a_value_whose_own_code_raises_is_refused(codec: Serializer) -> None:
    with pytest.raises(EncodeError, match="cannot be written as YAML: 'items'"):
        codec.dumps([Spiteful(a=1)])


@either
@pytest.mark.parametrize("value", ["\ud800", 10**5000], ids=["surrogate", "integer"])
def test_what_no_peer_could_read_is_refused(codec: Serializer, value: object) -> None:
    with pytest.raises(EncodeError, match=r"surrogates|4300 digits"):
        codec.dumps([value])


@either
@pytest.mark.parametrize("opening", [b"[", b"{a: ", b"- ", b"? ", b"!!map {a: "])
def test_a_document_that_nests_too_deep_is_refused(codec: Serializer, opening: bytes) -> None:
    with pytest.raises(DecodeError, match="nests deeper"):
        codec.loads(opening * 10_000)


def laughs(first: str, level: str) -> bytes:
    """Nine levels of nine aliases each to the level before."""
    lines = [f"l0: &l0 {first}"]
    lines += [f"l{n}: &l{n} " + level % ", ".join([f"*l{n - 1}"] * 9) for n in range(1, 10)]
    return "\n".join(lines).encode()


@either
@pytest.mark.parametrize(
    "document",
    [
        laughs("lol", "[%s]"),
        laughs("{a: 1, b: 2}", "{<<: [%s]}"),
        b"- &long " + b"x" * 2000 + b"\n- *long" * 1000,
    ],
    ids=["sequences", "merge keys", "text"],
)
def test_aliases_cannot_make_a_small_body_large(codec: Serializer, document: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match=r"aliases .* repeat more than 1,000,000 characters"):
            codec.loads(document)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


@either
def test_a_value_may_be_repeated_as_often_as_its_length_allows(codec: Serializer) -> None:
    config = {"host": "localhost", "port": 5672}
    assert codec.loads(yaml.safe_dump([config] * 1000).encode()) == [config] * 1000


@pytest.mark.parametrize(("more", "read"), [(0, True), (1, False)])
def test_a_long_body_may_repeat_all_of_itself(more: int, read: bool) -> None:
    piece, comment = 600_000, 700_000
    document = b"- &a " + b"x" * (piece - 1) + b"\n- *a\n- *a\n#" + b"c" * comment
    document = document[: 2 * piece - more]
    if read:
        assert len(YAML.loads(document)) == 3
    else:
        with pytest.raises(DecodeError, match="1,199,999 characters"):
            YAML.loads(document)


@either
@pytest.mark.parametrize("document", [b"&a [*a]", b"&a {k: [*a]}", b"&a {<<: *a}", b"&a\n? *a\n"])
def test_a_value_that_contains_itself_is_refused(codec: Serializer, document: bytes) -> None:
    with pytest.raises(DecodeError, match="contains itself"):
        codec.loads(document)


@either
@pytest.mark.parametrize(
    "document",
    [
        b"!!python/object/apply:os.system [ls]",
        b"!!python/name:os.system",
        b"!!python/tuple [1]",
        b"!own {a: 1}",
        b"%TAG !e! tag:" + b"x" * 100_000 + b"\n---\n" + b"- !e!x 1\n" * 1000,
    ],
    ids=["apply", "name", "tuple", "own", "long"],
)
def test_a_tag_outside_safe_yaml_is_refused(codec: Serializer, document: bytes) -> None:
    with pytest.raises(DecodeError, match="is not a tag of safe YAML") as caught:
        codec.loads(document)
    assert len(str(caught.value)) < 200


@either
@pytest.mark.parametrize("document", [b"9" * 4301, b"1" + b":1" * 5000, b"!!int '" + b"0" * 4301 + b"'"])
def test_an_integer_without_end_is_refused(codec: Serializer, document: bytes) -> None:
    with pytest.raises(DecodeError, match="more than 4,300 digits"):
        codec.loads(document)


@either
@pytest.mark.parametrize(
    "document",
    [b"{123456789012345678901: 1}", b"!!set {123456789012345678901}", b"[&a 123456789012345678901, {*a : 1}]"],
    ids=["mapping", "set", "alias"],
)
def test_an_integer_key_beyond_64_bits_is_refused(codec: Serializer, document: bytes) -> None:
    with pytest.raises(DecodeError, match="more than 64 bits is a key"):
        codec.loads(document)


@either
@pytest.mark.parametrize(
    "data",
    [
        b"[1",
        b"{a: ",
        b'"abc',
        b"a: b: c",
        b"\ta",
        b"a\n---\nb\n",
        b"\xff",
        b"\x00",
        b"\x80\x04K\x01.",
        "text".encode("utf-16"),
        b"*unknown",
        b"[&a 1, &a 2]",
        b"? [1]\n: 2\n",
        b"- =",
        b"2030-13-45",
        b"2030-01-02 03:04:05+99:00",
        b"!!timestamp x",
        b"!!int ''",
        b"!!int [1]",
        b"!!bool x",
        b"!!float x",
        b"!!binary \xc3\xa9",
        b"!!map [1]",
        b"!!omap {a: 1}",
    ],
)
def test_what_is_not_yaml_is_refused(codec: Serializer, data: bytes) -> None:
    with pytest.raises(DecodeError, match="not a YAML document: "):
        codec.loads(data)


@either
@pytest.mark.parametrize("data", [b"", b" \n", b"# nothing\n"])
def test_an_empty_body_is_refused(codec: Serializer, data: bytes) -> None:
    with pytest.raises(DecodeError, match="there is none in the body"):
        codec.loads(data)


def survives(codec: Serializer, data: bytes) -> None:
    try:
        codec.loads(data)
    except DecodeError:
        pass


@either
@settings(max_examples=150, deadline=None)
@given(data=st.binary() | st.text("[]{}\"',:?-&*!%#|>@ab \n0123456789.eE+~<=").map(str.encode))
def test_no_bytes_raise_anything_but_a_decode_error(codec: Serializer, data: bytes) -> None:
    survives(codec, data)


@either
@modest
@given(
    tag=st.sampled_from(sorted(tag for tag in SafeConstructor.yaml_constructors if tag)),
    value=st.text("0123456789-:T.+Zxob_ ") | values,
)
def test_no_tagged_value_raises_anything_but_a_decode_error(codec: Serializer, tag: str, value: Any) -> None:
    survives(codec, f"!<{tag}> ".encode() + (value.encode() if isinstance(value, str) else codec.dumps(value)))
    survives(codec, f"!<{tag}> '".encode() + str(value).replace("'", "").encode() + b"'")


@either
@modest
@given(value=values, data=st.data())
def test_no_damaged_document_raises_anything_but_a_decode_error(
    codec: Serializer, value: Any, data: st.DataObject
) -> None:
    document = codec.dumps(value)
    start = data.draw(st.integers(0, len(document)))
    stop = data.draw(st.integers(start, min(start + 8, len(document))))
    survives(codec, document[:start] + data.draw(st.binary(max_size=8)) + document[stop:])
