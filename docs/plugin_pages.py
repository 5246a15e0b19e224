"""The pages of the first-party plugins: one for each, and one of what they have together."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Final, get_args

import attrs
import click
from kit import Fate, Suite, Trial, sentence, suites, trials
from writing import ROOT, cell, classes, code, fence, fields_of, page, table

from umbel.plugins.kinds import COMMAND, HOOK, KINDS, Kind
from umbel.settings.structure import reference

URLS: Final = {"sqlite": "sqlite:///docs.sqlite3"}
"""What to make a driver with whose capabilities depend on its settings; its constructor does no I/O."""


@attrs.frozen
class Offer:
    """What a plugin offers of one kind, under one name or several."""

    kind: Kind[Any]
    names: Sequence[str]
    target: str

    @property
    def object(self) -> Any:
        return resolve_name(self.target)

    @property
    def capabilities(self) -> Mapping[str, Any]:
        """What is declared; empty for kinds that declare nothing."""
        if self.kind.capabilities is None:
            return {}
        declared = inspect.getattr_static(self.object, "capabilities", None)
        if not attrs.has(type(declared)):
            name = self.names[0]
            declared = self.object(URLS.get(name, f"{name}://localhost")).capabilities
        return attrs.asdict(declared)

    @property
    def options(self) -> str:
        """The settings table that its options stand in."""
        return (self.kind.options or "").replace("NAME", self.names[0])


def plugin_folders() -> list[Path]:
    """The first-party plugins, by name."""
    found = [path.parent for shelf in ("plugins", "contrib") for path in ROOT.glob(f"{shelf}/*/pyproject.toml")]
    return sorted(found, key=lambda folder: folder.name)


@cache
def project(folder: Path) -> Mapping[str, Any]:
    table: Mapping[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return table


def offers(folder: Path) -> list[Offer]:
    """In the order of the kinds."""
    groups = project(folder).get("entry-points", {})
    found: dict[tuple[str, str], list[str]] = {}
    for kind in KINDS:
        for name, target in groups.get(kind.group, {}).items():
            found.setdefault((kind.name, target), []).append(name)
    kinds = {kind.name: kind for kind in KINDS}
    return [Offer(kinds[kind], names, target) for (kind, target), names in found.items()]


# --- all together ---------------------------------------------------------------------------------


def overview() -> str:
    """The first-party plugins in one table, and what their drivers declare."""
    rows = []
    declared: dict[str, dict[str, Mapping[str, Any]]] = {}
    for folder in plugin_folders():
        kinds = "; ".join(f"{o.kind.title} {', '.join(map(code, o.names))}" for o in offers(folder))
        link = f"[{folder.name}](plugins/{folder.name}.md)"
        rows.append((link, code(f"umbel-{folder.name}"), kinds, project(folder)["description"]))
        for offer in offers(folder):
            if offer.capabilities:
                declared.setdefault(offer.kind.title, {})[offer.names[0]] = offer.capabilities
    matrix = []
    for title, drivers in declared.items():
        columns = sorted(drivers)
        cells = [(code(word), *(_shown(drivers[name][word]) for name in columns)) for word in drivers[columns[0]]]
        matrix += [f"### Of {title}s", table(("capability", *map(code, columns)), cells)]
    head = table(("plugin", "distribution", "offers", "what it is"), rows)
    return page("## All of them", head, "## Declared capabilities", *matrix)


def all_options() -> str:
    """The options of every plugin, by the table that they stand in: the end of the settings page."""
    tables: dict[str, list[tuple[str, ...]]] = {}
    for folder in plugin_folders():
        for offer in offers(folder):
            for name, type_, default, meaning in option_rows(offer):
                link = f"[{offer.names[0]}](plugins/{folder.name}.md)"
                tables.setdefault(offer.options, []).append((link, name, type_, default, meaning))
    parts = [
        part
        for where, rows in sorted(tables.items())
        for part in (f"### Of `{where}`", table(("plugin", "option", "type", "default", "meaning"), rows))
    ]
    return page(
        "## Options of plugins",
        "Which options there are is the plugin's to say. What is named by a URL takes them in the URL's query as well.",
        *parts,
    )


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not limited"
    return "any" if value == float("inf") else f"{value:,}" if isinstance(value, int) else f"{value:g}"


# --- one plugin -----------------------------------------------------------------------------------


def one(folder: Path) -> str:
    """What a plugin offers, what its README says, what its classes declare, and what the kit makes of it."""
    mine = offers(folder)
    rows = [(o.kind.title, ", ".join(map(code, o.names)), code(o.target)) for o in mine]
    parts = [table(("kind", "name", "object"), rows), _readme(folder)]
    if options := [part for offer in mine for part in _options(offer)]:
        parts += ["## Options, from the code", *options]
    for offer in mine:
        if offer.kind is COMMAND:
            parts += ["## Command", fence(_help(offer.names[0], offer.object))]
        elif offer.kind is HOOK:
            parts += ["## Hooks that it listens to", ", ".join(map(code, _hooks(offer.object)))]
    parts += [part for offer in mine for part in _declared(offer)]
    tested = suites(folder / "tests")
    if parts_of_kit := [part for offer in mine for part in _proved(offer, tested)]:
        parts += ["## What the conformance kit tests", *parts_of_kit]
    return page(*parts)


def _readme(folder: Path) -> str:
    """The README below its title. Links into the documentation are kept, others are plain text."""
    _, _, below = (folder / "README.md").read_text().strip().partition("\n")
    lines, fenced = [], False
    for line in below.splitlines():
        fenced ^= line.startswith("```")
        if not fenced:
            line = re.sub(r"\]\(\.\./\.\./docs/", "](../../", line)
            line = re.sub(r"\[([^\]]+)\]\((?!https?:|#|\.\./\.\./[a-z])[^)]+\)", r"\1", line)
        lines.append("```text" if line == "```" and fenced else line)
    return "\n".join(lines)


def option_rows(offer: Offer) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each option of a plugin's class."""
    options = getattr(offer.object, "Options", None)
    if not offer.kind.options or options is None:
        return
    docs: dict[str, str] = {}
    for cls in reversed(options.__mro__):
        if attrs.has(cls):
            (node,) = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body
            assert isinstance(node, ast.ClassDef)
            docs |= {field: told for field, _, _, told in fields_of(node)}
    for key, type_, default, help_ in reference(options):
        yield code(key), type_, code(default), help_ or docs.get(key, "")


