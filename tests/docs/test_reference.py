"""The generated pages hold all that the code has: nothing is forgotten, nothing is told in other words."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import attrs
import click
import pytest

from umbel import capabilities, errors, hookspecs, model
from umbel.capabilities import ResultStoreCapabilities
from umbel.cli.group import COMMANDS, root
from umbel.model import TaskOptions
from umbel.ports import clock, compressor, pool, result_store, scheduler, serializer, timetable, transport
from umbel.settings.schema import Settings
from umbel.settings.structure import json_schema, reference
from umbel.task import CallOptions
from umbel.testing import contracts

ROOT = Path(__file__).resolve().parents[2]
PORTS = (transport, result_store, serializer, compressor, pool, scheduler, timetable, clock)


def load_generator() -> Any:
    spec = importlib.util.spec_from_file_location("umbel_docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = load_generator()
PLUGIN_PAGES: Any = GENERATE.plugin_pages
PLUGINS = sorted(path.parent for shelf in ("plugins", "contrib") for path in ROOT.glob(f"{shelf}/*/pyproject.toml"))

every_plugin = pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    GENERATE.write(folder := tmp_path_factory.mktemp("generated"))
    return folder


@pytest.fixture(scope="module")
def pages(generated: Path) -> dict[str, str]:
    """The pages, by name: ``errors``, ``plugins/sqlite``."""
    return {str(path.relative_to(generated).with_suffix("")): path.read_text() for path in generated.rglob("*.md")}


def own_classes(module: ModuleType) -> list[type]:
    found = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    return [cls for cls in found if not cls.__name__.startswith("_")]


def flat(text: str) -> str:
    return " ".join(text.replace("\\|", "|").split())


def test_the_same_code_gives_the_same_pages_and_only_what_has_changed_is_written(
    generated: Path, pages: dict[str, str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in generated.rglob("*.md")}
    (changed := generated / "errors.md").write_text("old")
    GENERATE.write(generated)
    assert {p for p, time in before.items() if p.stat().st_mtime_ns != time} == {changed}
    assert changed.read_text() == pages["errors"]
    assert "SettingsError" in pages["errors"]


def test_every_setting_is_there(pages: dict[str, str]) -> None:
    text = pages["settings"]
    rows = reference(Settings)
    assert len(rows) > 50
    for key, _, default, help_ in rows:
        table, _, name = key.rpartition(".")
        section = text.partition(f"## `[{table}]`" if table else "## Above all tables")[2].partition("\n## ")[0]
        row = next((line for line in section.splitlines() if line.startswith(f"| `{name}` |")), "")
        assert help_ in row.replace("\\|", "|"), key
        assert default in row, key
    for section in json_schema(Settings)["properties"]:
        assert section in text


def test_every_hook_is_there_with_its_signature(pages: dict[str, str]) -> None:
    hooks = {n: f for n, f in vars(hookspecs).items() if n.startswith("umbel_")}
    assert len(hooks) > 15
    for name, function in hooks.items():
        parameters = ", ".join(f"{p.name}: {p.annotation}" for p in inspect.signature(function).parameters.values())
        returns = inspect.signature(function).return_annotation
        assert f"def {name}({parameters}) -> {returns}\n" in pages["hooks"]
        assert flat(inspect.getdoc(function) or "") in flat(pages["hooks"])


def test_every_task_option_is_there(pages: dict[str, str]) -> None:
    options, _, call = pages["tasks"].partition("## Options of one call")
    for field in attrs.fields(TaskOptions):
        assert f"| `{field.name}` | " in options
        assert f"| `{field.default!r}` |" in next(x for x in options.splitlines() if x.startswith(f"| `{field.name}` "))
    for name in CallOptions.__annotations__:
        assert f"| `{name}` | " in call


def all_commands(command: click.Command, words: tuple[str, ...]) -> dict[tuple[str, ...], click.Command]:
    found = {words: command}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            found |= all_commands(below, (*words, name))
    return found


def test_every_command_and_option_is_there(pages: dict[str, str]) -> None:
    known = {("umbel",): root}
    for name in COMMANDS:  # those of plugins are on the plugins' pages
        command = root.get_command(click.Context(root), name)
        assert command is not None
        known |= all_commands(command, ("umbel", name))
    assert len(known) > 15
    for words, command in known.items():
        section = pages["cli"].partition(f"# {' '.join(words)}\n")[2].partition("\n##")[0]
        assert f"Usage: {' '.join(words)}" in section
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert all(option in section for option in parameter.opts), (words, parameter.opts)


@pytest.mark.parametrize("module", PORTS, ids=lambda module: module.__name__)
def test_every_method_of_a_port_is_there(module: ModuleType, pages: dict[str, str]) -> None:
    text = flat(pages["ports"])
    for cls in own_classes(module):
        assert flat(inspect.getdoc(cls) or "") in text, cls
        for name, member in vars(cls).items():
            if name.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
                continue
            assert f"# {cls.__name__}.{name} " in text
            function = cast("Any", member.fget if isinstance(member, property) else member)
            assert flat(inspect.getdoc(function) or "") in text
            if inspect.isfunction(member):
                for parameter in list(inspect.signature(member).parameters.values())[1:]:
                    assert f"{parameter.name}: {parameter.annotation}".replace('"', "'") in text


@pytest.mark.parametrize(
    ("page", "module"),
    [("errors", errors), ("model", model), ("capabilities", capabilities)],
    ids=lambda x: str(x)[:20],
)
def test_every_class_is_there(page: str, module: ModuleType, pages: dict[str, str]) -> None:
    for cls in own_classes(module):
        if cls is not TaskOptions:
            assert cls.__name__ in pages[page]
            for field in attrs.fields(cls) if attrs.has(cls) else ():
                assert f"| `{field.name}` | " in pages[page]


def test_the_page_on_interoperation_has_the_tables_of_the_tests() -> None:
    script = ROOT / "tests/interop/interop_matrix.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=60)
    page = (ROOT / "docs/reference/interop.md").read_text()
    for part in done.stdout.strip().split("\n\n"):
        assert part in page, "print it anew: python tests/interop/interop_matrix.py"


def anchors(path: Path, pages: dict[str, str]) -> set[str]:
    """What a link can point at in a page, in what it includes too."""
    text = path.read_text()
    text += "".join(pages[name] for name in re.findall(r"^```\{include\} .*_generated/(.+)\.md$", text, re.MULTILINE))
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}  # as MyST makes them
    return slugs | {re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") for title in titles}  # and docutils


def test_every_link_to_a_section_leads_to_one(pages: dict[str, str]) -> None:
    places = [path for path in ROOT.glob("docs/**/*.md") if not {"_build", "_generated"} & set(path.parts)]
    links = [(path, *link) for path in places for link in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", path.read_text())]
    assert len(links) > 5
    lost = [
        f"{path.relative_to(ROOT)}: {target}#{anchor}"
        for path, target, anchor in links
        if anchor not in anchors((path.parent / target).resolve() if target else path, pages)
    ]
    assert not lost


# --- plugins --------------------------------------------------------------------------------------


def test_there_is_a_page_for_every_plugin_and_no_other(pages: dict[str, str]) -> None:
    names = {plugin.name for plugin in PLUGINS}
    assert {path.stem for path in (ROOT / "docs/reference/plugins").iterdir()} == names
    assert {page.removeprefix("plugins/") for page in pages if page.startswith("plugins/")} == names
    for name in names:
        page = (ROOT / f"docs/reference/plugins/{name}.md").read_text()
        assert page == f"# umbel-{name}\n\n```{{include}} ../_generated/plugins/{name}.md\n```\n"
        assert f"| [{name}](plugins/{name}.md) | `umbel-{name}` | " in pages["plugins"]


def section(page: str, title: str) -> str:
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@every_plugin
def test_the_page_of_a_plugin_has_its_promises(plugin: Path, pages: dict[str, str]) -> None:
    readme, page = (plugin / "README.md").read_text(), pages[f"plugins/{plugin.name}"]
    for title in ("Settings", "Guarantees"):
        rows = [line for line in section(readme, title).splitlines() if line.startswith("|")]
        assert rows
        told = section(page, title).splitlines()
        assert [row for row in rows if "](" not in row and row not in told] == []


@every_plugin
def test_the_page_of_a_plugin_has_what_its_code_declares(plugin: Path, pages: dict[str, str]) -> None:
    page = pages[f"plugins/{plugin.name}"]
    for offer in PLUGIN_PAGES.offers(plugin):
        assert f"| {offer.kind.title} | {', '.join(f'`{name}`' for name in offer.names)} | `{offer.target}` |" in page
        declared = section(page, f"What the {offer.kind.title} declares")
        assert all(f"\n| `{capability}` | " in declared for capability in offer.capabilities)
        assert bool(declared) == bool(offer.kind.capabilities)
        if isinstance(offer.object, click.Command):
            assert f"Usage: umbel {offer.names[0].replace('.', ' ')} " in section(page, "Command")
            assert all(
                option in section(page, "Command") for p in offer.object.params for option in p.opts if option[0] == "-"
            )


@every_plugin
def test_the_options_of_a_plugin_are_on_its_page_and_among_the_settings(plugin: Path, pages: dict[str, str]) -> None:
    page, (_, _, settings) = pages[f"plugins/{plugin.name}"], pages["settings"].partition("## Options of plugins")
    for offer in PLUGIN_PAGES.offers(plugin):
        options = getattr(offer.object, "Options", None)
        own = page.partition(f"### Of the {offer.kind.title}: `{offer.options}`")[2].partition("\n#")[0]
        everybodys = settings.partition(f"### Of `{offer.options}`")[2].partition("\n#")[0]
        for option in attrs.fields(options) if options and offer.kind.options else ():
            (row,) = [line for line in own.splitlines() if line.startswith(f"| `{option.name}` | ")]
            assert not row.endswith("|  |"), f"{offer.target}: the option {option.name} has no docstring"
            assert f"| [{offer.names[0]}](plugins/{plugin.name}.md) {row}" in everybodys.splitlines()


@every_plugin
def test_the_page_of_a_plugin_has_every_law_of_the_kit_once(plugin: Path, pages: dict[str, str]) -> None:
    tested = section(pages[f"plugins/{plugin.name}"], "What the conformance kit tests")
    for offer in PLUGIN_PAGES.offers(plugin):
        contract = getattr(contracts, f"{offer.kind.name.title().replace('_', '')}Contract", None)
        laws = [GENERATE.plugin_pages.sentence(name) for name in dir(contract) if name.startswith("test_")]
        part = tested.partition(f"### The {offer.kind.title}\n")[2].partition("\n### ")[0]
        listed = [line.partition(" (`")[0].removeprefix("- ") for line in part.splitlines() if line.startswith("- ")]
        assert len(listed) == len(set(listed))
        assert set(listed) <= set(laws)
        # What a driver declares leaves out only the laws about its being absent.
        assert len(laws) - len(listed) <= 2, set(laws) - set(listed)


SOLE = """
class TestSole(ResultStoreContract):
    @pytest.fixture
    def restart(self): ...
"""


@pytest.mark.parametrize(
    ("law", "capabilities", "fate"),
    [
        ("a_final_state_never_changes", {}, ("kept", "")),
        ("a_claim_is_held_by_one", {"claim": True}, ("kept", "")),
        ("a_claim_is_held_by_one", {}, ("not declared", "claim")),
        ("what_was_stored_outlives_the_backend", {"durable": True}, ("kept", "")),
        ("what_was_stored_outlives_the_backend", {}, ("not declared", "durable")),
        ("a_wait_outlives_a_lost_connection", {}, ("not tried", "sever")),
    ],
)
def test_what_becomes_of_a_law_is_read_from_the_kit(
    law: str, capabilities: dict[str, bool], fate: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "test_sole.py").write_text(SOLE)
    (suite,) = PLUGIN_PAGES.suites(tmp_path)
    declared = attrs.asdict(ResultStoreCapabilities(**capabilities))
    (trial,) = [t for t in PLUGIN_PAGES.trials(suite.contract, None, declared, suite) if t.law == f"test_{law}"]
    assert (trial.fate, trial.about) == fate
