"""What is installed, and what is wrong with it."""

from __future__ import annotations

import sys

import pytest

from umbel.errors import PluginNotFound
from umbel.plugins.inventory import PluginRecord, check, inventory

from .conftest import DRIVERS, Install

CAPABLE = (
    DRIVERS
    + """
    from umbel.capabilities import TransportCapabilities
    FakeTransport.capabilities = TransportCapabilities(durable=True)
"""
)


def records(*, load: bool) -> dict[tuple[str, str | None], PluginRecord]:
    """By kind:name and distribution: whatever is installed beside what a test has written."""
    return {(f"{r.kind}:{r.name}", r.distribution): r for r in inventory(load=load)}


def put(
    install: Install, name: str, source: str, target: str = "FakeTransport", group: str = "umbel.transports"
) -> None:
    module = f"umbel_{name}"
    install(f"umbel-{name}", {group: {name: f"{module}:{target}"}}, {f"{module}.__init__": source})


def test_without_load_nothing_is_imported(install: Install) -> None:
    put(install, "heron", CAPABLE)
    assert records(load=False)["transport:heron", "umbel-heron"] == PluginRecord(
        kind="transport",
        name="heron",
        distribution="umbel-heron",
        version="1.0",
        target="umbel_heron:FakeTransport",
        state="not loaded",
    )
    assert "umbel_heron" not in sys.modules


def test_load_tells_the_states_apart(install: Install) -> None:
    put(install, "heron", CAPABLE)
    put(install, "broken", "1/0")
    put(install, "exits", "raise SystemExit(1)")
    put(install, "lacking", "import no_such_library")
    put(install, "wrong", "class FakeTransport: ...")
    put(install, "late", DRIVERS + "\n    FakeTransport.api_version = (9, 0)\n")
    put(install, "unreadable", "", target="not a target!")
    put(install, "twice", DRIVERS)
    install("acme", {"umbel.transports": {"twice": "acme:T"}, "umbel.commands": {"go": "acme:go"}}, {"acme": "go = 1"})
    put(install, "ear", "", target="__name__", group="umbel.hooks")

    found = records(load=True)

    heron = found["transport:heron", "umbel-heron"]
    assert (heron.state, heron.reason, heron.api_version) == ("ok", "", (1, 0))
    assert heron.capabilities is not None
    assert heron.capabilities["durable"] is True
    expected = {
        "broken": ("broken", "ZeroDivisionError"),
        "exits": ("broken", "SystemExit"),
        "lacking": ("missing library", "needs the module 'no_such_library'"),
        "wrong": ("broken", "is not a subclass of umbel.ports.transport.Transport"),
        "late": ("incompatible", "API 9.0"),
        "unreadable": ("broken", "raised"),
        "twice": ("conflict", "umbel-twice 1.0"),
    }
    for name, (state, reason) in expected.items():
        record = found[f"transport:{name}", f"umbel-{name}"]
        assert (record.state, reason in record.reason) == (state, True), record
    assert found["transport:twice", "acme"].state == "conflict"
    assert found["transport:late", "umbel-late"].api_version == (9, 0)
    assert found["hook:ear", "umbel-ear"].state == "ok"
    assert found["command:go", "acme"].state == "ok"


def test_a_conflict_is_known_without_loading(install: Install) -> None:
    put(install, "twice", DRIVERS)
    install("acme", {"umbel.transports": {"twice": "acme:T"}})
    assert records(load=False)["transport:twice", "acme"].state == "conflict"


def test_forty_plugins_are_listed_in_order_and_imported_once_each(install: Install) -> None:
    for number in range(40):
        put(install, f"heron{number:02}", "1/0" if number % 4 == 0 else DRIVERS)
    ours = [r for r in inventory(load=True) if r.name.startswith("heron")]
    assert [r.name for r in ours] == [f"heron{number:02}" for number in range(40)]
    assert [r.state for r in ours] == ["broken" if number % 4 == 0 else "ok" for number in range(40)]


