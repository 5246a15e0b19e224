"""The schema: documented fields, durations, sizes, rates, and the checks of each class."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from attrs import evolve, fields, has
from attrs.exceptions import FrozenInstanceError
from hypothesis import given
from hypothesis import strategies as st

from umbel.settings import schema
from umbel.settings.schema import (
    PluginSettings,
    QueueSettings,
    ResultSettings,
    ScheduleSettings,
    Settings,
    TaskSettings,
    WorkerSettings,
)
from umbel.settings.units import format_bytes, format_seconds, parse_bytes, parse_rate, parse_seconds

CLASSES = [value for name, value in vars(schema).items() if name.endswith("Settings") and has(value)]


def test_every_section_is_a_class_of_the_schema() -> None:
    assert len(CLASSES) == 12


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_has_one_sentence_of_help(cls: Any) -> None:
    assert fields(cls)
    assert cls.__doc__
    for field in fields(cls):
        text = field.metadata["help"]
        assert text[:1].isupper(), field.name
        assert text.endswith("."), field.name
        assert ". " not in text, field.name


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().default_queue = "other"  # type: ignore[misc]  # that it is frozen is the point


def test_defaults() -> None:
    settings = Settings()
    assert (settings.app, settings.imports, settings.default_queue, settings.timezone) == (None, (), "default", "UTC")
    assert (settings.broker.url, settings.broker.lease) == ("sqlite:///umbel.sqlite3", 15)
    assert settings.broker.publish_timeout == 5
    assert (settings.results.url, settings.results.expires) == ("sqlite:///umbel.sqlite3", 86400)
    assert (settings.codec.accept, settings.codec.max_body_size) == (("json",), 64_000_000)
    assert (settings.worker.pool, settings.worker.grace, settings.worker.max_deliveries) == ("prefork", 25, 3)
    assert (settings.worker.watchdog, settings.worker.log_level) == (30, "INFO")
    assert (settings.plugins.hooks, settings.plugins.disable) == ((), ())
    assert all(value is None for value in (getattr(TaskSettings(), field.name) for field in fields(TaskSettings)))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("30s", 30), ("1.5s", 1.5), ("5m", 300), ("1h", 3600), ("1d", 86400), ("0s", 0), ("0.5d", 43200)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "30", "30 s", "-1s", "1h30m", "1w", "1S", "1e3s", ".5s", "30s\n", "٣s"])
def test_not_durations(text: str) -> None:
    with pytest.raises(ValueError, match='must be a duration such as "500ms"'):
        parse_seconds(text)


def test_a_duration_ends() -> None:
    with pytest.raises(ValueError, match="must be a duration that ends"):
        parse_seconds("9" * 400 + "d")


@pytest.mark.parametrize(
    ("text", "size"),
    [("0B", 0), ("10MB", 10_000_000), ("64KiB", 65536), ("1.5GiB", 1_610_612_736), ("0.001KB", 1), ("2GB", 2 * 10**9)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "10", "10M", "10 MB", "-1KB", "10mb", "MB", "1MB\n"])
def test_not_sizes(text: str) -> None:
    with pytest.raises(ValueError, match='must be a size such as "10MB"'):
        parse_bytes(text)


def test_a_size_is_whole() -> None:
    with pytest.raises(ValueError, match="whole number of bytes"):
        parse_bytes("0.1KiB")


@pytest.mark.parametrize(("text", "rate"), [("10/s", 10), ("120/m", 2), ("1800/h", 0.5), ("0.5/s", 0.5)])
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "100", "0/s", "100/w", "100 / m", "-1/s", "m", "1/s\n"])
def test_not_rates(text: str) -> None:
    with pytest.raises(ValueError, match='must be a rate such as "10/s"'):
        parse_rate(text)


@given(st.integers(min_value=0, max_value=10**7))
def test_durations_are_shown_as_they_are_read(milliseconds: int) -> None:
    assert parse_seconds(format_seconds(milliseconds / 1000)) == pytest.approx(milliseconds / 1000)


@given(st.integers(min_value=0, max_value=10**13))
def test_sizes_are_shown_as_they_are_read(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == size


def test_shown_in_the_largest_unit() -> None:
    assert [format_seconds(each) for each in (0, 0.25, 15, 90, 300, 7200, 172800)] == [
        *("0s", "250ms", "15s", "90s", "5m", "2h", "2d")
    ]
    assert [format_bytes(each) for each in (0, 7, 65536, 64_000_000)] == ["0B", "7B", "64KiB", "64MB"]


def test_words_that_mean_none() -> None:
    assert ResultSettings(url="disabled").url is None
    assert ResultSettings(url="").url is None


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TaskSettings(priority=10), "priority must be from 0 to 9"),
        (lambda: TaskSettings(priority=-1), "priority must be from 0 to 9"),
        (lambda: TaskSettings(max_retries=-1), "max_retries must be at least 0"),
        (lambda: TaskSettings(rate_limit="fast"), "rate_limit must be a rate such as"),
        (lambda: TaskSettings(time_limit=10, soft_time_limit=11), r"soft_time_limit \(11s\) is longer than time_limit"),
        (lambda: TaskSettings(retry_backoff=60, retry_backoff_max=30), r"retry_backoff \(1m\) is longer than"),
        (lambda: TaskSettings(time_limit=0), "time_limit must be more than 0"),
        (lambda: WorkerSettings(concurrency=0), "concurrency must be at least 1"),
        (lambda: Settings(plugins=PluginSettings(options={"ear": {}})), "plugins.options has 'ear', which names no"),
        (lambda: QueueSettings(max_priority=0), "max_priority must be at least 1"),
        (lambda: QueueSettings(exchange=""), "exchange must not be empty"),
        (lambda: QueueSettings(exchange_type="topic"), "exchange_type says nothing without an exchange"),
        (lambda: QueueSettings(routing_key="a.b"), "routing_key says nothing without an exchange"),
        (lambda: ScheduleSettings(task="a"), "needs one of crontab, every, at or when, and has none"),
        (lambda: ScheduleSettings(task="a", every=1, crontab="* * * * *"), "and has crontab and every"),
        (lambda: ScheduleSettings(task=" ", every=1), "task must not be empty"),
        (lambda: Settings(app="shop/tasks.py"), "app must be a module or module:attribute"),
        (lambda: Settings(app="shop:"), "app must be a module or module:attribute"),
        (lambda: Settings(imports=("shop:app",)), "imports must be modules only"),
        (lambda: Settings(timezone="Asia/Seol"), "timezone must be the name of a time zone"),
        (lambda: Settings(timezone="../etc"), "timezone must be the name of a time zone"),
    ],
)
def test_values_and_combinations_that_cannot_work(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_values_at_the_bounds() -> None:
    assert TaskSettings(priority=0, time_limit=5, soft_time_limit=5, retry_backoff=0, retry_backoff_max=1)
    assert Settings(app="päckchen.aufgaben:app", imports=("shop.tasks",), timezone="UTC")
    assert evolve(WorkerSettings(), grace=0).grace == 0


def test_the_schema_imports_nothing_heavy() -> None:
    script = (
        "import sys, umbel.settings.schema\n"
        "print({'cattrs', 'click', 'asyncio', 'stevedore', 'importlib.metadata', 'tomllib'} & set(sys.modules))\n"
        "import umbel.settings.sources\n"
        "print({'cattrs', 'click', 'asyncio', 'stevedore', 'importlib.metadata', 'tomllib'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "set()"]
