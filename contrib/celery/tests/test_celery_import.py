"""`umbel config import-celery`: what it writes is read by Umbel, and what it cannot carry over is said with its reason."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from umbel_celery.command import import_celery, toml
from umbel_celery.migration import migrate

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Write a module with this source, run the command on it in its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(source: str, *options: str, name: str = f"made_{tmp_path.name}", reference: str = "") -> Result:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return CliRunner().invoke(import_celery, [reference or name, *options])

    return run


def written(tmp_path: Path) -> dict[str, Any]:
    return tomllib.loads((tmp_path / "umbel.toml").read_text())


APP = """
import sys
from datetime import timedelta
from types import SimpleNamespace

from celery import Celery
from celery.beat import BeatLazyFunc
from celery.schedules import crontab, solar
from kombu import Exchange, Queue

sys.modules["ephem"] = SimpleNamespace(Observer=SimpleNamespace)  # which Celery's class computes with, when it is asked

app = Celery("shop", broker="redis://:secret@localhost:6379/5", backend="redis://localhost/6", include=["shop.tasks"],
             set_as_current=False)
app.conf.update(
    broker_transport_options={"visibility_timeout": 600, "retry_on_timeout": True},
    result_backend_transport_options={"global_keyprefix": "shop", "result_chord_ordered": False, "retry_policy": {}},
    result_expires=timedelta(hours=1),
    accept_content=["json", "application/x-msgpack"],
    task_compression="gzip",
    task_acks_late=True,
    task_time_limit=300,
    task_default_rate_limit="100/m",
    task_annotations={"shop.tasks.mail": {"rate_limit": 5, "time_limit": 30, "on_failure": print}},
    task_routes={"shop.tasks.mail": {"queue": "mail"}, "shop.tasks.*": "shop", "x": {"exchange": "y"}},
    task_queues=[Queue("mail", max_priority=5), Queue("celery"),
                 Queue("log", Exchange("logs", "topic"), "log.#", queue_arguments={"x-queue-type": "quorum"})],
    timezone="Asia/Seoul",
    worker_concurrency=4,
    worker_max_memory_per_child=200_000,
    worker_prefetch_multiplier=1,
    worker_send_task_events=True,
    beat_cron_starting_deadline=600,
    beat_schedule={
        "nightly": {"task": "shop.tasks.report", "schedule": crontab(minute=0, hour="3,4", day_of_week="mon-fri"),
                    "args": (1, "ü"), "options": {"queue": "mail"}},
        "often": {"task": "shop.tasks.tick", "schedule": 30.0, "kwargs": {"deep": {"x": None, "y": [True]}}},
        "odd": {"task": "shop.tasks.odd", "schedule": object()},
        "lazy": {"task": "shop.tasks.odd", "schedule": 30.0, "args": (BeatLazyFunc(print),)},
        "lamps": {"task": "shop.tasks.lamps", "schedule": solar("sunset", 37.57, 126.98)},
        "round": {"task": "shop.tasks.tick", "schedule": timedelta(minutes=5), "relative": True},
    },
)
"""


def test_an_app(run: Run, tmp_path: Path) -> None:
    done = run(APP)
    assert done.exit_code == 0, done.output
    made = written(tmp_path)
    assert made["broker"] == {"url": "celery+redis://:secret@localhost:6379/5", "options": {"visibility_timeout": 600}}
    assert made["results"] == {"url": "redis://localhost/6", "expires": 3600, "options": {"prefix": "shop"}}
    assert made["codec"] == {"accept": ["json", "msgpack"], "compression": "zlib"}
    assert made["default_queue"] == "celery"
    assert made["imports"] == ["shop.tasks"]
    assert made["tasks"] == {
        "*": {"time_limit": 300, "rate_limit": "100/m"},
        "shop.tasks.mail": {"rate_limit": "5/s", "time_limit": 30, "queue": "mail"},
        "shop.tasks.*": {"queue": "shop"},
    }
    assert made["queues"]["mail"] == {"max_priority": 5}
    assert made["queues"]["log"] == {
        "type": "quorum",
        "exchange": "logs",
        "exchange_type": "topic",
        "routing_key": "log.#",
    }
    assert made["worker"] == {
        "concurrency": 4,
        "max_memory_per_child": 204_800_000,
        "queues": ["mail", "celery", "log"],
    }
    assert made["schedules"] == {
        "nightly": {
            "task": "shop.tasks.report",
            "crontab": "0 3,4 * * mon-fri",
            "args": [1, "ü"],
            "options": {"queue": "mail"},
        },
        "often": {"task": "shop.tasks.tick", "every": 30, "kwargs": {"deep": {"y": [True]}}},
        "lamps": {"task": "shop.tasks.lamps", "when": {"solar": "sunset", "latitude": 37.57, "longitude": 126.98}},
        "round": {"task": "shop.tasks.tick", "every": 300},
    }
    assert made["plugins"] == {
        "hooks": ["celery", "solar"],
        "options": {"celery": {"chord_ordered": False, "events": True}},
    }
    left = done.stderr.partition("not carried over:")[2]
    for name in (
        "retry_on_timeout",
        "retry_policy",
        "on_failure",
        "task_routes['x']",
        "worker_prefetch_multiplier",
        "beat_schedule['odd']",
        "beat_schedule['lazy']",
        "beat_cron_starting_deadline",
        "beat_schedule['round']['relative']",
    ):
        assert name in left
    assert "task_acks_late" not in left
    assert "secret" not in done.stderr
    assert "password" in done.stderr


def test_umbel_reads_what_is_written(run: Run, tmp_path: Path) -> None:
    assert run(APP).exit_code == 0
    code = "from umbel.settings.sources import load; print(load().settings.tasks['shop.tasks.mail'].rate_limit)"
    read = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert read.stdout == "5/s\n", read.stderr


def test_a_configuration_module_with_old_names(run: Run, tmp_path: Path) -> None:
    done = run(
        """
        BROKER_URL = "amqp://guest@localhost//"
        CELERY_RESULT_BACKEND = "db+sqlite:///x.db"
        CELERY_TASK_SERIALIZER = "json"
        CELERY_ALWAYS_EAGER = True
        """
    )
    assert done.exit_code == 0, done.output
    made = written(tmp_path)
    assert made["broker"]["url"] == "amqp://guest@localhost//"
    assert made["results"]["url"] == "disabled"
    assert made["codec"]["serializer"] == "json"
    for name in ("result_backend", "task_always_eager", "task_acks_late"):
        assert f"  {name}: " in done.stderr


def test_a_file_is_overwritten_only_when_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "umbel.toml").write_text("# mine\n")
    refused = run("timezone = 'UTC'")
    assert (refused.exit_code, "--force" in refused.stderr) == (1, True)
    assert (tmp_path / "umbel.toml").read_text() == "# mine\n"
    assert run("timezone = 'UTC'", "--output=other.toml").exit_code == 0
    assert run("timezone = 'UTC'", "--force").exit_code == 0
    assert written(tmp_path)["timezone"] == "UTC"
    assert tomllib.loads(run("timezone = 'UTC'", "--output=-").stdout)["timezone"] == "UTC"


@pytest.mark.parametrize(
    ("source", "reference", "what"),
    [
        ("1/0", "", "ZeroDivisionError"),
        ("x = 1", "no_such_module_here", "no_such_module_here"),
        ("x = 1", "{}:x", "no Celery app"),
        ("from celery import Celery\na, b = (Celery(n, set_as_current=False) for n in 'ab')", "", "several apps"),
    ],
)
def test_what_cannot_be_read_is_told(run: Run, tmp_path: Path, source: str, reference: str, what: str) -> None:
    name = f"made_{tmp_path.name}"
    done = run(source, reference=reference.format(name))
    assert (done.exit_code, what in done.stderr) == (1, True), done.stderr
    assert not (tmp_path / "umbel.toml").exists()


def test_every_setting_of_celery_is_carried_or_has_a_reason() -> None:
    from celery.app.defaults import NAMESPACES, flatten

    for name, _ in flatten(NAMESPACES):
        made = migrate({name: object()})
        told = dict(made.left)
        assert made.carried or told[name], name


def test_toml_of_awkward_values() -> None:
    table = {"a b": {'"': [1.5, True, "ü\n\x7f\\"]}, "list": [{"x": {"y": []}}], "x": {"y": {"z": 1}}}
    assert tomllib.loads(toml(table)) == table
