"""Reading, merging, provenance, and what may be shown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from umbel.errors import SettingsError
from umbel.settings.schema import Settings
from umbel.settings.sources import Loaded, Text, join_key, load, mask, masked, option_name, split_key, variable


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "a" / "b").mkdir(parents=True)
    return tmp_path


def read(start: Path, environ: Mapping[str, str] | None = None, **sources: Any) -> Loaded:
    return load(start=start, environ=environ or {}, **sources)


def problems(start: Path, environ: Mapping[str, str] | None = None, **sources: Any) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        read(start, environ, **sources)
    return caught.value.problems


# --- the file -------------------------------------------------------------------------------------


def test_no_file(home: Path) -> None:
    loaded = read(home)
    assert loaded.settings == Settings()
    assert loaded.file is None
    assert set(loaded.provenance.values()) == {"default"}


def test_found_upwards(home: Path) -> None:
    (home / "umbel.toml").write_text('app = "shop"')
    loaded = read(home / "a" / "b")
    assert loaded.settings.app == "shop"
    assert loaded.file == home / "umbel.toml"


def test_the_nearest_folder_wins(home: Path) -> None:
    (home / "umbel.toml").write_text('app = "far"')
    (home / "a" / "pyproject.toml").write_text('[tool.umbel]\napp = "near"')
    assert read(home / "a" / "b").settings.app == "near"


def test_umbel_toml_wins_over_pyproject(home: Path) -> None:
    (home / "umbel.toml").write_text('app = "one"')
    (home / "pyproject.toml").write_text('[tool.umbel]\napp = "two"')
    assert read(home).settings.app == "one"


@pytest.mark.parametrize("text", ["[tool.other]\nx = 1", '[project]\ndependencies = ["umbel"]', "this is not TOML"])
def test_a_pyproject_without_our_table_is_passed_over(home: Path, text: str) -> None:
    (home / "umbel.toml").write_text('app = "shop"')
    (home / "a" / "pyproject.toml").write_text(text)
    assert read(home / "a").settings.app == "shop"


def test_named_file_and_variable(home: Path) -> None:
    (home / "umbel.toml").write_text('app = "found"')
    (home / "one.toml").write_text('app = "one"')
    (home / "two.toml").write_text('app = "two"')
    environ = {"UMBEL_CONFIG": str(home / "one.toml")}
    assert read(home, environ).settings.app == "one"
    assert read(home, environ, file=home / "two.toml").settings.app == "two"
    assert read(home, {"UMBEL_CONFIG": ""}).settings.app == "found"


def test_start_is_the_working_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "umbel.toml").write_text('app = "shop"')
    monkeypatch.chdir(home / "a")
    monkeypatch.setenv("UMBEL_WORKER__POOL", "solo")
    monkeypatch.delenv("UMBEL_CONFIG", raising=False)
    settings = load().settings
    assert (settings.app, settings.worker.pool) == ("shop", "solo")


def test_a_byte_order_mark_is_no_harm(home: Path) -> None:
    (home / "umbel.toml").write_bytes('app = "shop"'.encode("utf-8-sig"))
    assert read(home).settings.app == "shop"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b'app = "shop"\nx ==\n', "umbel.toml: is not TOML: Invalid value (at line 2, column 4); correct that place"),
        (b'app = "shop"\nx = [1,', "(at line 2, column 8)"),
        (b'app = "shop"\n# caf\xe9\n', "umbel.toml:2: byte 0xe9 is not UTF-8; save it as UTF-8"),
        (b"[broker]\nlease = " + b"1" * 5000, "umbel.toml: is not TOML: "),
    ],
)
def test_files_that_cannot_be_understood(home: Path, data: bytes, sentence: str) -> None:
    (home / "umbel.toml").write_bytes(data)
    (problem,) = problems(home)
    assert problem.startswith(str(home / "umbel.toml"))
    assert sentence in problem


def test_files_that_cannot_be_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = home / "gone.toml"
    assert problems(home, file=gone) == (f"{gone}: there is no such file; correct the path",)
    assert problems(home, {"UMBEL_CONFIG": str(gone)}) == (
        f"{gone}: there is no such file; correct or unset UMBEL_CONFIG",
    )
    assert problems(home, file=home / "a") == (f"{home / 'a'}: is a directory; name the file in it",)
    (home / "umbel.toml").mkdir()
    assert problems(home) == (f"{home / 'umbel.toml'}: is a directory; name the file in it",)
    (home / "pyproject.toml").write_text("[tool.other]")
    (problem,) = problems(home, file=home / "pyproject.toml")
    assert "there is no table [tool.umbel] in it" in problem

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    (problem,) = problems(home)
    assert "cannot be read (Permission denied)" in problem


def test_a_table_that_is_none(home: Path) -> None:
    (home / "pyproject.toml").write_text("[tool]\numbel = 5")
    (problem,) = problems(home)
    assert problem == f"{home / 'pyproject.toml'}: tool.umbel is not a table; begin it with [tool.umbel]"


# --- lines ----------------------------------------------------------------------------------------

LINES = '''
app = "shop"  # a comment
broker.url = "memory://"
[results]
expires = """1d"""
options = { db = 1,
            b = 2 }
[ tasks . "shop.send" ]
"queue" = "mail"
[tasks.'größe.*']
rate_limit = "5/s"
[schedules.x]
task = \'\'\'
[worker]
pool = "in a string"
\'\'\'
every = 5
args = [
  "pool = 1",
]
[worker]  # pool
pool = "solo"
'''


@pytest.mark.parametrize("project", [False, True])
def test_lines(home: Path, project: bool) -> None:
    text = LINES.replace("options = { db = 1,\n            b = 2 }", "options = { db = 1, b = 2 }\n")
    if project:
        text = text.replace("[ tasks", "[ tool . umbel . tasks").replace("[tasks", "[tool.umbel.tasks")
        text = text.replace("[results", "[tool.umbel.results").replace("[schedules", "[tool.umbel.schedules")
        text = text.replace("[worker]  #", "[tool.umbel.worker]  #").replace('\napp = "', '[tool.umbel]\napp = "')
    path = home / ("pyproject.toml" if project else "umbel.toml")
    path.write_text(text, encoding="utf-8")
    origins = {key: origin for key, origin in read(home).provenance.items() if origin != "default"}
    assert origins == {
        "app": f"{path}:2",
        "broker.url": f"{path}:3",
        "results.expires": f"{path}:5",
        "results.options.db": f"{path}:6",
        "results.options.b": f"{path}:6",
        'tasks."shop.send".queue': f"{path}:9",
        'tasks."größe.*".rate_limit': f"{path}:11",
        "schedules.x.task": f"{path}:13",
        "schedules.x.every": f"{path}:17",
        "schedules.x.args": f"{path}:18",
        "worker.pool": f"{path}:22",
    }


# --- merging --------------------------------------------------------------------------------------


def test_precedence_and_provenance(home: Path) -> None:
    path = home / "umbel.toml"
    path.write_text(
        "[worker]\nconcurrency = 1\nprefetch = 1\ngrace = 1\npool = 'a'\n[broker.options]\nx = 1\ny = 1\n"
        "[tasks.add]\nqueue = 'a'\ntime_limit = 5"
    )
    environ = {
        "UMBEL_WORKER__PREFETCH": "2",
        "UMBEL_WORKER__GRACE": "2",
        "UMBEL_WORKER__POOL": "b",
        "UMBEL_BROKER__OPTIONS__Y": "2",
        "UMBEL_TASKS__ADD__QUEUE": "b",
        "OTHER": "x",
    }
    code = {"worker.grace": 3, "worker": {"pool": "c"}, "tasks": {"shop.*": {"queue": "c"}}}
    loaded = read(home, environ, code=code, command_line={"worker.pool": "d", "broker.url": None, "app": "shop"})
    worker = loaded.settings.worker
    assert (worker.concurrency, worker.prefetch, worker.grace, worker.pool) == (1, 2, 3, "d")
    assert loaded.settings.broker.options == {"x": 1, "y": "2"}
    assert loaded.settings.broker.url == Settings().broker.url
    assert loaded.settings.tasks["add"].time_limit == 5
    given = {key: origin for key, origin in loaded.provenance.items() if origin != "default"}
    assert given == {
        "app": "command line --app",
        "worker.concurrency": f"{path}:2",
        "worker.prefetch": "environment UMBEL_WORKER__PREFETCH",
        "worker.grace": "code",
        "worker.pool": "command line --pool",
        "broker.options.x": f"{path}:7",
        "broker.options.y": "environment UMBEL_BROKER__OPTIONS__Y",
        "tasks.add.queue": "environment UMBEL_TASKS__ADD__QUEUE",
        "tasks.add.time_limit": f"{path}:11",
        'tasks."shop.*".queue': "code",
    }
    assert loaded.provenance.keys() == masked(loaded.settings).keys()


SOURCES = ["file", "environment", "code", "command line"]


@pytest.mark.parametrize("highest", range(4))
def test_each_source_wins_over_those_before_it(home: Path, highest: int) -> None:
    (home / "umbel.toml").write_text("default_queue = 'file'")
    loaded = read(
        home,
        {"UMBEL_DEFAULT_QUEUE": "environment"} if highest >= 1 else {},
        code={"default_queue": "code"} if highest >= 2 else None,
        command_line={"default_queue": "command line"} if highest >= 3 else None,
    )
    assert loaded.settings.default_queue == SOURCES[highest]
    assert SOURCES[highest].split()[0] in loaded.provenance["default_queue"] or highest == 0


def test_environment_values(home: Path) -> None:
    environ = {
        "UMBEL_APP": "shop",
        "UMBEL_IMPORTS": "shop.tasks, shop.mail",
        "UMBEL_WORKER__QUEUES": '["a,b", "ü"]',
        "UMBEL_CODEC__ACCEPT": "json",
        "UMBEL_PLUGINS__HOOKS": "",
        "UMBEL_WORKER__CONCURRENCY": "4",
        "UMBEL_WORKER__PREFETCH": "",
        "UMBEL_WORKER__GRACE": "1m",
        "UMBEL_BROKER__LEASE": "7.5",
        "UMBEL_BROKER__PUBLISH_TIMEOUT": '"2s"',
        "UMBEL_WORKER__MAX_MEMORY_PER_CHILD": "200MB",
        "UMBEL_RESULTS__EXTENDED": "true",
        "UMBEL_RESULTS__EXPIRES": "never",
        "UMBEL_RESULTS__URL": "disabled",
        "UMBEL_BROKER__OPTIONS__PASSWORD": "0x10",
        "UMBEL_RESULTS__OPTIONS": '{db = 5, names = ["a"]}',
        "UMBEL_SCHEDULES__NIGHT": '{task = "shop.report", every = "1h", args = [1, "x"]}',
        "UMBEL_CONFIG": "",
        "UMBEL_DEBUG": "1",
    }
    loaded = read(home, environ)
    settings = loaded.settings
    for key in ("results.options.db", "schedules.night.every"):
        assert loaded.provenance[key].startswith("environment UMBEL_")
    assert settings.app == "shop"
    assert settings.imports == ("shop.tasks", "shop.mail")
    assert settings.worker.queues == ("a,b", "ü")
    assert settings.codec.accept == ("json",)
    assert settings.plugins.hooks == ()
    assert (settings.worker.concurrency, settings.worker.prefetch, settings.worker.grace) == (4, None, 60)
    assert (settings.broker.lease, settings.broker.publish_timeout) == (7.5, 2)
    assert settings.worker.max_memory_per_child == 200_000_000
    assert settings.results.extended is True
    assert (settings.results.expires, settings.results.url) == (None, None)
    assert settings.broker.options == {"password": "0x10"}
    assert type(settings.broker.options["password"]) is str
    assert settings.results.options == {"db": 5, "names": ["a"]}
    assert settings.schedules["night"].every == 3600
    assert settings.schedules["night"].args == (1, "x")


def test_text_for_a_string_is_taken_as_it_is(home: Path) -> None:
    settings = read(home, {"UMBEL_DEFAULT_QUEUE": "123", "UMBEL_WORKER__NAME": "true"}).settings
    assert (settings.default_queue, settings.worker.name) == ("123", "true")


def test_the_command_line_is_text_and_code_is_not(home: Path) -> None:
    command_line = {"worker.concurrency": "4", "worker.queues": "a,b", 'tasks."shop.*".time_limit': "1m"}
    loaded = read(home, command_line=command_line)
    assert (loaded.settings.worker.concurrency, loaded.settings.worker.queues) == (4, ("a", "b"))
    assert loaded.settings.tasks["shop.*"].time_limit == 60
    assert loaded.provenance['tasks."shop.*".time_limit'] == 'command line --set tasks."shop.*".time_limit'
    assert problems(home, code={"worker.concurrency": "4"}) == (
        'code: worker.concurrency = "4": must be a whole number such as 4; leave out the quotes',
    )


def test_one_source_gives_a_value_once(home: Path) -> None:
    assert problems(home, {"UMBEL_BROKER__URL": "a://", "UMBEL_broker__url": "b://"}) == (
        "environment UMBEL_broker__url: broker.url is given by environment UMBEL_BROKER__URL too; give it once",
    )
    assert problems(home, {"UMBEL_BROKER__OPTIONS": "{a=1}", "UMBEL_BROKER__OPTIONS__B": "2"}) == (
        "environment UMBEL_BROKER__OPTIONS__B: broker.options is given by environment UMBEL_BROKER__OPTIONS too;"
        " give it once",
    )
    assert problems(home, code={"broker.url": "a://", "broker": {"url": "b://"}}) == (
        "code: broker.url is given by code too; give it once",
    )


@pytest.mark.parametrize("text", ["tasks.shop.*.queue", "", "#a", "a = 1\nb", "a b"])
def test_not_dotted_keys(home: Path, text: str) -> None:
    for source in ("code", "command_line"):
        (problem,) = problems(home, None, **{source: {text: 1}})
        assert f"{text!r} is not a dotted key; write it as TOML does" in problem


def test_keys_are_written_as_they_are_read() -> None:
    for key in [("a", "b"), ("tasks", "shop.*", "queue"), ("x", 'quo"te', "größe", ""), ("a-b_c",)]:
        assert split_key(join_key(key)) == key
    assert join_key(("tasks", "shop.*", "queue")) == 'tasks."shop.*".queue'


def test_names_of_options_and_variables() -> None:
    keys = ["app", "broker.url", "results.url", "worker.log_level", "broker.lease", "codec.accept"]
    names = [option_name(split_key(key) or ()) for key in keys]
    expected = ["--app", "--broker", "--results", "--log-level", "--set broker.lease", "--set codec.accept"]
    assert names == expected
    assert variable(("worker", "log_level")) == "UMBEL_WORKER__LOG_LEVEL"


@pytest.mark.parametrize(("text", "value"), [("4", 4), ("[1]", [1]), ("a b", "a b"), ("1\nx = 2", "1\nx = 2")])
def test_text_as_a_toml_value(text: str, value: Any) -> None:
    assert Text(text).toml() == value


# --- showing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://:hunter2@host/0", "redis://:***@host/0"),
        ("amqp://user:hunter2@host//", "amqp://user:***@host//"),
        ("amqp://user:hun@ter/2?#:@host", "amqp://user:***@host"),
        ("amqp://me@corp:hunter2@host", "amqp://me@corp:***@host"),
        ("amqp://user:hun ter2@host", "amqp://user:***@host"),
        ("amqp://a:hunter2@one;amqp://b:hunter2@two", "amqp://a:***@two"),
        ("redis://h/0?password=hunter2&db=1", "redis://h/0?password=***&db=1"),
        ("sqs://?aws_secret_access_key=hunter2", "sqs://?aws_secret_access_key=***"),
        ("host=h password='hunter 2' dbname=d", "host=h password=*** dbname=d"),
        ("Endpoint=sb://x/;SharedAccessKey=hunter2=;A=b", "Endpoint=sb://x/;SharedAccessKey=***;A=b"),
        ("pässwort", "pässwort"),
    ],
)
def test_masks(text: str, shown: str) -> None:
    assert mask(text) == shown


def test_masked_settings(home: Path) -> None:
    code = {
        "broker": {
            "url": "redis://:hunter2@h",
            "options": {"Password": 5, "credentials": {"user": "hunter2"}, "hosts": ["a://u:hunter2@h"], "db": 1},
        },
        "schedules": {"reset_password": {"task": "reset", "every": 1, "kwargs": {"api_key": "hunter2", "empty": ""}}},
    }
    shown = masked(read(home, code=code).settings)
    assert shown["broker.url"] == "redis://:***@h"
    assert shown["broker.options.Password"] == "***"
    assert shown["broker.options.credentials.user"] == "***"
    assert shown["broker.options.hosts"] == ["a://u:***@h"]
    assert shown["broker.options.db"] == 1
    assert shown["schedules.reset_password.task"] == "reset"
    assert shown["schedules.reset_password.kwargs.api_key"] == "***"
    assert "hunter2" not in str(shown)


def test_problems_show_no_secret(home: Path) -> None:
    environ = {"UMBEL_RESULTS__OPTIONS__TOKEN": "hunter2"}
    code = {
        "worker.concurrency": "amqp://u:hunter2@h",
        "broker.lease": {"password": "hunter2"},
        "app": "amqp://u:hunter2@h",
        "tasks.x.kwargs.password": "hunter2",
        "codec.accept": ["json", {"secret": "hunter2"}],
        "broker.url": ["x://u:hunter2@h"],
    }
    text = "\n".join(problems(home, environ, code=code))
    assert "hunter2" not in text
    assert 'worker.concurrency = "amqp://u:***@h"' in text
