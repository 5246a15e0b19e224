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
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Final

import attrs
import click

import umbel
from umbel.cli.group import COMMANDS, root
from umbel.model import TaskOptions
from umbel.settings.schema import Settings, TaskSettings
from umbel.settings.sources import split_key, variable
from umbel.settings.structure import reference

ROOT: Final = Path(__file__).resolve().parents[1]
KERNEL: Final = Path(umbel.__file__).parent
HELP_WIDTH: Final = 96
PROPERTIES: Final = frozenset({"property", "cached_property"})

Function = ast.FunctionDef | ast.AsyncFunctionDef


# --- reading sources ------------------------------------------------------------------------------


@cache
def source(module: str) -> tuple[str, ast.Module]:
    """Text and tree of a kernel module: ``ports.transport``."""
    text = KERNEL.joinpath(*module.split(".")).with_suffix(".py").read_text()
    return text, ast.parse(text)


def classes(module: str) -> list[ast.ClassDef]:
    """The public classes of a module, in the order of the source."""
    return [n for n in source(module)[1].body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]


def signature(function: Function) -> str:
    """A function's first line as it is written, on one line and without ``self``; a property's name and type."""
    returns = ast.unparse(function.returns) if function.returns else "Any"
    if decorators(function) & PROPERTIES:
        return f"{function.name}: {returns}"
    prefix = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    return f"{prefix} {function.name}({', '.join(_parameters(function.args))}) -> {returns}"


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [*[None] * (len(plain) - len(arguments.defaults)), *arguments.defaults]
    for position, (argument, default) in enumerate(zip(plain, defaults, strict=True)):
        if argument.arg not in ("self", "cls") or argument.annotation:
            yield _parameter(argument, default)
        if arguments.posonlyargs and position == len(arguments.posonlyargs) - 1 and argument.arg not in ("self", "cls"):
            yield "/"
    if arguments.vararg:
        yield f"*{_parameter(arguments.vararg, None)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(argument, default)
    if arguments.kwarg:
        yield f"**{_parameter(arguments.kwarg, None)}"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    return f"{argument.arg}{annotation}" + (f" = {ast.unparse(default)}" if default else "")


def decorators(node: Function | ast.ClassDef) -> set[str]:
    return {ast.unparse(d).partition("(")[0] for d in node.decorator_list}


def docs_of(node: ast.AST) -> str:
    return ast.get_docstring(node) or ""  # type: ignore[arg-type]  # called with nodes that can have one


def fields_of(cls: ast.ClassDef) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and documentation of the annotated attributes of a class."""
    following: Sequence[ast.stmt | None] = [*cls.body[1:], None]
    for node, after in zip(cls.body, following, strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if node.target.id.startswith("_"):
            continue
        docs = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            docs = inspect.cleandoc(after.value.value)
        yield node.target.id, ast.unparse(node.annotation), _default(node.value), docs


def _default(value: ast.expr | None) -> str:
    if value is None:
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "attrs.field"):
        known = {k.arg: ast.unparse(k.value) for k in value.keywords}
        return known.get("default") or (f"{known['factory']}()" if "factory" in known else "")
    return ast.unparse(value)


# --- writing Markdown -----------------------------------------------------------------------------


def cell(text: str) -> str:
    """Text for one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(headings), ["---"] * len(headings), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fence(text: str, language: str = "text") -> str:
    return f"```{language}\n{text}\n```"


def page(*parts: str) -> str:
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def function_parts(function: Function, level: int, title: str | None = None) -> Iterator[str]:
    yield f"{'#' * level} {title or function.name}"
    mark = "@property\n" if decorators(function) & PROPERTIES else ""
    mark += "@classmethod\n" if "classmethod" in decorators(function) else ""
    yield fence(mark + signature(function), "py")
    yield docs_of(function)


def class_parts(cls: ast.ClassDef, level: int, *, methods: bool = True) -> Iterator[str]:
    """A class: its docstring, a table of its fields, a section for each public method."""
    bases = ", ".join(ast.unparse(base) for base in cls.bases)
    yield f"{'#' * level} {cls.name}"
    yield fence(f"class {cls.name}({bases})" if bases else f"class {cls.name}", "py")
    yield docs_of(cls)
    if "Enum" in bases:
        yield _members(cls)
    if rows := [(code(n), code(t), code(d), docs) for n, t, d, docs in fields_of(cls)]:
        yield table(("attribute", "type", "default", "meaning"), rows)
    if not methods:
        return
    for node in cls.body:
        if not isinstance(node, Function) or "overload" in decorators(node):
            continue
        if node.name.startswith("_") and not (node.name == "__init__" and docs_of(node)):
            continue
        yield from function_parts(
            node, level + 1, f"{cls.name}.{node.name}" if node.name != "__init__" else f"{cls.name}()"
        )


