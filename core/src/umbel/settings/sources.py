"""Where settings come from. Later wins: defaults, file, environment, code, command line.

Each source becomes a tree of ``Given`` values that know their origin, so that a mistake, and ``umbel config show``, can
name the line, the variable or the option. Nothing that is shown carries a password.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from attrs import fields, frozen, has

from umbel.errors import SettingsError
from umbel.settings.schema import Settings

Key = tuple[str, ...]
StrPath = str | os.PathLike[str]

CONTROL_VARIABLES: Final = ("UMBEL_CONFIG", "UMBEL_DEBUG")
"""``UMBEL_…`` variables that are not settings: the file to read; tracebacks instead of sentences."""

_PREFIX: Final = "UMBEL_"
NAMED_SECTIONS: Final = ("queues", "tasks", "schedules")
_MASK: Final = "***"
_SECRET_NAME: Final = (
    r"passw|passphrase|pwd|secret|token|credential|(?:api|access|account|auth|private|signing)[_-]?key"
)
_URL_PASSWORD: Final = re.compile(r"(://[^:]*:).*@", re.DOTALL)
_SECRET_PART: Final = re.compile(
    rf"([\w-]*(?:{_SECRET_NAME})[\w-]*\s*=\s*)('[^']*'|\"[^\"]*\"|[^\s&;]+)", re.IGNORECASE
)


@frozen
class Given:
    """A value and where it was given. Of a table, ``value`` is a dict of ``Given``; a dict is never anything else."""

    value: Any
    origin: str

    def plain(self) -> Any:
        """The value without its origins."""
        return {name: node.plain() for name, node in self.value.items()} if isinstance(self.value, dict) else self.value


class Text(str):
    """A value written where everything is text; its field's type says how it is read."""

    __slots__ = ()

    def toml(self) -> Any:
        """What the text means as a TOML value; the plain string if it is none."""
        import tomllib

        try:
            document = tomllib.loads(f"value = {self}")
        except ValueError:  # tomllib.TOMLDecodeError, or a number of thousands of digits
            return str(self)
        return document["value"] if len(document) == 1 else str(self)


@frozen(kw_only=True)
class Loaded:
    """Settings, and the origin of each of them."""

    settings: Settings
    provenance: Mapping[str, str]
    """By dotted key: ``default``, ``/path/umbel.toml:12``, ``environment UMBEL_…``, ``code``, ``command line --…``."""
    file: Path | None
    """The file that was read; None: there is none."""


def load(
    *,
    file: StrPath | None = None,
    start: StrPath | None = None,
    environ: Mapping[str, str] | None = None,
    code: Mapping[str, Any] | None = None,
    command_line: Mapping[str, Any] | None = None,
) -> Loaded:
    """Read and merge every source and check the whole.

    ``file``, else ``UMBEL_CONFIG``, names the file; with neither, ``umbel.toml`` or a ``pyproject.toml`` that has a
    ``[tool.umbel]`` is looked for in ``start`` (by default the working directory) and upwards. ``code`` is nested or
    has dotted keys; ``command_line`` has dotted keys, its strings are read as text and its None means not given.

    Raises ``SettingsError``: at once for a file that cannot be read, otherwise with every problem of every source.
    """
    from umbel.settings.structure import structure

    environ = os.environ if environ is None else environ
    problems: list[str] = []
    path, tree = _read_file(file, environ, start or ".")
    for layer in (_environment(environ), _code(code or {}, problems), _command_line(command_line or {}, problems)):
        tree = _merge(tree, _plant(layer, problems))
    settings = structure(tree, problems)
    provenance = {join_key(key): _origin(tree, key) for key, _ in leaves(settings)}
    return Loaded(settings=settings, provenance=provenance, file=path)


# --- trees of given values ------------------------------------------------------------------------


def always(origin: str) -> Callable[[Key], str]:
    """The origin of values that were all given in one place."""
    return lambda _: origin


def grow(value: Any, origin: Callable[[Key], str], key: Key = ()) -> Given:
    """The tree of a plain nested mapping; ``origin`` says where each key was given."""
    if isinstance(value, Mapping):
        value = {str(name): grow(below, origin, (*key, str(name))) for name, below in value.items()}
    return Given(value, origin(key))


