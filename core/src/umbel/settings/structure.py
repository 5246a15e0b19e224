"""From what was given to the attrs classes of the schema, with every problem found at once.

cattrs makes the value of a type; the walk over the tables is this module's own, so that each problem can name where the
value was given, its dotted key, what is wrong with it and what mends it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, partial
from operator import eq
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

from attrs import NOTHING, Attribute, fields, frozen, has
from cattrs import Converter

from umbel.errors import SettingsError
from umbel.settings import units
from umbel.settings.schema import KINDS, Settings, bare_type, is_list, is_literal, is_table, kind_of
from umbel.settings.sources import NAMED_SECTIONS, Given, Key, Text, always, grow, join_key, mask, mask_value, variable
from umbel.settings.units import Bytes, Seconds

T = TypeVar("T")


def structure(tree: Given, problems: Sequence[str] = ()) -> Settings:
    """The settings that ``tree`` gives. Raises ``SettingsError`` with ``problems`` and all that are found here."""
    settings: Settings = _Walk(Settings, list(problems)).whole(tree)
    return settings


def structure_options(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """An instance of a driver's own attrs class of options, from a table or a URL's query.

    Strings are read as the field's type wants ("5", "true", "30s", "a,b"). ``where`` says where the values were given:
    ``[broker.options]``, ``query of broker.url``. Raises ``SettingsError`` with every problem, those of the class's own
    validators included.
    """
    made: T = _Walk(cls, []).whole(grow(_strings(values, Text), always(mask(where))))
    return made


def _strings(value: Any, make: type[str]) -> Any:
    """``value`` with every string in its tables remade."""
    if isinstance(value, Mapping):
        return {name: _strings(below, make) for name, below in value.items()}
    return make(value) if isinstance(value, str) else value


# --- values ---------------------------------------------------------------------------------------


def _refuse(type_: Any) -> ValueError:
    return ValueError(f"must be {kind_of(type_).form}")


def _string(value: Any, type_: Any) -> str:
    if not isinstance(value, str):
        raise _refuse(type_)
    return str(value)


def _boolean(value: Any, type_: Any) -> bool:
    if isinstance(value, Text) and value.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        return value.lower() in ("true", "yes", "on", "1")
    if not isinstance(value, bool):
        raise _refuse(type_)
    return value


def _number(value: Any, type_: Any) -> Any:
    value = value.toml() if isinstance(value, Text) else value
    if isinstance(value, str) and type_ in (Seconds, Bytes):
        return units.parse_seconds(value) if type_ == Seconds else units.parse_bytes(value)
    whole = type_ in (int, Bytes)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise _refuse(type_)
    if not math.isfinite(value) or (value < 0 and type_ in (Seconds, Bytes)):
        raise ValueError("must not be negative, infinite or NaN")
    return value if whole else float(value)


def _literal(value: Any, type_: Any) -> Any:
    for word in get_args(type_):
        if word == value and isinstance(value, type(word)):
            return word
    raise _refuse(type_)


def _anything(value: Any, type_: Any) -> Any:
    return value.toml() if isinstance(value, Text) else value


def _list_of(type_: Any, converter: Converter) -> Callable[[Any, Any], Any]:
    def structure_list(value: Any, _: Any) -> Any:
        if isinstance(value, Text):
            read = value.toml()
            parts = [Text(part.strip()) for part in value.split(",") if part.strip()]
            value = read if isinstance(read, list) else parts
        if not isinstance(value, list | tuple):
            raise _refuse(type_)
        items = []
        for number, item in enumerate(value, 1):
            try:
                items.append(converter.structure(item, get_args(type_)[0]))
            except ValueError as error:
                raise ValueError(f"item {number} {error}") from None
        make = get_origin(type_)
        return tuple(items) if make is Sequence else make(items)

    return structure_list


def _table_of(type_: Any, converter: Converter) -> Callable[[Any, Any], Any]:
    def structure_table(value: Any, _: Any) -> Any:
        value = value.toml() if isinstance(value, Text) else value
        if not isinstance(value, Mapping):
            raise _refuse(type_)
        if get_args(type_)[1] is Any:  # what a plugin's own class of options will read: its text stays text
            return _strings(value, str)
        return {name: converter.structure(item, get_args(type_)[1]) for name, item in value.items()}

    return structure_table


def _make_converter() -> Converter:
    converter = Converter(detailed_validation=False)
    for type_, hook in ((str, _string), (bool, _boolean), (int, _number), (float, _number)):
        converter.register_structure_hook(type_, hook)
    for alias, hook in ((Seconds, _number), (Bytes, _number), (Any, _anything)):
        converter.register_structure_hook_func(partial(eq, alias), hook)
    converter.register_structure_hook_func(is_literal, _literal)
    converter.register_structure_hook_factory(is_list, _list_of)
    converter.register_structure_hook_factory(is_table, _table_of)
    return converter


_CONVERTER: Final = _make_converter()


# --- the walk -------------------------------------------------------------------------------------


@cache
def _fields(cls: type) -> tuple[tuple[str, Attribute[Any], Any], ...]:
    """Name, field and type of everything that can be given."""
    types = get_type_hints(cls, include_extras=True)
    return tuple((field.alias, field, types[field.name]) for field in fields(cls) if field.init)


def _section_of(type_: Any) -> tuple[type | None, bool]:
    """The attrs class of a table's type, and whether the type is a table of such tables."""
    bare, _ = bare_type(type_)
    if has(bare):
        return bare, False
    many = is_table(bare) and has(get_args(bare)[1])
    return (get_args(bare)[1] if many else None), many