def _options(offer: Offer) -> Iterator[str]:
    if rows := list(option_rows(offer)):
        yield f"### Of the {offer.kind.title}: `{offer.options}`"
        yield table(("option", "type", "default", "meaning"), rows)


def _declared(offer: Offer) -> Iterator[str]:
    if offer.capabilities:
        _, _, name = (offer.kind.capabilities or "").partition(":")
        (node,) = (cls for cls in classes("capabilities") if cls.name == name)
        meanings = {field: told for field, _, _, told in fields_of(node)}
        yield f"## What the {offer.kind.title} declares"
        rows = [(code(word), _shown(value), meanings[word]) for word, value in offer.capabilities.items()]
        yield table(("capability", "here", "meaning"), rows)


def _help(name: str, command: click.Command) -> str:
    words = name.replace(".", " ")  # in the group of that name
    context = click.Context(
        command, info_name=f"umbel {words}", terminal_width=96, max_content_width=96,
        help_option_names=["-h", "--help"],
    )  # fmt: skip
    return command.get_help(context)


def _hooks(listener: Any) -> list[str]:
    return [name for name in dir(listener) if hasattr(inspect.getattr_static(listener, name), "umbel_impl")]


# --- the kit --------------------------------------------------------------------------------------


def _proved(offer: Offer, tested: Iterable[Suite]) -> Iterator[str]:
    contract = f"{offer.kind.name.title().replace('_', '')}Contract"
    mine = [suite for suite in tested if suite.contract == contract]
    if not mine:
        return
    # Of several suites, one on a server and one on a cluster say, each may have what another has not.
    together = Suite(mine[0].name, contract, frozenset().union(*(suite.own for suite in mine)))
    fates: dict[str, list[Trial]] = {fate: [] for fate in get_args(Fate)}
    for trial in trials(contract, offer.object, offer.capabilities, together):
        fates[trial.fate].append(trial)
    yield f"### The {offer.kind.title}"
    times = "" if len(mine) == 1 else f", {len(mine)} times"
    yield (
        f"{', '.join(code(suite.name) for suite in mine)} in the plugin's tests: the laws of the port {code(contract)}"
        f"{times}. {len(fates['kept'])} are kept:"
    )
    yield _listed(fates["kept"])
    for fate, words in (
        ("refused", "Not declared, and the clean refusal is tested:"),
        ("not declared", "Not declared, so there is nothing to keep:"),
        ("not tried", "Not tried, for the plugin's tests do not give the kit the fixture:"),
    ):
        if fates[fate]:
            yield words
            yield _listed(fates[fate])


def _listed(laws: Iterable[Trial]) -> str:
    return "\n".join(f"- {cell(sentence(t.law))}" + (f" ({code(t.about)})" if t.about else "") for t in laws)
