"""What a configured name means, and the sentence for each way in which it can mean nothing."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

import pytest

from umbel.errors import (
    PluginApiMismatch,
    PluginBroken,
    PluginConflict,
    PluginDependencyMissing,
    PluginError,
    PluginNotFound,
    SettingsError,
)
from umbel.plugins import loader
from umbel.plugins.manager import PluginManager

from .conftest import DRIVERS, Install

OPTIONS = (
    DRIVERS
    + """
    from attrs import frozen

    @frozen
    class Options:
        size: int = 1
        label: str = ""

    FakeTransport.Options = Options
"""
)


def heron(install: Install, source: str = DRIVERS, **more: Any) -> None:
    install(
        "umbel-heron", {"umbel.transports": {"heron": "umbel_heron:FakeTransport"}}, {"umbel_heron": source}, **more
    )


def failure(reference: str, error: type[PluginError]) -> str:
    with pytest.raises(error) as caught:
        PluginManager().make_transport(reference)
    assert type(caught.value) is error
    return str(caught.value)


# --- found ---


@pytest.mark.parametrize("url", ["heron", "heron://", "heron://user:pw@host:1/0", "heron:///a/path"])
def test_a_scheme_or_a_plain_word_names_the_entry_point(install: Install, url: str) -> None:
    heron(install)
    transport = PluginManager().make_transport(url)
    assert type(transport).__name__ == "FakeTransport"
    assert transport.url == url


def test_a_scheme_is_taken_whole(install: Install) -> None:
    install("x", {"umbel.transports": {"celery+heron": "m_heron:FakeTransport"}}, {"m_heron": DRIVERS})
    assert PluginManager().make_transport("celery+heron://host").url == "celery+heron://host"
    assert "no transport 'heron' is installed" in failure("heron://host", PluginNotFound)


def test_names_find_serializers_and_the_clock_reaches_a_transport(install: Install) -> None:
    class Noon:
        def time(self) -> float:
            return 12.0

    heron(install)
    install("y", {"umbel.serializers": {"fake": "umbel_heron:FakeSerializer"}})
    plugins, clock = PluginManager(), Noon()
    assert plugins.make_serializer("fake").dumps(1) == b"1"
    assert plugins.make_transport("heron://", clock=clock).clock is clock


def test_only_the_named_plugin_is_imported(install: Install) -> None:
    heron(install)
    install("umbel-stork", {"umbel.transports": {"stork": "umbel_stork:FakeTransport"}}, {"umbel_stork": DRIVERS})
    PluginManager().make_transport("heron://")
    assert "umbel_heron" in sys.modules
    assert "umbel_stork" not in sys.modules


def test_a_dotted_path_needs_no_scan(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("nothing", {}, {"my.brokers": DRIVERS})
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda: pytest.fail("scanned"))
    assert type(PluginManager().make_transport("my.brokers:FakeTransport")).__name__ == "FakeTransport"
    assert PluginManager().make_serializer("my.brokers:FakeSerializer").name == "fake"


def test_one_scan_serves_all(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    heron(install)
    scan, scans = importlib.metadata.entry_points, []
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda: (scans.append(1), scan())[1])
    for _ in range(3):
        PluginManager().make_transport("heron://")
    assert len(scans) == 1


def test_a_falsy_driver_is_made_all_the_same(install: Install) -> None:
    heron(install, DRIVERS + "\n    FakeTransport.__len__ = lambda self: 0\n")
    transport = PluginManager().make_transport("heron://")
    assert not transport
    assert type(transport).__name__ == "FakeTransport"


# --- options ---


def test_the_query_becomes_options_and_explicit_options_win(install: Install) -> None:
    heron(install, OPTIONS)
    transport = PluginManager().make_transport("heron://host/0?size=5&label=a%20b", {"size": 7})
    assert (transport.options.size, transport.options.label) == (7, "a b")
    assert transport.url == "heron://host/0"


def test_without_options_the_driver_has_its_defaults(install: Install) -> None:
    heron(install, OPTIONS)
    assert PluginManager().make_transport("heron://").options.size == 1


def test_a_wrong_option_names_the_table(install: Install) -> None:
    heron(install, OPTIONS)
    with pytest.raises(SettingsError, match=r"\[broker.options\].*sise"):
        PluginManager().make_transport("heron://?sise=5")


def test_an_option_given_twice_is_refused(install: Install) -> None:
    heron(install, OPTIONS)
    with pytest.raises(SettingsError, match=r"\[broker\] url gives the option 'size' twice"):
        PluginManager().make_transport("heron://?size=5&size=6")


@pytest.mark.parametrize("url", ["", "user:secret@host", "localhost:6379", "//host", "heron//:host", "a b", "1://x"])
def test_what_is_no_url_names_the_setting_and_keeps_its_secrets(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        PluginManager().make_transport(url)
    assert str(caught.value).startswith("[broker] url must be a URL")
    assert "secret" not in str(caught.value)


def test_a_malformed_host_names_the_setting() -> None:
    with pytest.raises(SettingsError, match=r"\[results\] url is not a URL"):
        PluginManager().make_result_store("heron://[::1")


# --- not installed ---


def test_a_misspelt_name_gets_the_nearest_and_the_installed(install: Install) -> None:
    heron(install)
    sentence = failure("herron://user:secret@host", PluginNotFound)
    assert sentence.startswith("no transport 'herron' is installed ([broker] url); did you mean 'heron'?; installed: ")
    assert "heron" in sentence.partition("installed: ")[2]
    assert "secret" not in sentence


def test_one_of_ours_gets_its_install_line(install: Install) -> None:
    install("umbel", version="99.0", extras=["heron", "all"])
    assert 'pip install "umbel[heron]"' in failure("heron://", PluginNotFound)
    assert "did you mean 'heron'? pip install \"umbel[heron]\"" in failure("herron://", PluginNotFound)
    assert "umbel[all]" not in failure("all://", PluginNotFound)


def test_without_the_bundle_a_table_tells_what_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", absent)
    assert {"redis", "amqp", "celery"} <= loader.first_party()


def test_a_name_of_another_kind_is_told_so(install: Install) -> None:
    install("umbel", version="99.0", extras=["heron"])
    heron(install)
    with pytest.raises(PluginNotFound) as caught:
        PluginManager().make_serializer("heron")
    assert "no serializer 'heron' is installed ([codec] serializer or accept); 'heron' is a transport" in str(
        caught.value
    )
    assert "pip" not in str(caught.value)


def test_a_path_without_a_colon_is_shown_how_to_be_one() -> None:
    with pytest.raises(PluginNotFound, match=r'is written "package.module:Class"'):
        PluginManager().make_pool("shop.pools.Mine")


def test_a_dotted_path_to_nowhere() -> None:
    assert failure("no_such_package.mod:Class", PluginNotFound) == (
        "transport 'no_such_package.mod:Class' cannot be found: there is no module 'no_such_package' ([broker] url)"
    )


# --- installed, but its library is not ---


def test_a_missing_library_is_named_with_the_distribution(install: Install) -> None:
    heron(install, "import no_such_library.client\n")
    assert failure("heron://", PluginDependencyMissing) == (
        "transport 'heron' (umbel-heron 1.0) needs the module 'no_such_library', which is not installed:"
        " pip install umbel-heron ([broker] url)"
    )


def test_a_library_that_is_missed_only_when_constructed(install: Install) -> None:
    heron(
        install, DRIVERS + "\n    def init(self, *a, **k): import no_such_library\n    FakeTransport.__init__ = init\n"
    )
    assert "needs the module 'no_such_library'" in failure("heron://", PluginDependencyMissing)


def test_a_missing_library_behind_a_dotted_path(install: Install) -> None:
    install("nothing", {}, {"my_broker": "import no_such_library\n"})
    assert "needs the module 'no_such_library'" in failure("my_broker:Class", PluginDependencyMissing)


# --- broken ---


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def", "SyntaxError"),
        ("", "AttributeError"),
        ("import umbel_heron.part", "No module named 'umbel_heron.part'"),
        ("import umbel.no_such_part", "No module named 'umbel.no_such_part'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("assert False, 'never'", "AssertionError: never"),
        ("from json import no_such_name", "ImportError"),
    ],
)
def test_what_raises_is_broken(install: Install, source: str, what: str) -> None:
    heron(install, source)
    sentence = failure("heron://", PluginBroken)
    assert sentence.startswith("transport 'heron' (umbel-heron 1.0) is broken: umbel_heron:FakeTransport raised ")
    assert what in sentence
    assert sentence.endswith(" ([broker] url)")


def test_an_entry_point_without_its_module_is_broken(install: Install) -> None:
    install("umbel-heron", {"umbel.transports": {"heron": "umbel_heron:FakeTransport"}})
    assert "No module named 'umbel_heron'" in failure("heron://", PluginBroken)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("class FakeTransport: ...", "umbel_heron.FakeTransport is not a subclass of umbel.ports.transport.Transport"),
        (DRIVERS + "\n    FakeTransport = FakeTransport('')\n", "umbel_heron:FakeTransport is not a class"),
        (DRIVERS + "\n    class FakeTransport(Transport): ...\n", "abstract"),
        (DRIVERS + "\n    FakeTransport.api_version = '1.0'\n", "its api_version is '1.0', not a pair of numbers"),
    ],
)
def test_what_is_not_of_the_port_is_broken(install: Install, source: str, what: str) -> None:
    heron(install, source)
    assert what in failure("heron://", PluginBroken)


def test_a_drivers_own_complaint_comes_through(install: Install) -> None:
    source = """
    from umbel.errors import SettingsError
    def init(self, *a, **k): raise SettingsError(["[broker] url wants a path"])
    FakeTransport.__init__ = init
    """
    heron(install, DRIVERS + source)
    with pytest.raises(SettingsError, match="wants a path"):
        PluginManager().make_transport("heron://")


# --- conflict, versions ---


def test_two_distributions_with_one_name_are_both_named_and_not_imported(install: Install) -> None:
    heron(install)
    install("acme-heron", {"umbel.transports": {"heron": "acme:T"}}, {"acme": DRIVERS}, version="2.5")
    sentence = failure("heron://", PluginConflict)
    assert "transport 'heron' is offered by " in sentence
    assert "umbel-heron 1.0" in sentence
    assert "acme-heron 2.5" in sentence
    assert "([broker] url)" in sentence
    assert not {"acme", "umbel_heron"} & set(sys.modules)


def test_one_name_in_two_groups_is_no_conflict(install: Install) -> None:
    heron(install)
    install("acme", {"umbel.serializers": {"heron": "umbel_heron:FakeSerializer"}})
    assert PluginManager().make_transport("heron://")
    assert PluginManager().make_serializer("heron")


@pytest.mark.parametrize(
    ("version", "remedy"), [((2, 0), "umbel-core"), ((1, 9), "umbel-core"), ((0, 9), "the plugin")]
)
def test_another_api_is_refused_with_both_versions(install: Install, version: tuple[int, int], remedy: str) -> None:
    heron(install, DRIVERS + f"\n    FakeTransport.api_version = {version}\n")
    assert failure("heron://", PluginApiMismatch) == (
        f"transport 'heron' (umbel-heron 1.0) is for plugin API {version[0]}.{version[1]},"
        f" and this umbel-core has 1.0: upgrade {remedy} ([broker] url)"
    )


@pytest.mark.parametrize("kind", ["serializer", "compressor", "pool", "result_store", "scheduler"])
def test_every_kind_says_what_is_not_installed(kind: str) -> None:
    with pytest.raises(PluginNotFound, match=rf"no {kind.replace('_', ' ')} 'no-such-plugin' is installed \(\["):
        getattr(PluginManager(), f"make_{kind}")("no-such-plugin")
