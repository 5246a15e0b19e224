"""Writes the reference pages that the code itself can tell: ``python docs/generate.py [FOLDER]``.

Pure and deterministic: the same sources give the same bytes. Signatures and docstrings are read from the sources, not from
live objects, so that they stand in the pages as they stand in the code; only settings and the command line are asked for
what they say of themselves. Sphinx is not needed here.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Final

import attrs
import click

from umbel.cli.group import COMMANDS, root
from umbel.model import TaskOptions
from umbel.settings.schema import Settings, TaskSettings
from umbel.settings.sources import split_key, variable
from umbel.settings.structure import reference

sys.path.insert(0, str(Path(__file__).parent))
try:
    import plugin_pages
    from sizes import kernel_size
    from writing import class_parts, classes, code, docs_of, fence, fields_of, function_parts, page, source, table
finally:
    del sys.path[0]

HELP_WIDTH: Final = 96

# --- settings -------------------------------------------------------------------------------------


def settings() -> str:
    """Every setting, by table, with its environment variable."""
    sections: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for dotted, type_, default, help_ in reference(Settings):
        key = split_key(dotted) or ()
        named = len(key) > 2
        env = "" if named else code(variable(key))
        shown = code(default) if default not in ("not set", "required") else default
        sections.setdefault(key[:-1], []).append((code(key[-1]), type_, shown, env, help_))
    parts = []
    for section, rows in sections.items():
        cls = _section_class(section)
        title = "Above all tables" if not section else f"`[{_toml_key(section)}]`"
        parts += [
            f"## {title}",
            docs_of_class(cls),
            table(("setting", "type", "default", "environment", "meaning"), rows),
        ]
    return page(*parts, plugin_pages.all_options())


def _section_class(section: Sequence[str]) -> type:
    cls: type = Settings
    for name in section[:1]:
        hints = inspect.get_annotations(cls, eval_str=False)
        found = re.search(r"(\w+Settings)", hints[name])
        assert found is not None
        cls = resolve_name(f"umbel.settings.schema:{found[1]}")
    return cls


def _toml_key(section: Sequence[str]) -> str:
    return ".".join(f'"{part}"' if re.search(r"[^\w-]", part) else part for part in section)


def docs_of_class(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "")


# --- hooks ----------------------------------------------------------------------------------------


def hooks() -> str:
    """Every hook with its exact signature, grouped as in the source."""
    text, tree = source("hookspecs")
    titles = {i: m[1] for i, line in enumerate(text.splitlines(), 1) if (m := re.match(r"# --- (.+?) -+$", line))}
    parts: list[str] = []
    last = 0
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for number, title in titles.items():
            if last < number < node.lineno:
                parts.append(f"## {title[0].upper()}{title[1:]}")
        last = node.lineno
        first = "firstresult=True" in "".join(ast.unparse(d) for d in node.decorator_list)
        parts += function_parts(node, 3)
        if first:
            parts.append("*The first implementation that returns something other than `None` wins. May be wrapped.*")
    return page(*parts)


# --- tasks ----------------------------------------------------------------------------------------


def tasks() -> str:
    """Task options and the options of one call."""
    overridable = {field.name for field in attrs.fields(TaskSettings)}
    (options,) = (cls for cls in classes("model") if cls.name == TaskOptions.__name__)
    rows = [
        (code(name), code(type_), code(default), "yes" if name in overridable else "no", docs)
        for name, type_, default, docs in fields_of(options)
    ]
    (call,) = (cls for cls in classes("task") if cls.name == "CallOptions")
    calls = [(code(name), code(type_), docs) for name, type_, _, docs in fields_of(call)]
    return page(
        "## Options of a task",
        docs_of(options),
        table(("option", "type", "default", "in the settings", "meaning"), rows),
        "## Options of one call",
        docs_of(call),
        table(("option", "type", "meaning"), calls),
    )


# --- command line ---------------------------------------------------------------------------------


def commands() -> Iterator[tuple[tuple[str, ...], click.Command, click.Context]]:
    """Every command of ours with the words that call it, in the order of ``umbel --help``."""
    top = _context(root, "umbel", None)
    yield ("umbel",), root, top
    for name in COMMANDS:
        command = root.get_command(top, name)
        assert command is not None
        yield from _below((name,), command, top)


def _below(
    words: tuple[str, ...], command: click.Command, parent: click.Context
) -> Iterator[tuple[tuple[str, ...], click.Command, click.Context]]:
    context = _context(command, words[-1], parent)
    yield words, command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from _below((*words, name), below, context)


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    return click.Context(
        command, info_name=name, parent=parent, terminal_width=HELP_WIDTH, max_content_width=HELP_WIDTH,
        help_option_names=["-h", "--help"],
    )  # fmt: skip


def cli() -> str:
    """The help of every command."""
    parts: list[str] = []
    for words, command, context in commands():
        name = " ".join(words) if words[0] == "umbel" else f"umbel {' '.join(words)}"
        parts += [f"{'##' if len(words) == 1 else '###'} {name}", fence(command.get_help(context))]
    return page(*parts)


# --- errors, values, ports, interface ---------------------------------------------------------------


def errors() -> str:
    """The tree of exceptions."""
    text, _ = source("errors")
    titles = {i: m[1] for i, line in enumerate(text.splitlines(), 1) if (m := re.match(r"# --- (.+?) -+$", line))}
    parts: list[str] = []
    rows: list[tuple[str, ...]] = []
    last = 0

    def flush() -> None:
        if rows:
            parts.append(table(("error", "is a", "meaning"), list(rows)))
            rows.clear()

    for cls in classes("errors"):
        for number, title in titles.items():
            if last < number < cls.lineno:
                flush()
                parts.append(f"## {title[0].upper()}{title[1:]}")
        last = cls.lineno
        rows.append((code(cls.name), ", ".join(code(ast.unparse(b)) for b in cls.bases), docs_of(cls)))
    flush()
    return page(*parts)


PORTS: Final = (
    *("transport", "result_store", "serializer", "compressor", "pool", "scheduler"),
    *("timetable", "step", "clock", "interruption"),
)


def ports() -> str:
    """Every port: classes, methods, promises."""
    parts: list[str] = []
    for name in PORTS:
        _, tree = source(f"ports.{name}")
        parts += [f"## umbel.ports.{name}", docs_of(tree)]
        for cls in classes(f"ports.{name}"):
            parts += class_parts(cls, 3)
    return page(*parts)


def capabilities() -> str:
    """What a driver can declare."""
    return page(*(part for cls in classes("capabilities") for part in class_parts(cls, 2)))


def model() -> str:
    """The values that travel between the layers."""
    chosen = [cls for cls in classes("model") if cls.name != TaskOptions.__name__]
    return page(*(part for cls in chosen for part in class_parts(cls, 2)))


API: Final = (
    ("app", ("Umbel",)),
    ("task", ("Task", "AsyncTask", "Request")),
    ("result", ("AsyncResult",)),
    ("scheduling.schedules", ("Schedules",)),
    ("scheduling.entries", ("ScheduleOptions",)),
    ("canvas.signature", ("Canvas", "Signature")),
    ("canvas.compose", ("Chain", "Group", "Chord")),
    ("canvas.results", ("NodeResult", "GroupResult")),
    ("worker.worker", ("Worker",)),
    ("worker.steps", ("Step",)),
)


def api() -> str:
    """What an application's author calls."""
    parts: list[str] = []
    for module, names in API:
        for cls in classes(module):
            if cls.name in names:
                parts += class_parts(cls, 2)
    shared = next(
        n for n in source("shared")[1].body if isinstance(n, ast.FunctionDef) and n.name == "shared_task" and docs_of(n)
    )
    return page(*parts, *function_parts(shared, 2))


# --- all ------------------------------------------------------------------------------------------

PAGES: Final[Mapping[str, Callable[[], str]]] = {
    "settings": settings,
    "hooks": hooks,
    "tasks": tasks,
    "cli": cli,
    "errors": errors,
    "ports": ports,
    "capabilities": capabilities,
    "model": model,
    "api": api,
    "plugins": plugin_pages.overview,
    "sizes": kernel_size,
}


def write(folder: Path) -> None:
    """Write every page; one that has not changed keeps its time, so that Sphinx need not read it again."""
    made = {name: make() for name, make in PAGES.items()}
    made |= {f"plugins/{plugin.name}": plugin_pages.one(plugin) for plugin in plugin_pages.plugin_folders()}
    for name, text in made.items():
        (path := folder / f"{name}.md").parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "reference" / "_generated")
