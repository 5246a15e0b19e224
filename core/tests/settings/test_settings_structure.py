"""Every mistake is named: the key, where it was given, what is wrong, what mends it; all at once."""

from __future__ import annotations

import enum
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from attrs import field, fields, frozen, has, validators
from hypothesis import given
from hypothesis import strategies as st

from umbel.errors import SettingsError
from umbel.settings.schema import Settings
from umbel.settings.sources import always, grow, join_key, load
from umbel.settings.structure import json_schema, reference, structure, structure_options
from umbel.settings.units import Bytes, Seconds

FULL = """
app = "shop.tasks:app"
imports = ["shop.mail"]
default_queue = "main"
timezone = "UTC"

[broker]
url = "redis://localhost:6379/0"
lease = "30s"
publish_timeout = 2.5
options = { db = 1 }

[results]
url = "redis://localhost:6379/1"
expires = "1d"
serializer = "msgpack"
extended = true
track = "submit"
accept_compression = ["zlib"]
options = { db = 2 }

[unique]
lease = "20s"
bound = "2d"
lock_lease = "1m"

[codec]
serializer = "msgpack"
accept = ["json", "msgpack"]
compression = "zlib"
accept_compression = ["zlib", "bzip2"]
max_body_size = "10MiB"

[queues.mail]
type = "quorum"
max_priority = 9
exchange = "post"
exchange_type = "topic"
routing_key = "letters.#"
arguments = { x-max-length = 5 }

[tasks."shop.tasks.send_mail"]
queue = "mail"
serializer = "json"
compression = "zlib"
max_retries = 3
retry_delay = 1
retry_backoff = "500ms"
retry_backoff_max = "10m"
retry_jitter = true
ack = "early"
ignore_result = true
time_limit = 30
soft_time_limit = 25
rate_limit = "100/m"
rate_limit_scope = "fleet"
concurrency_limit = 3
concurrency_key = "{tenant}"
expires = "1h"
priority = 9
max_deliveries = 1
dead_letter = true
track_started = false
unique = "until_done"
unique_key = "{user}"
on_conflict = "return"
cancel = "flag"

[tasks."shop.tasks.refresh"]
debounce = "2s"
debounce_max = "1m"

[tasks."shop.tasks.poll"]
throttle = 10
throttle_edge = "trailing"

[schedules.nightly-report]
task = "shop.tasks.report"
crontab = "0 3 * * *"
timezone = "UTC"
args = [1, "a"]
kwargs = { full = true }
options = { queue = "mail" }
enabled = true

[schedules.often]
task = "shop.tasks.ping"
every = "5s"
jitter = "1s"
overlap = "skip"
catch_up = "all"
catch_up_within = "1h"
start = "2026-03-01"
end = "2027-03-01T08:00+09:00"
max_runs = 1000

[schedules.once]
task = "shop.tasks.ping"
at = ["2026-03-01T08:00"]

[schedules.lamps]
task = "shop.tasks.lamps"
when = { solar = "sunset", latitude = 37.57, longitude = 126.98 }

[scheduler]
url = "redis://localhost:6379/2"
lease = "10s"
poll = "250ms"
remember = "2h"
options = { db = 3 }

[workflows]
expires = "2d"

[worker]
pool = "prefork"
with_scheduler = true
concurrency = 4
autoscale_min = 2
autoscale_max = 8
autoscale_idle = "1m"
queues = ["default", "mail"]
name = "w1"
prefetch = 10
grace = 0
max_tasks_per_child = 100
max_memory_per_child = "200MB"
start_timeout = 60
max_deliveries = 3
watchdog = 30
control = false
log_level = "DEBUG"
pool_options = { nice = 5 }

[plugins]
hooks = ["prometheus"]
options = {prometheus = {port = 9100}}
disable = ["sentry"]
"""

Path_ = tuple[str, ...]


