"""``umbel plugins``: forty of them at once, and why one is used."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from umbel.cli.group import root
from umbel.plugins import lineage
from umbel.plugins.kinds import KINDS
from umbel.settings.schema import Settings
from umbel.settings.structure import reference

from .conftest import DRIVERS, Install

Run = Callable[..., Result]

SHOP = """
    from umbel import Umbel, hookimpl
    from umbel_heron import FakeSerializer, FakeTransport

    class Own:
        @hookimpl
        def umbel_make_transport(self, url):
            return FakeTransport(url) if url.startswith("own") else None

        @hookimpl(wrapper=True)
        def umbel_make_serializer(self):
            return (yield)

    app = Umbel("shop", plugins=[Own()], settings={"tasks": {"shop.mail": {"serializer": "heron"}}})
"""

LISTENER = """
    from umbel import hookimpl

    class Listener:
        @hookimpl
        def umbel_task_settled(self): ...
        @hookimpl
        def umbel_worker_ready(self): ...
"""


@pytest.fixture
def umbel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """``umbel("plugins")``, called in this process and in an empty directory."""
    (folder := tmp_path / "empty").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("UMBEL_APP", "UMBEL_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    commands = dict(root.commands)

    def run(*arguments: str) -> Result:
        sys.modules.pop("shop", None)  # each call is a process of its own, and reads its settings once
        result = CliRunner().invoke(root, list(arguments), prog_name="umbel")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    yield run
    root.commands = commands


@pytest.fixture
def heron(install: Install) -> Install:
    install(
        "umbel-heron",
        {
            "umbel.transports": {"heron": "umbel_heron:FakeTransport"},
            "umbel.serializers": {"heron": "umbel_heron:FakeSerializer"},
            "umbel.hooks": {"ear": "umbel_heron.ear:Listener"},
        },
        {"umbel_heron.__init__": DRIVERS, "umbel_heron.ear": LISTENER},
        version="2.1",
    )
    return install


# --- forty plugins --------------------------------------------------------------------------------


def test_forty_plugins_of_which_three_are_broken_each_tell_their_trouble(umbel: Run, install: Install) -> None:
    broken = {
        7: ("1 / 0", "broken", "is broken: umbel_bird07:FakeTransport raised ZeroDivisionError: division by zero"),
        19: ("import feathers", "missing library", "needs the module 'feathers', which is not installed"),
        31: (DRIVERS + "\n    FakeTransport.api_version = (2, 0)\n", "incompatible", "is for plugin API 2.0"),
    }
    for number in range(40):
        source, *_ = broken.get(number, (DRIVERS,))
        name = f"bird{number:02}"
        install(
            f"umbel-{name}",
            {"umbel.transports": {name: f"umbel_{name}:FakeTransport"}},
            {f"umbel_{name}": source},
            version=f"1.{number}",
        )

    listed = umbel("plugins")
    assert listed.exit_code == 0
    table, *troubles = [part for part in listed.stdout.split("\n\n") if "bird" in part]
    rows = [row.split() for row in table.splitlines() if " bird" in row]
    assert [row[:4] for row in rows] == [["transport", f"bird{n:02}", f"umbel-bird{n:02}", f"1.{n}"] for n in range(40)]
    states = {n: " ".join(rows[n][4:]) for n in range(40)}
    assert {n: state for n, state in states.items() if state != "1.0 ok"} == {
        7: "- broken", 19: "- missing library", 31: "2.0 incompatible",
    }  # fmt: skip
    assert len(troubles) == 3
    for (_, _, sentence), trouble, number in zip(broken.values(), troubles, broken, strict=True):
        assert trouble.startswith(f"transport 'bird{number:02}' (umbel-bird{number:02} 1.{number}) ")
        assert sentence in trouble
        assert trouble.strip().count("\n") == 0

    records = {r["name"]: r for r in json.loads(umbel("plugins", "--json").stdout)}
    assert records["bird00"]["api_version"] == [1, 0]
    for number, (_, state, sentence) in broken.items():
        assert records[f"bird{number:02}"]["state"] == state
        assert sentence in records[f"bird{number:02}"]["reason"]


# --- why ------------------------------------------------------------------------------------------


def why(umbel: Run, key: str, *options: str, status: int = 0) -> dict[str, Any]:
    result = umbel(*options, "plugins", "why", key, "--json")
    assert result.exit_code == status, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_a_url_leads_through_the_hook_to_a_class_of_a_distribution(umbel: Run, heron: Install) -> None:
    options = ["--broker", "heron://me:secret@host/0"]
    assert why(umbel, "broker.url", *options) == {
        "setting": "broker.url",
        "value": "heron://me:***@host/0",
        "origin": "command line --broker",
        "components": [
            {
                "kind": "transport",
                "name": "heron",
                "hook": "umbel_make_transport",
                "answered_by": "entry-points",
                "wrapped_by": [],
                "distribution": "umbel-heron",
                "version": "2.1",
                "target": "umbel_heron:FakeTransport",
                "component": "umbel_heron.FakeTransport",
                "listens_to": [],
                "reason": "",
            }
        ],
    }
    said = umbel(*options, "plugins", "why", "broker.url").stdout
    assert "secret" not in said
    for words in (
        'setting broker.url = "heron://me:***@host/0"', "from command line --broker", "plugin transport heron",
        "hook umbel_make_transport", "answered by entry-points", "distribution umbel-heron 2.1",
        "target umbel_heron:FakeTransport", "component umbel_heron.FakeTransport",
    ):  # fmt: skip
        assert words in [" ".join(line.split()) for line in said.splitlines()]


def test_an_application_that_answers_itself_is_named(umbel: Run, heron: Install) -> None:
    heron("the-shop", {}, {"shop": SHOP})
    (found,) = why(umbel, "broker.url", "-A", "shop", "-o", "broker.url=own://x")["components"]
    assert (found["answered_by"], found["component"]) == ("Own", "umbel_heron.FakeTransport")
    assert found["distribution"] == "umbel-heron"
    (found,) = why(umbel, "broker.url", "-A", "shop", "-o", "broker.url=heron://x")["components"]
    assert found["answered_by"] == "entry-points"


def test_what_wraps_a_factory_is_named_and_a_task_may_have_its_own_serializer(umbel: Run, heron: Install) -> None:
    heron("the-shop", {}, {"shop": SHOP})
    answer = why(umbel, 'tasks."shop.mail".serializer', "-A", "shop")
    assert (answer["value"], answer["origin"]) == ("heron", "code")
    (found,) = answer["components"]
    assert (found["wrapped_by"], found["answered_by"]) == (["Own"], "entry-points")
    assert "wrapped by    Own" in umbel("-A", "shop", "plugins", "why", 'tasks."shop.mail".serializer').stdout


def test_a_dotted_path_has_no_distribution_of_its_own(umbel: Run, heron: Install) -> None:
    heron("the-shop", {}, {"birds.__init__": DRIVERS})
    (found,) = why(umbel, "broker.url", "-o", "broker.url=birds:FakeTransport")["components"]
    assert (found["target"], found["distribution"]) == ("birds:FakeTransport", None)


def test_every_name_of_a_list_is_told_and_trouble_is_an_exit_status(umbel: Run, heron: Install) -> None:
    options = ("-o", 'codec.accept=["heron", "herring"]')
    first, second = why(umbel, "codec.accept", *options, status=1)["components"]
    assert first["component"] == "umbel_heron.FakeSerializer"
    assert (second["component"], second["answered_by"]) == (None, None)
    assert second["reason"].startswith("no serializer 'herring' is installed")
    said = umbel(*options, "plugins", "why", "codec.accept").stdout
    assert "trouble  no serializer 'herring' is installed" in said


def test_a_listener_says_what_it_listens_to(umbel: Run, heron: Install) -> None:
    heron("the-shop", {}, {"birds.__init__": LISTENER})
    ear, own = why(umbel, "plugins.hooks", "-o", 'plugins.hooks=["ear", "birds:Listener"]')["components"]
    assert (ear["hook"], ear["distribution"], ear["component"]) == (
        "umbel.hooks", "umbel-heron", "umbel_heron.ear.Listener",
    )  # fmt: skip
    assert ear["listens_to"] == own["listens_to"] == ["umbel_task_settled", "umbel_worker_ready"]
    assert (own["distribution"], own["target"]) == (None, "birds:Listener")
    options = ("-o", 'plugins.hooks=["ear"]', "-o", 'plugins.disable=["ear"]')
    (ear,) = why(umbel, "plugins.hooks", *options, status=1)["components"]
    assert ear["reason"] == "hook 'ear' takes no part: [plugins] disable has it"


@pytest.mark.parametrize("key", ["codec.compression", "plugins.hooks", "tasks.x.serializer"])
def test_a_setting_that_names_nothing_leads_nowhere(umbel: Run, key: str) -> None:
    assert "\n\nno plugin is used\n" in umbel("plugins", "why", key).stdout
    assert why(umbel, key)["components"] == []


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("broker.ulr", "broker.ulr names no plugin; did you mean broker.url? these do: "),
        ("worker.concurrency", "worker.concurrency names no plugin; these do: broker.url, "),
        ("not a key", "not a key"),
    ],
)
def test_other_keys_are_refused(umbel: Run, key: str, sentence: str) -> None:
    result = umbel("plugins", "why", key)
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.split())


def test_every_setting_that_names_a_plugin_is_known() -> None:
    known = {key.replace('"NAME OR GLOB"', "*") for key, *_ in reference(Settings)}
    assert set(lineage.NAMING) <= known
    plugin = {key for key, _, _, help_ in reference(Settings) if "plugin" in help_ and "ption" not in help_}
    told = {key.replace('"NAME OR GLOB"', "*") for key in plugin} - {"plugins.disable"}
    assert told <= set(lineage.NAMING)
    assert {kind.name for kind in lineage.NAMING.values()} <= {kind.name for kind in KINDS}