def test_capabilities_of_an_instance_are_not_known(install: Install) -> None:
    put(install, "heron", DRIVERS + "\n    FakeTransport.capabilities = property(lambda self: 1 / 0)\n")
    assert records(load=True)["transport:heron", "umbel-heron"].capabilities is None
    assert not [f for f in check("heron") if f.check == "capabilities"]


# --- check ---


def spoilt(install: Install, source: str, **more: str) -> dict[str, tuple[str, str]]:
    put(install, "heron", source, **more)
    return {f.check: (f.level, f.message) for f in check("heron") if f.check != "typed"}


def test_a_well_made_plugin_has_no_findings(install: Install, tmp_path: object) -> None:
    put(install, "heron", CAPABLE)
    (sys_path_entry,) = [p for p in sys.path if p.startswith(str(tmp_path))]
    assert [(f.check, f.level) for f in check("heron")] == [("typed", "warning")]
    open(f"{sys_path_entry}/umbel_heron/py.typed", "w").close()
    assert check("heron") == []


@pytest.mark.parametrize(
    ("source", "finding", "level", "sentence"),
    [
        ("import no_such_library", "import", "error", "needs the module 'no_such_library'"),
        ("class FakeTransport: ...", "port", "error", "is not a subclass"),
        (CAPABLE + "\n    FakeTransport = FakeTransport('')\n", "port", "error", "is an instance"),
        (CAPABLE + "\n    FakeTransport.api_version = (3, 1)\n", "api_version", "error", "plugin API 3.1"),
        (CAPABLE + "\n    FakeTransport.api_version = None\n", "port", "error", "its api_version is None"),
        (CAPABLE + "\n    del FakeTransport.api_version\n", "api_version", "warning", "inherits api_version"),
        (
            CAPABLE + "\n    class FakeTransport(FakeTransport, Pool): ...\n",
            "methods",
            "error",
            "lacks cancel, completions, free, recall, resize, start, stop, submit of umbel.ports.transport:Transport",
        ),
        (CAPABLE + "\n    FakeTransport.capabilities = {'durable'}\n", "capabilities", "error", "are not a"),
        (DRIVERS, "capabilities", "warning", "declares no capabilities"),
        (CAPABLE + "\n    FakeTransport.Options = dict\n", "options", "error", "not an attrs class"),
        (
            CAPABLE + "\n    import attrs\n    FakeTransport.Options = attrs.make_class('O', {'a': attrs.field()})\n",
            "options",
            "error",
            "without a default: a",
        ),
    ],
)
def test_each_fault_is_found(install: Install, source: str, finding: str, level: str, sentence: str) -> None:
    found = spoilt(install, source)
    assert list(found) == [finding]
    assert found[finding][0] == level
    assert sentence in found[finding][1]


def test_a_codec_must_declare_its_names(install: Install) -> None:
    source = DRIVERS + "\n    del FakeSerializer.content_type, FakeSerializer.name\n"
    found = spoilt(install, source, target="FakeSerializer", group="umbel.serializers")
    assert found == {"constants": ("error", "lacks the class attributes name, content_type")}


def test_one_word_serves_everywhere(install: Install) -> None:
    install(
        "acme-birds", {"umbel.transports": {"heron": "umbel_heron:FakeTransport"}}, {"umbel_heron.__init__": CAPABLE}
    )
    (finding,) = [f for f in check("heron") if f.check == "name"]
    assert finding.level == "warning"
    assert finding.message == "one would look for 'heron' in umbel-heron, and it is in acme-birds"


def test_every_kind_of_that_name_is_checked(install: Install) -> None:
    put(install, "heron", "1/0")
    install("acme", {"umbel.serializers": {"heron": "umbel_heron:S"}})
    assert {(f.kind, f.distribution) for f in check("heron") if f.check == "import"} == {
        ("transport", "umbel-heron"),
        ("serializer", "acme"),
    }


def test_an_unknown_name_gets_the_nearest(install: Install) -> None:
    put(install, "heron", DRIVERS)
    with pytest.raises(PluginNotFound, match=r"no plugin 'herron' is installed: did you mean 'heron'\?"):
        check("herron")