def sections(cls: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every attrs class of the schema with the path of a table of it."""
    yield path, cls
    for name, type_ in get_type_hints(cls).items():
        if has(type_):
            yield from sections(type_, (*path, name))
        elif get_args(type_)[1:] and has(get_args(type_)[1]):
            yield from sections(get_args(type_)[1], (*path, name, "some"))


SECTIONS = dict(sections(Settings))
KEYS = [(path, item.name) for path, cls in SECTIONS.items() for item in fields(cls)]


def problems(values: Mapping[str, Any]) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        structure(grow(values, always("here")))
    return caught.value.problems


def nested(path: Path_, value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    return dict(value)


def sound(path: Path_, **values: Any) -> dict[str, Any]:
    """A table at ``path``, with what is required there."""
    required = {"task": "a", "every": 1} if path[:1] == ("schedules",) else {}
    return nested(path, {**required, **values})


# --- what is right --------------------------------------------------------------------------------


def test_a_full_file() -> None:
    document = tomllib.loads(FULL)
    settings = structure(grow(document, always("here")))
    assert settings.codec.max_body_size == 10 * 2**20
    assert settings.tasks["shop.tasks.send_mail"].retry_backoff == 0.5
    assert settings.tasks["shop.tasks.send_mail"].ack == "early"
    assert settings.schedules["nightly-report"].args == (1, "a")
    assert settings.queues["mail"].arguments == {"x-max-length": 5}
    assert type(settings.tasks["shop.tasks.send_mail"].time_limit) is float
    given = {(*path[:1], item) for path, item in KEYS if path}
    single = ("broker", "results", "unique", "codec", "scheduler", "workflows", "worker", "plugins")
    table = {(name, key) for name in single for key in document[name]}
    table |= {
        (name, key) for name in ("queues", "tasks", "schedules") for each in document[name].values() for key in each
    }
    assert table == given, "the full example gives every key"


def test_an_empty_file() -> None:
    assert structure(grow({}, always("here"))) == Settings()


# --- unknown keys ---------------------------------------------------------------------------------


def typos(name: str) -> Iterator[str]:
    middle = len(name) // 2
    yield name[:middle] + name[middle + 1 :]
    yield name[:middle] + name[middle] + name[middle:]
    yield name[:-1] + "x" if len(name) > 3 else name + "x"
    yield name.upper()
    yield name.replace("_", "-") + ("" if "_" in name else "s" if not name.endswith("s") else "es")


@pytest.mark.parametrize(("path", "name"), KEYS, ids=lambda value: str(value))
def test_a_typo_names_the_right_key(path: Path_, name: str) -> None:
    known = {item.name for item in fields(SECTIONS[path])}
    for typo in set(typos(name)) - known - {"schedulers", "schedulex"}:  # as near to schedules
        (problem,) = problems(sound(path, **{typo: 1}))
        assert problem.startswith(f"here: {join_key((*path, typo))} is not a setting; did you mean "), problem
        first = problem.partition("did you mean ")[2].rstrip("?").split(" or ")[0]
        assert first == join_key((*path, name)), problem


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"concurrency": 4}, "did you mean [worker] concurrency?"),
        ({"broker": {"concurrency": 4}}, "did you mean [worker] concurrency?"),
        ({"worker": {"app": "shop"}}, "did you mean app above all tables?"),
        ({"lease": 4}, "did you mean [broker] lease or [unique] lease"),
        ({"broker_url": "x"}, "did you mean broker or [broker] url?"),
        ({"worker_concurrency": 4}, "did you mean [worker] concurrency?"),
        ({"broker": {"visibility_zz": 4}}, "there are url, lease, publish_timeout, options"),
        ({"worker": {"crontab": "x"}}, "did you mean [schedules.NAME] crontab?"),
        ({"worker": {"rate_limit": "x"}}, 'did you mean [tasks."NAME OR GLOB"] rate_limit?'),
        ({"größe": 1}, "there are app, imports,"),
    ],
)
def test_hints(values: dict[str, Any], hint: str) -> None:
    (problem,) = problems(values)
    assert hint in problem


def test_a_task_name_without_quotes() -> None:
    document = tomllib.loads("[tasks.shop.tasks.send_mail]\nqueue = 'mail'")
    assert problems(document) == (
        "here: tasks.shop.tasks is not a setting; put a name that contains dots in quotes:"
        ' [tasks."shop.tasks.send_mail"]',
    )


def test_the_environment_is_told_its_variable(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load(start=tmp_path, environ={"UMBEL_WORKER_CONCURRENCY": "4"})
    assert caught.value.problems == (
        "environment UMBEL_WORKER_CONCURRENCY: worker_concurrency is not a setting;"
        " did you mean [worker] concurrency (UMBEL_WORKER__CONCURRENCY)?",
    )


# --- wrong types ----------------------------------------------------------------------------------

WRONG: dict[Any, list[Any]] = {
    str: [1, 1.5, True, ["a"], {"a": 1}],
    int: ["4", 1.5, True, [1], {"a": 1}],
    bool: ["true", 0, 1, 1.0, []],
    Seconds: ["30", "soon", "30 s", "", True, -1, float("inf"), float("nan"), [1], {"a": 1}],
    Bytes: ["30", "big", 1.5, True, -1, [1]],
    tuple[str, ...]: ["a", 1, True, [1], ["a", ["b"]], {"a": 1}],
    tuple[Any, ...]: ["a", 1, {"a": 1}],
    Mapping[str, Any]: ["a", 1, [1]],
    Mapping[str, Mapping[str, Any]]: ["a", 1, [1], {"a": 1}],
}


def bare(type_: Any) -> Any:
    if get_origin(type_) is Union or type(type_).__name__ == "UnionType":
        (type_,) = (each for each in get_args(type_) if each is not type(None))
    return type_


def wrong_values() -> Iterator[tuple[Path_, str, Any]]:
    for path, cls in SECTIONS.items():
        for name, hint in get_type_hints(cls, include_extras=True).items():
            type_ = bare(hint)
            values = ["LATE", "", 1, True, ["late"]] if get_origin(type_) is Literal else WRONG.get(type_)
            if values is None:  # a table of its own
                assert has(type_) or has(get_args(type_)[1])
                values = [1, "a", True, ["a"]]
            yield from ((path, name, value) for value in values)


@pytest.mark.parametrize(("path", "name", "value"), list(wrong_values()))
def test_wrong_types(path: Path_, name: str, value: Any) -> None:
    (problem,) = problems(
        sound(path, **{name: value}) if name != "every" else nested(path, {"task": "a", "every": value})
    )
    expected = f"here: {join_key((*path, name))} = "
    assert problem.startswith(expected), problem
    assert " must " in problem[len(expected) :], problem


@pytest.mark.parametrize("path", [path for path in SECTIONS if len(path) == 2])
def test_a_named_table_that_is_none(path: Path_) -> None:
    (problem,) = problems(nested(path, 5))
    assert problem == f"here: {join_key(path)} = 5: must be a table, [{join_key(path)}]"


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("worker", "concurrency"), "4", '"4": must be a whole number such as 4; leave out the quotes'),
        (("worker", "concurrency"), "four", '"four": must be a whole number such as 4'),
        (("results", "extended"), "yes", '"yes": must be true or false'),
        (("results", "extended"), "true", '"true": must be true or false; leave out the quotes'),
        (("broker", "url"), 5, '5: must be a string in quotes such as "name"'),
        (("worker", "queues"), "mail", '"mail": must be a list of strings such as ["a", "b"]'),
        (("worker", "queues"), ["a", 5], '["a", 5]: item 2 must be a string in quotes such as "name"'),
        (("tasks", "x.y", "ack"), "soon", '"soon": must be "late" or "early"'),
        (("broker", "lease"), 0, "0: lease must be more than 0"),
        (("broker", "options"), 5, "5: must be a table"),
        (("worker", "concurrency"), {"größe": "ß" * 90}, '{"größe": "' + "ß" * 46 + "…: must be a whole number"),
    ],
)
def test_sentences(path: Path_, value: Any, sentence: str) -> None:
    (problem,) = problems(nested(path, value))
    assert problem.startswith(f"here: {join_key(path)} = {sentence}")


def test_a_number_beyond_floats() -> None:
    (problem,) = problems({"broker": {"lease": 10**400}})
    assert problem.startswith("here: broker.lease = 1000")


def test_null_in_code() -> None:
    assert structure(grow({"worker": {"concurrency": None}}, always("code"))).worker.concurrency is None
    assert problems({"worker": {"pool": None}}) == (
        'here: worker.pool = null: must be a string in quotes such as "name"',
    )


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.tuples(st.sampled_from(KEYS), PLAIN), min_size=1, max_size=4))
def test_any_value_is_taken_or_refused(values: list[tuple[tuple[Path_, str], Any]]) -> None:
    document: dict[str, Any] = {}
    for (path, name), value in values:
        table = document
        for part in path:
            below = table.setdefault(part, {})
            table = below if isinstance(below, dict) else table
        table[name] = value
    found: tuple[str, ...] | None = None
    try:
        structure(grow(document, always("here")))
    except SettingsError as error:
        found = error.problems
    assert found != ()


@given(st.sampled_from(KEYS), st.text(st.characters(codec="utf-8"), max_size=12))
def test_any_text_is_taken_or_refused(key: tuple[Path_, str], text: str) -> None:
    name = "UMBEL_" + "__".join((*key[0], key[1])).upper()
    found: tuple[str, ...] | None = None
    try:
        load(file=os.devnull, environ={name: text})
    except SettingsError as error:
        found = error.problems
    assert found != ()
    assert all(problem.startswith("environment ") for problem in found or ())


# --- all at once ----------------------------------------------------------------------------------


def test_all_problems_of_all_sources_at_once(tmp_path: Path) -> None:
    path = tmp_path / "umbel.toml"
    path.write_text(
        """
        concurrency = 4
        [worker]
        grace = "soon"
        pool = 5
        [tasks."a.b"]
        time_limit = "30s"
        soft_time_limit = "1m"
        retry_backoff = "1h"
        retry_backoff_max = "1m"
        priority = 10
        rate_limit = "fast"
        queue = 1
        [schedules.x]
        crontab = "* * * * *"
        [schedules.y]
        task = "t"
        [schedules.z]
        task = "t"
        every = "1m"
        crontab = "* * * * *"
        """
    )
    with pytest.raises(SettingsError) as caught:
        load(
            start=tmp_path,
            environ={"UMBEL_WORKER__PREFETCH": "many", "UMBEL_POOOL": "x"},
            code={"broker.lease": -1, "no key": 1},
            command_line={"worker.concurrency": "0"},
        )
    text = str(caught.value)
    for sentence in [
        f"{path}:2: concurrency is not a setting",
        f'{path}:4: worker.grace = "soon": must be a duration',
        f"{path}:5: worker.pool = 5: must be a string",
        f'{path}:8: tasks."a.b".soft_time_limit = "1m": soft_time_limit (1m) is longer than time_limit (30s)',
        f'{path}:10: tasks."a.b".retry_backoff_max = "1m": retry_backoff (1h) is longer than retry_backoff_max (1m)',
        f'{path}:11: tasks."a.b".priority = 10: priority must be from 0 to 9',
        f'{path}:12: tasks."a.b".rate_limit = "fast": rate_limit must be a rate',
        f'{path}:13: tasks."a.b".queue = 1: must be a string',
        f"{path}:14: schedules.x.task is missing; give a string",
        f"{path}:16: schedules.y needs one of crontab, every, at or when, and has none",
        f'{path}:20: schedules.z.every = "1m": needs one of crontab, every, at or when, and has crontab and every',
        'environment UMBEL_WORKER__PREFETCH: worker.prefetch = "many": must be a whole number',
        "environment UMBEL_POOOL: poool is not a setting; did you mean [worker] pool (UMBEL_WORKER__POOL)?",
        "code: broker.lease = -1: must not be negative",
        "code: 'no key' is not a dotted key",
        'command line --concurrency: worker.concurrency = "0": concurrency must be at least 1',
    ]:
        assert sentence in text
    assert len(caught.value.problems) == 16


def test_a_wrong_value_is_not_said_to_be_missing() -> None:
    (problem,) = problems({"schedules": {"x": {"task": "t", "every": "soon"}}})
    assert "schedules.x.every" in problem
    (problem,) = problems({"schedules": {"x": {"task": "t", "every": 0}}})
    assert "every must be more than 0" in problem


# --- a driver's options ---------------------------------------------------------------------------


class Mode(enum.Enum):
    FAST = "fast"


@frozen(kw_only=True)
class Tls:
    verify: bool = True


@frozen(kw_only=True)
class Options:
    """Options of a driver."""

    db: int = field(default=0, validator=validators.ge(0), metadata={"help": "Number of the database."})
    timeout: Seconds = 5.0
    buffer: Bytes | None = None
    ratio: float = 0.5
    ssl: bool = False
    hosts: tuple[str, ...] = ()
    ports: list[int] = field(factory=list)
    tags: frozenset[str] = frozenset()
    mode: Literal["a", "b"] = "a"
    kind: Mode = Mode.FAST
    root: Path | None = None
    password: str | None = field(default=None, validator=validators.optional(validators.matches_re("[a-z]+")))
    limits: Mapping[str, int] = field(factory=dict)
    tls: Tls = Tls()
    extra: Any = None
    master: str | None = None
    _private: int = 0

    def __attrs_post_init__(self) -> None:
        if self.ssl and self.mode == "b":
            raise ValueError("ssl is not possible in mode b")


@frozen(kw_only=True)
class Required:
    """Options of which one has no default."""

    bucket: str
    size: int = field(default=1, validator=validators.instance_of(int))


def refused(cls: Any, values: Mapping[str, Any]) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        structure_options(cls, values, where="query of broker.url")
    return caught.value.problems


def test_options_from_a_query() -> None:
    query = {
        "db": "5",
        "timeout": "500ms",
        "buffer": "64KiB",
        "ratio": "1",
        "ssl": "yes",
        "hosts": "a, b",
        "ports": "1,2",
        "tags": "x,y",
        "mode": "a",
        "kind": "fast",
        "root": "/tmp",
        "password": "abc",
        "limits": "{a = 1}",
        "extra": "[1]",
        "master": "",
        "private": "3",
    }
    options = structure_options(Options, query, where="query of broker.url")
    assert options == Options(
        db=5,
        timeout=0.5,
        buffer=65536,
        ratio=1.0,
        ssl=True,
        hosts=("a", "b"),
        ports=[1, 2],
        tags=frozenset("xy"),
        root=Path("/tmp"),
        password="abc",
        limits={"a": 1},
        extra=[1],
        master=None,
        private=3,
    )
    assert type(options.password) is str
    assert {type(host) for host in options.hosts} == {str}


def test_options_from_a_table() -> None:
    values = {"db": 5, "ssl": True, "hosts": ["a"], "limits": {"a": 1}, "tls": {"verify": False}, "buffer": None}
    options = structure_options(Options, values, where="[broker.options]")
    assert (options.db, options.hosts, options.tls) == (5, ("a",), Tls(verify=False))
    assert structure_options(Options, {}, where="[broker.options]") == Options()


@pytest.mark.parametrize(("text", "value"), [("1", True), ("ON", True), ("true", True), ("0", False), ("No", False)])
def test_booleans_in_a_query(text: str, value: bool) -> None:
    assert structure_options(Options, {"ssl": text}, where="x").ssl is value


def test_every_wrong_option_at_once() -> None:
    found = refused(
        Options,
        {
            "db": "-1",
            "timeot": "5",
            "timeout": "soon",
            "ratio": "x",
            "ssl": "maybe",
            "ports": "1,b",
            "mode": "c",
            "kind": "slow",
            "limits": {"a": "x"},
            "tls": {"verfy": "1", "verify": "x"},
        },
    )
    assert found == (
        "query of broker.url: timeot is not a setting; did you mean timeout?",
        'query of broker.url: timeout = "soon": must be a duration such as "500ms", "30s", "5m", "1h" or "1d"',
        'query of broker.url: ratio = "x": must be a number such as 0.5',
        'query of broker.url: ssl = "maybe": must be true or false',
        'query of broker.url: ports = "1,b": item 2 must be a whole number such as 4',
        'query of broker.url: mode = "c": must be "a" or "b"',
        "query of broker.url: kind = \"slow\": 'slow' is not a valid Mode",
        'query of broker.url: limits = {"a": "x"}: must be a whole number such as 4',
        "query of broker.url: tls.verfy is not a setting; did you mean tls.verify?",
        'query of broker.url: tls.verify = "x": must be true or false',
        "query of broker.url: db = \"-1\": 'db' must be >= 0: -1",
    )


def test_combinations_and_missing_options() -> None:
    assert refused(Options, {"ssl": "1", "mode": "b"}) == (
        'query of broker.url: mode = "b": ssl is not possible in mode b',
    )
    assert refused(Required, {"size": "2"}) == (
        'query of broker.url: bucket is missing; give a string in quotes such as "name"',
    )
    assert structure_options(Required, {"bucket": "b"}, where="x").bucket == "b"


def test_a_secret_option_is_not_shown() -> None:
    (problem,) = refused(Options, {"password": "HUNTER2"})
    assert problem.startswith('query of broker.url: password = "***": ')
    assert "HUNTER2" not in problem
    with pytest.raises(SettingsError, match=r"redis://:\*\*\*@h"):
        structure_options(Options, {"x": 1}, where="redis://:HUNTER2@h")


# --- documentation --------------------------------------------------------------------------------


def check(value: Any, shape: Mapping[str, Any], path: str = "") -> None:
    """A validator of the part of JSON Schema that is used."""
    used = {"type", "properties", "additionalProperties", "required", "items", "anyOf", "enum", "pattern", "minimum"}
    assert set(shape) <= used | {"maximum", "exclusiveMinimum", "default", "description", "title", "$schema"}
    types: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    if "type" in shape:
        assert isinstance(value, types.get(shape["type"], int | float)), path
        assert isinstance(value, bool) == (shape["type"] == "boolean"), path
    if "enum" in shape:
        assert value in shape["enum"], path
    if "anyOf" in shape:
        assert any(accepts(value, each) for each in shape["anyOf"]), path
    if isinstance(value, str) and "pattern" in shape:
        assert re.search(shape["pattern"], value), path
    if isinstance(value, int | float):
        assert value >= shape.get("minimum", value), path
        assert value <= shape.get("maximum", value), path
        assert "exclusiveMinimum" not in shape or value > shape["exclusiveMinimum"], path
    if isinstance(value, list):
        for item in value:
            check(item, shape.get("items", {}), path)
    if isinstance(value, dict):
        assert set(shape.get("required", ())) <= value.keys(), path
        for name, item in value.items():
            below = shape.get("properties", {}).get(name, shape.get("additionalProperties", {}))
            assert below is not False, f"{path}.{name}"
            check(item, below, f"{path}.{name}")


def accepts(value: Any, shape: Mapping[str, Any]) -> bool:
    try:
        check(value, shape)
    except AssertionError:
        return False
    return True


def test_json_schema_takes_a_full_file() -> None:
    shape = json.loads(json.dumps(json_schema()))
    check(tomllib.loads(FULL), shape)
    check({}, shape)


@pytest.mark.parametrize(
    "text",
    [
        "wroker = 1",
        "worker.concurrency = '4'",
        "worker.concurrency = 0",
        "worker.grace = '30'",
        "worker.grace = -1",
        "broker.lease = 0",
        "tasks.x.ack = 'soon'",
        "tasks.x.priority = 10",
        "tasks.x.qeue = 'a'",
        "schedules.x.every = 1",
        "worker.queues = 'a'",
        "worker.queues = [1]",
        "codec.max_body_size = 1.5",
        "results.expires = 'nevr'",
    ],
)
def test_json_schema_refuses_what_we_refuse(text: str) -> None:
    document = tomllib.loads(text)
    assert problems(document)
    assert not accepts(document, json_schema())


@pytest.mark.parametrize("text", ["results.expires = 'never'", "results.url = 'disabled'", "worker.grace = '1.5h'"])
def test_json_schema_takes_what_we_take(text: str) -> None:
    check(tomllib.loads(text), json_schema())
    structure(grow(tomllib.loads(text), always("here")))


def described(shape: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for name, below in shape.get("properties", {}).items():
        assert below["description"], f"{path}{name}"
        if "default" in below:
            check(below["default"], below, f"{path}{name}")
        yield f"{path}{name}"
        yield from described(below, f"{path}{name}.")
        if isinstance(below.get("additionalProperties"), dict):
            yield from described(below["additionalProperties"], f"{path}{name}.*.")


def test_json_schema_describes_every_key() -> None:
    keys = {".".join((*path[:1], *("*" for _ in path[1:]), name)) for path, name in KEYS}
    assert set(described(json_schema())) == keys


def test_reference_has_a_row_for_every_setting() -> None:
    rows = {key: rest for key, *rest in reference()}
    leaves = [
        (path, name) for path, name in KEYS if (*path, name) not in SECTIONS and (*path, name, "some") not in SECTIONS
    ]
    assert len(rows) == len(leaves) == len(reference())
    assert rows["worker.grace"][:2] == ["duration", '"25s"']
    assert rows["codec.max_body_size"][:2] == ["size", '"64MB"']
    assert rows["results.expires"][:2] == ['duration or "never"', '"1d"']
    assert rows['tasks."NAME OR GLOB".ack'][:2] == ['"late" or "early"', "not set"]
    assert rows["schedules.NAME.task"][:2] == ["string", "required"]
    assert rows["codec.accept"][:2] == ["list of strings", '["json"]']
    assert all(help_ for _, _, help_ in rows.values())


def test_reference_and_schema_of_a_plugin() -> None:
    rows = {key: rest for key, *rest in reference(Options)}
    assert rows["db"] == ["integer", "0", "Number of the database."]
    assert rows["tls.verify"][0] == "boolean"
    assert json_schema(Required)["required"] == ["bucket"]
    defaults = {name: shape.get("default") for name, shape in json_schema(Options)["properties"].items()}
    assert (defaults["timeout"], defaults["kind"], defaults["tags"], defaults["root"]) == ("5s", "fast", [], None)
    json.dumps(json_schema(Options))