def _members(cls: ast.ClassDef) -> str:
    rows = []
    for node, after in zip(cls.body, [*cls.body[1:], None], strict=True):
        if isinstance(node, ast.Assign):
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            docs = inspect.cleandoc(str(after.value.value)) if told else ""  # type: ignore[union-attr]  # told says what it is
            rows.append((code(ast.unparse(node.targets[0])), code(ast.unparse(node.value)), docs))
    return table(("member", "value", "meaning"), rows)


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
    return page(*parts)


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


PORTS: Final = ("transport", "result_store", "serializer", "compressor", "pool", "scheduler", "step", "clock")


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
    ("canvas.signature", ("Signature",)),
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


# --- plugins --------------------------------------------------------------------------------------


def plugin_folders() -> list[Path]:
    """The first-party plugins."""
    return sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))


def entry_points(folder: Path) -> dict[str, dict[str, str]]:
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    groups: dict[str, dict[str, str]] = project.get("entry-points", {})
    return groups


def plugins() -> str:
    """Every first-party plugin: what it offers, what it declares, what its README promises."""
    rows = []
    parts = []
    declared: dict[str, dict[str, Mapping[str, Any]]] = {}
    for folder in plugin_folders():
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        offers = entry_points(folder)
        kinds = ", ".join(f"{_kind(group)} {code(name)}" for group, names in offers.items() for name in names)
        rows.append(
            (f"[{folder.name}](#umbel-{folder.name})", code(project["name"]), kinds, project.get("description", ""))
        )
        parts += [f"## umbel-{folder.name}", project.get("description", "") + "."]
        for group, names in offers.items():
            for name, target in names.items():
                driver = resolve_name(target)
                if (known := _capabilities(group, driver)) is not None:
                    declared.setdefault(group, {})[name] = known
                parts += _options(name, group, driver)
        parts.append(_readme(folder))
    matrix = []
    for group, drivers in sorted(declared.items()):
        columns = sorted(drivers)
        cells = [(code(word), *(_shown(drivers[name][word]) for name in columns)) for word in drivers[columns[0]]]
        matrix += [f"### Of {_kind(group)}s", table(("capability", *map(code, columns)), cells)]
    head = table(("plugin", "distribution", "offers", "what it is"), rows)
    return page("## All of them", head, "## Declared capabilities", *matrix, *parts)


def _kind(group: str) -> str:
    return group.removeprefix("umbel.").removesuffix("s").replace("_", " ")


_URLS: Final = {"sqlite": "sqlite:///docs.sqlite3"}


def _capabilities(group: str, driver: Any) -> Mapping[str, Any] | None:
    if group not in ("umbel.transports", "umbel.result_stores", "umbel.pools"):
        return None
    declared = inspect.getattr_static(driver, "capabilities", None)
    if not attrs.has(type(declared)):  # it depends on the options: a driver's constructor does no I/O
        declared = driver(_URLS.get(driver.__module__.partition(".")[0].removeprefix("umbel_"), "")).capabilities
    return attrs.asdict(declared)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not limited"
    return "any" if value == float("inf") else f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _options(name: str, group: str, driver: Any) -> Iterator[str]:
    """The driver's own settings, from its class of options."""
    options = getattr(driver, "Options", None)
    if options is None or not attrs.fields(options):
        return
    where = {"transport": "broker.options", "result store": "results.options", "pool": "worker.pool_options"}
    docs: dict[str, str] = {}
    for cls in reversed(options.__mro__):
        if attrs.has(cls):
            (node,) = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body
            assert isinstance(node, ast.ClassDef)
            docs |= {field: told for field, _, _, told in fields_of(node)}
    rows = [
        (code(key), type_, code(default), help_ or docs.get(key, ""))
        for key, type_, default, help_ in reference(options)
    ]
    yield f"### Options of {_kind(group)} `{name}`: `[{where[_kind(group)]}]`"
    yield table(("option", "type", "default", "meaning"), rows)


def _readme(folder: Path) -> str:
    """The README below its title, its headings a level deeper, its links to neighbours as plain text."""
    text = (folder / "README.md").read_text().strip()
    _, _, below = text.partition("\n")
    lines, fenced = [], False
    for line in below.splitlines():
        fenced ^= line.startswith("```")
        heading = not fenced and re.match(r"#+ ", line)
        line = line if fenced else re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]+\)", r"\1", line)
        lines.append(f"#{line}" if heading else "```text" if line == "```" and fenced else line)
    return "\n".join(lines)


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
    "plugins": plugins,
}


def write(folder: Path) -> None:
    """Write every page; one that has not changed keeps its time, so that Sphinx need not read it again."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        path, text = folder / f"{name}.md", make()
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "reference" / "_generated")
