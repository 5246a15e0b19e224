"""``umbel config``, ``umbel report``, ``umbel plugins``, ``umbel shell``."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from umbel.plugins import inventory
from umbel.plugins.inventory import Finding, PluginRecord


def test_config_show_says_where_from(umbel: Any, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("umbel.toml").write_text('default_queue = "q"\n')
    monkeypatch.setenv("UMBEL_WORKER__GRACE", "1m")
    lines = umbel("--broker", "redis://:hunter2@h/0", "config", "show").stdout.splitlines()
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert rows["default_queue"].split() == ['"q"', f"{empty}/umbel.toml:1"]
    assert rows["worker.grace"].split(maxsplit=1) == ["60.0", "environment UMBEL_WORKER__GRACE"]
    assert rows["broker.url"].split(maxsplit=1) == ['"redis://:***@h/0"', "command line --broker"]
    assert rows["timezone"].split() == ['"UTC"', "default"]
    document = json.loads(umbel("config", "show", "--json").stdout)
    assert document["file"] == f"{empty}/umbel.toml"
    assert document["settings"]["default_queue"] == {"value": "q", "origin": f"{empty}/umbel.toml:1"}


def test_config_show_knows_the_apps_code(umbel: Any, empty: Path) -> None:
    Path("coded.py").write_text('from umbel import Umbel\napp = Umbel("coded", broker="memory://")\n')
    settings = json.loads(umbel("-A", "coded", "config", "show", "--json").stdout)["settings"]
    assert settings["broker.url"] == {"value": "memory://", "origin": "code"}
    assert settings["app"] == {"value": "coded", "origin": "command line --app"}


def test_config_check_finds_everything_that_is_named(umbel: Any, doubles: ModuleType) -> None:
    good = ["-o", "worker.pool=nopool"]
    result = umbel("config", "check", *good, "-o", "imports=nowhere", "-o", "codec.accept=doubles:PlainJson,xml")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert "no module 'nowhere'" in lines[0]
    assert "no serializer 'xml'" in lines[1]
    assert "no pool 'nopool'" in lines[2]


def test_config_check_shows_all_wrong_settings(umbel: Any, empty: Path) -> None:
    result = umbel("config", "check", "-o", "brokr.url=x", "-o", "worker.concurrency=0")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 2


def test_config_schema_is_json(umbel: Any, empty: Path) -> None:
    assert "broker" in json.loads(umbel("config", "schema").stdout)["properties"]


def test_report(umbel: Any, doubles: ModuleType) -> None:
    document = json.loads(umbel("report", "--json", "-o", "worker.pool=nopool").stdout)
    assert document["python"]
    assert document["distributions"]["umbel-core"]
    assert document["settings"]["worker.pool"] == {"value": "nopool", "origin": "command line --pool"}
    assert {"kind": "pool", "name": "nopool", "distribution": "not installed", "version": "-"} in document["plugins"]
    names = {(plugin["kind"], plugin["name"]): plugin["distribution"] for plugin in document["plugins"]}
    assert names["transport", "doubles:FakeTransport"] == "your own"
    text = umbel("report", "--broker", "redis://:hunter2@h/0").stdout
    assert "umbel-core" in text
    assert "hunter2" not in text


def test_a_report_of_wrong_settings_is_a_report(umbel: Any, empty: Path) -> None:
    result = umbel("report", "-o", "brokr.url=x")
    assert result.exit_code == 0
    assert "problem: command line --set brokr.url: brokr is not a setting" in result.stdout


RECORD = PluginRecord(
    kind="result_store",
    name="redis",
    distribution="umbel-redis",
    version="1.2",
    target="umbel_redis:Store",
    api_version=(1, 0),
    capabilities={"max_delay": float("inf")},
    state="broken",
    reason="it is broken\nfor a reason",
)


def test_plugins_are_listed(umbel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import umbel.cli.plugins as plugins

    monkeypatch.setattr(plugins, "inventory", lambda *, load: [RECORD])
    heading, row, _, reason = umbel("plugins").stdout.splitlines()
    assert heading.split() == ["KIND", "NAME", "DISTRIBUTION", "VERSION", "API", "STATE"]
    assert row.split() == ["result", "store", "redis", "umbel-redis", "1.2", "1.0", "broken"]
    assert reason == "it is broken\\nfor a reason"
    (record,) = json.loads(umbel("plugins", "--json").stdout)
    assert record["capabilities"] == {"max_delay": "inf"}
    monkeypatch.setattr(plugins, "inventory", lambda *, load: [])
    assert "no plugin is installed" in umbel("plugins").stdout


@pytest.mark.parametrize(("level", "status"), [("warning", 0), ("error", 1)])
def test_plugins_are_checked(umbel: Any, monkeypatch: pytest.MonkeyPatch, level: Any, status: int) -> None:
    import umbel.cli.plugins as plugins

    finding = Finding(
        kind="pool", name="x", distribution="umbel-x", check="methods", level=level, message="lacks start"
    )
    monkeypatch.setattr(plugins, "inventory", lambda *, load: [RECORD])
    monkeypatch.setattr(plugins, "check", lambda name: [finding] if name == "redis" else [])
    result = umbel("plugins", "check")
    assert result.exit_code == status
    assert "lacks start" in result.stdout
    assert json.loads(umbel("plugins", "check", "redis", "--json").stdout)[0]["check"] == "methods"
    assert umbel("plugins", "check", "other").stdout == "nothing is wrong with other\n"


def test_an_unknown_plugin_is_an_error(umbel: Any) -> None:
    assert umbel("plugins", "check", "no-such-plugin").exit_code == 1
    assert inventory.inventory(load=False) is not None


def test_shell(umbel: Any, doubles: ModuleType) -> None:
    result = umbel("-A", "tasks", "shell", "--plain", input="print(app.name, add(1, 2), sorted(tasks))\n")
    assert "tasks 3 ['tasks.add', 'tasks.quiet']" in result.output