def _refusal(cls: type, values: Mapping[str, Any]) -> str | None:
    """Why an attrs class does not take these values; None: it does. attrs' own validators raise both errors."""
    try:
        cls(**values)
    except (ValueError, TypeError) as error:
        return str(error.args[0] if error.args else type(error).__name__)
    return None


@frozen
class _Walk:
    """One structuring: the class at the root, where misplaced keys may belong, and the problems found so far."""

    root: type
    problems: list[str]

    def whole(self, tree: Given) -> Any:
        """The instance that the whole tree gives. Raises ``SettingsError`` with every problem."""
        made = self.section(self.root, tree, ())
        if self.problems:
            raise SettingsError(self.problems)
        return made

    def blame(self, node: Given, key: Key, what: str) -> None:
        """Note a problem with a value, showing nothing secret."""
        plain = node.plain()
        value = mask_value(key, plain)
        shown = json.dumps(value, ensure_ascii=False, default=lambda other: mask(str(other)))
        shown = shown if len(shown) <= 60 else f"{shown[:57]}…"
        if value != plain:  # what a validator says may quote the value
            what = mask(what).replace(str(plain), "***")
        self.problems.append(f"{node.origin}: {join_key(key) or 'the file'} = {shown}: {what}")

    def table(self, node: Given, key: Key) -> Mapping[str, Given] | None:
        """The keys of a table; None, after naming the problem, if it is not one."""
        if isinstance(node.value, Text):
            node = grow(node.value.toml(), always(node.origin))
        if isinstance(node.value, dict):
            return node.value
        self.blame(node, key, f"must be a table, [{join_key(key)}]" if key else "must be a table")
        return None

    def section(self, cls: type, node: Given, key: Key) -> Any:
        """An instance of an attrs class; NOTHING, after naming every problem, if it cannot be made."""
        before = len(self.problems)
        if (table := self.table(node, key)) is None:
            return NOTHING
        known = {name: (field, type_) for name, field, type_ in _fields(cls)}
        for name, below in table.items():
            if name not in known:
                hint = self.hint(cls, below, key, name)
                self.problems.append(f"{below.origin}: {join_key((*key, name))} is not a setting; {hint}")
        values: dict[str, Any] = {}
        required = {name for name, (field, _) in known.items() if field.default is NOTHING}
        for name, (field, type_) in known.items():
            if name in table and (value := self.value(field, type_, table[name], (*key, name))) is not NOTHING:
                values[name] = value
            elif name in required - table.keys():
                form = kind_of(type_).form
                self.problems.append(f"{node.origin}: {join_key((*key, name))} is missing; give {form}")
        while required <= values.keys() and (refusal := _refusal(cls, values)) is not None:
            # Laid at the value without which the class says something else, so that one refusal does not hide another.
            for name in reversed([name for name in values if name not in required]):
                rest = {other: value for other, value in values.items() if other != name}
                if _refusal(cls, rest) != refusal:
                    self.blame(table[name], (*key, name), refusal)
                    values = rest
                    break
            else:  # what is missing causes it; if that was given and is wrong, it has been named
                if len(self.problems) == before:
                    self.problems.append(" ".join(filter(None, (f"{node.origin}:", join_key(key), refusal))))
                break
        return cls(**values) if len(self.problems) == before else NOTHING

    def value(self, field: Attribute[Any], type_: Any, node: Given, key: Key) -> Any:
        """The value of a field; NOTHING after naming what is wrong with it."""
        bare, optional = bare_type(type_)
        words = field.metadata.get("none", ())
        unset = node.value is None or (isinstance(node.value, Text) and not node.value)
        if (optional and unset) or (isinstance(node.value, str) and node.value in words):
            return None
        section, many = _section_of(bare)
        if section and not many:
            return self.section(section, node, key)
        if section:
            table = self.table(node, key) or {}
            made = {name: self.section(section, below, (*key, name)) for name, below in table.items()}
            return {name: value for name, value in made.items() if value is not NOTHING}
        value = node.plain()
        try:
            return _CONVERTER.structure(value, bare)
        except (ValueError, TypeError, OverflowError) as error:
            what = str(error)
        if type(value) is str and bare in KINDS and not isinstance(Text(value).toml(), str):
            what += "; leave out the quotes"
        self.blame(node, key, what)
        return NOTHING

    def hint(self, cls: type, node: Given, table: Key, name: str) -> str:
        """What was probably meant by an unknown key."""
        if len(table) == 2 and table[0] in NAMED_SECTIONS and isinstance(node.value, dict):
            parts = [*table[1:], name]
            while len(node.value) == 1 and isinstance((below := next(iter(node.value.items())))[1].value, dict):
                parts, node = [*parts, below[0]], below[1]
            return f"put a name that contains dots in quotes: [{join_key((table[0], '.'.join(parts)))}]"
        spelling = name.lower().replace("-", "_")
        here = [other for other, *_ in _fields(cls)]
        near = get_close_matches(spelling, here, n=1)
        elsewhere: dict[str, list[Key]] = {}
        for key, _, _ in _settings(self.root):
            for known in {key[-1], "_".join(key)} if key[:-1] != table else ():
                elsewhere.setdefault(known, []).append(key)
        best = get_close_matches(spelling, [*near, *elsewhere], n=1, cutoff=0.75)
        spots = {(*table, other): join_key((*table, other)) for other in near}
        for key in (key for other in best for key in elsewhere[other]) if best != near else ():
            spots[key] = f"[{join_key(key[:-1])}] {key[-1]}" if key[1:] else f"{key[0]} above all tables"
        if node.origin.startswith("environment "):
            spots = {key: f"{spot} ({variable(key)})" for key, spot in spots.items()}
        return f"did you mean {' or '.join(spots.values())}?" if spots else f"there are {', '.join(here)}"