def _plant(values: Iterable[tuple[Key, Any, str]], problems: list[str]) -> Given:
    """The tree of one source's keys, in which no value may be given twice."""
    tree = Given({}, "")
    for key, value, origin in values:
        branch = grow(value, always(origin))
        for name in reversed(key):
            branch = Given({name: branch}, origin)
        tree = _merge(tree, branch, problems)
    return tree


def _merge(below: Given, above: Given, clashes: list[str] | None = None, key: Key = ()) -> Given:
    """Tables are merged, anything else of ``above`` replaces. With ``clashes``, a replacement is a problem."""
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        if clashes is not None:
            clashes.append(f"{above.origin}: {join_key(key)} is given by {below.origin} too; give it once")
        return above
    merged = dict(below.value)
    for name, node in above.value.items():
        merged[name] = _merge(merged[name], node, clashes, (*key, name)) if name in merged else node
    return Given(merged, above.origin if above.value else below.origin)


def _origin(tree: Given, key: Key) -> str:
    for name in key:
        if not isinstance(tree.value, dict):
            break  # given as a whole further up
        if name not in tree.value:
            return "default"
        tree = tree.value[name]
    return tree.origin


def leaves(settings: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Each key and value of a settings instance, tables taken apart."""
    if has(type(settings)):
        below = {field.alias: getattr(settings, field.name) for field in fields(type(settings))}
    elif isinstance(settings, Mapping) and settings:
        below = {str(name): value for name, value in settings.items()}
    else:
        yield key, settings
        return
    for name, value in below.items():
        yield from leaves(value, (*key, name))


# --- keys -----------------------------------------------------------------------------------------


def join_key(key: Key) -> str:
    """The dotted key as TOML writes it, names with dots or other characters in quotes."""
    return ".".join(
        name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False) for name in key
    )


def split_key(text: str) -> Key | None:
    """The parts of a dotted key as TOML reads it; None: it is not one."""
    return _statement_key(f"{text} = 0")


def _statement_key(statement: str) -> Key | None:
    """The path of a TOML table header or ``key = 0``."""
    import tomllib

    try:
        node: Any = tomllib.loads(statement)
    except ValueError:
        return None
    key: list[str] = []
    while isinstance(node, dict) and len(node) == 1:
        name, node = next(iter(node.items()))
        key.append(name)
    return tuple(key)


def variable(key: Key) -> str:
    """The environment variable of a setting."""
    return _PREFIX + "__".join(key).upper()


def option_name(key: Key) -> str:
    """The command line's name for a setting: ``--app``, ``--broker``, ``--concurrency``, or ``--set KEY``."""
    match key:
        case ("broker" | "results" as name, "url") | ("worker", name) | ("app" as name,):
            return "--" + name.replace("_", "-")
    return f"--set {join_key(key)}"


# --- sources --------------------------------------------------------------------------------------


def _environment(environ: Mapping[str, str]) -> Iterator[tuple[Key, Any, str]]:
    for name in sorted(environ):
        if name.startswith(_PREFIX) and name not in CONTROL_VARIABLES:
            yield tuple(name[len(_PREFIX) :].lower().split("__")), Text(environ[name]), f"environment {name}"


def _code(values: Mapping[str, Any], problems: list[str]) -> Iterator[tuple[Key, Any, str]]:
    for text, value in values.items():
        if key := _dotted(text, "code", problems):
            yield key, value, "code"


def _command_line(values: Mapping[str, Any], problems: list[str]) -> Iterator[tuple[Key, Any, str]]:
    for text, value in values.items():
        if value is not None and (key := _dotted(text, "command line --set", problems)):
            yield key, Text(value) if isinstance(value, str) else value, f"command line {option_name(key)}"


def _dotted(text: str, origin: str, problems: list[str]) -> Key | None:
    if not (key := split_key(text)):
        problems.append(f'{origin}: {text!r} is not a dotted key; write it as TOML does, such as tasks."shop.*".queue')
    return key


def _read_file(file: StrPath | None, environ: Mapping[str, str], start: StrPath) -> tuple[Path | None, Given]:
    named = file or environ.get("UMBEL_CONFIG")
    if named:
        path = Path(named).absolute()
        if (data := _read(path)) is None:
            mend = "correct the path" if file else "correct or unset UMBEL_CONFIG"
            raise SettingsError([f"{path}: there is no such file; {mend}"])
        if (tree := _parse(path, data)) is None:
            raise SettingsError([f"{path}: there is no table [tool.umbel] in it; add one or name another file"])
        return path, tree
    first = Path(start).absolute()
    for folder in (first, *first.parents):
        for path in (folder / "umbel.toml", folder / "pyproject.toml"):
            if (data := _read(path)) is not None and (tree := _parse(path, data)) is not None:
                return path, tree
    return None, Given({}, "default")


def _read(path: Path) -> bytes | None:
    """The file's bytes; None: there is none."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError:
        raise SettingsError([f"{path}: is a directory; name the file in it"]) from None
    except OSError as error:
        raise SettingsError(
            [f"{path}: cannot be read ({error.strerror}); correct its permissions or name another in UMBEL_CONFIG"]
        ) from error


def _parse(path: Path, data: bytes) -> Given | None:
    """The settings in a file; None: a pyproject.toml that holds none (and need not be well-formed for us then)."""
    import tomllib

    project = path.name == "pyproject.toml"
    if project and b"umbel" not in data:
        return None
    try:
        text = data.decode("utf-8-sig")
        document: Any = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SettingsError([f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save it as UTF-8"]) from None
    except ValueError as error:
        ending = text.split("\n")
        end = f"at line {len(ending)}, column {len(ending[-1]) + 1}"
        reason = str(error).replace("at end of document", end)
        raise SettingsError([f"{path}: is not TOML: {reason}; correct that place"]) from None
    root: Key = ("tool", "umbel") if project else ()
    for name in root:
        if not isinstance(document, dict) or name not in document:
            return None
        document = document[name]
    if not isinstance(document, dict):
        raise SettingsError([f"{path}: tool.umbel is not a table; begin it with [tool.umbel]"])
    lines = _lines(text)

    def origin(key: Key) -> str:
        while key and root + key not in lines:
            key = key[:-1]
        return f"{path}:{lines[root + key]}" if root + key in lines else str(path)

    return grow(document, origin)


def _lines(text: str) -> dict[Key, int]:
    """The line on which each key or table begins. A key that this does not find is shown with its table's line."""
    lines: dict[Key, int] = {}
    table: Key = ()
    quote = ""
    for number, line in enumerate(text.split("\n"), 1):
        if quote:  # inside a string of several lines
            quote = "" if line.count(quote) % 2 else quote
            continue
        quote = next((mark for mark in ('"""', "'''") if line.count(mark) % 2), "")
        header = line.lstrip().startswith("[")
        match = None if header else re.match(r"""(?:[\w\s.-]|"(?:[^"\\]|\\.)*"|'[^']*')+=""", line)
        if key := _statement_key(line if header else f"{match[0]} 0" if match else ""):
            key = key if header else table + key
            table = key if header else table
            for end in range(1, len(key) + 1):
                lines.setdefault(key[:end], number)
    return lines


# --- showing --------------------------------------------------------------------------------------


def mask(text: str) -> str:
    """``text`` without the password of a URL and without ``password=…``; hides too much rather than too little."""
    return _SECRET_PART.sub(rf"\1{_MASK}", _URL_PASSWORD.sub(rf"\1{_MASK}@", text))


def mask_value(key: Key, value: Any) -> Any:
    """``value`` as it may be shown: secret if a name in ``key`` sounds so, else with its strings masked."""
    names = key[:1] + key[2:] if key[:1] and key[0] in NAMED_SECTIONS else key
    if value not in (None, "") and any(re.search(_SECRET_NAME, name, re.IGNORECASE) for name in names):
        return _MASK
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {name: mask_value((*key, str(name)), below) for name, below in value.items()}
    if isinstance(value, list | tuple):
        return [mask_value(key, item) for item in value]
    return value


def masked(settings: Any) -> dict[str, Any]:
    """Every setting as it may be shown, by the dotted keys of ``Loaded.provenance``."""
    return {join_key(key): mask_value(key, value) for key, value in leaves(settings)}