# --- documentation --------------------------------------------------------------------------------


def _settings(cls: type, table: Key = ()) -> Iterator[tuple[Key, Attribute[Any], Any]]:
    """Key, field and type of every value in the tables of an attrs class."""
    for name, field, type_ in _fields(cls):
        section, many = _section_of(type_)
        if section:
            yield from _settings(section, (*table, name, *([field.metadata.get("each", "NAME")] if many else [])))
        else:
            yield (*table, name), field, type_


def _default(field: Attribute[Any], type_: Any) -> Any:
    """A field's default as a file would have it; None: not set."""
    value: Any = field.default
    if hasattr(value, "factory"):
        value = None if value.takes_self else value.factory()
    forms = {Seconds: units.format_seconds, Bytes: units.format_bytes}
    if value is not None and (form := forms.get(bare_type(type_)[0])):
        return form(value)
    return value if value is NOTHING else json.loads(json.dumps(value, default=_jsonable))


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(getattr(value, "value", value))


def reference(cls: type = Settings) -> list[tuple[str, str, str, str]]:
    """A row for each setting of an attrs class, for the documentation: dotted key, type, default, help."""
    rows = []
    for key, field, type_ in _settings(cls):
        words = [json.dumps(word) for word in field.metadata.get("none", ()) if word]
        default = _default(field, type_)
        text = "required" if default is NOTHING else "not set" if default is None else json.dumps(default)
        rows.append((join_key(key), " or ".join([kind_of(type_).name, *words]), text, field.metadata.get("help", "")))
    return rows


def json_schema(cls: type = Settings) -> dict[str, Any]:
    """JSON Schema of ``umbel.toml``, or of a plugin's options, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": cls.__name__, **_object(cls)}


def _object(cls: type) -> dict[str, Any]:
    known = _fields(cls)
    return {
        "description": (cls.__doc__ or "").partition("\n")[0],
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _property(field, type_) for name, field, type_ in known},
        "required": [name for name, field, _ in known if field.default is NOTHING],
    }


def _property(field: Attribute[Any], type_: Any) -> dict[str, Any]:
    section, many = _section_of(type_)
    words = field.metadata.get("none", ())
    if section:
        shape = {"type": "object", "additionalProperties": _object(section)} if many else _object(section)
    else:
        shape = {**kind_of(type_).schema, **field.metadata.get("bounds", {})}
        shape = {"anyOf": [shape, {"enum": list(words)}]} if words else shape
        if (default := _default(field, type_)) not in (None, NOTHING):
            shape["default"] = default
    return {**shape, "description": field.metadata.get("help", "")}
