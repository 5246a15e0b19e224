"""YAML as the wire has it: safe tags, sorted keys; no aliases written, and few read.

libyaml scans, parses and emits where PyYAML was built with it. Its composer is not used: it recurses without a bound, and
shows nothing before the whole document is there. PyYAML's own composer reads event by event, and can be stopped.
"""

from __future__ import annotations

from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, ClassVar, Final
from uuid import UUID

import yaml  # type: ignore[import-untyped]  # its types are a distribution of their own
from yaml.composer import Composer  # type: ignore[import-untyped]  # likewise
from yaml.constructor import SafeConstructor  # type: ignore[import-untyped]  # likewise
from yaml.parser import Parser  # type: ignore[import-untyped]  # likewise
from yaml.reader import Reader  # type: ignore[import-untyped]  # likewise
from yaml.resolver import Resolver  # type: ignore[import-untyped]  # likewise
from yaml.scanner import Scanner  # type: ignore[import-untyped]  # likewise

from umbel.errors import DecodeError, EncodeError
from umbel.ports.serializer import Serializer

_INT: Final = "tag:yaml.org,2002:int"
_INT_LENGTH: Final = 4300
"""The interpreter's own bound on decimal integers. Base 60 has none, and takes quadratic time."""
_KEY_LENGTH: Final = 20
"""64 bits in decimal. Integers beyond can be made to share one hash, and a dict of them takes quadratic time."""
_REPEATED: Final = 1_000_000
"""Characters that aliases may repeat in any body; in a longer one, as many as it has."""


class YamlSerializer(Serializer):
    """``application/x-yaml``, readable by every Celery worker and client that accepts it.

    ``dumps`` takes None, bool, int, float, str, bytes, datetime, date, list, tuple, set, dict, and subclasses that are one
    of these. What comes back equals what went in, but for tuples, which become lists. ``loads`` creates only these types,
    so it is safe on untrusted bytes.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str] = "yaml"
    content_type: ClassVar[str] = "application/x-yaml"
    content_encoding: ClassVar[str] = "utf-8"

    def dumps(self, value: Any) -> bytes:
        """Encode ``value`` as ASCII. Raises ``EncodeError``, naming the type that has no form in safe YAML."""
        try:
            data: bytes = yaml.dump(value, Dumper=_Dumper, encoding="utf-8")
        except EncodeError:
            raise
        except RecursionError:
            raise EncodeError("the value contains itself, or nests too deep for YAML") from None
        except Exception as error:  # a subclass's own items() and a zone's utcoffset() run here, and may raise anything
            raise EncodeError(f"the value cannot be written as YAML: {error}") from error
        return data

    def loads(self, data: bytes) -> Any:
        """Decode one YAML document in UTF-8. Raises ``DecodeError`` and nothing else."""
        try:
            loader = _Loader(data.decode("utf-8"))
            node = loader.get_single_node()
            if node is None:
                raise DecodeError("not a YAML document: there is none in the body")
            return loader.construct_document(node)
        except DecodeError:
            raise
        except RecursionError:
            raise DecodeError("the YAML document nests deeper than this interpreter can follow") from None
        except Exception as error:  # the constructors of tags pass on whatever they meet in a value that does not fit
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise DecodeError(f"not a YAML document: {reason[:300]}") from error


if yaml.__with_libyaml__:
    from yaml.cyaml import CParser, CSafeDumper  # type: ignore[import-untyped]  # likewise

    class _Source(Composer, CParser):  # type: ignore[misc]  # untyped bases
        def __init__(self, text: str) -> None:
            CParser.__init__(self, text)
            Composer.__init__(self)

    _SafeDumper = CSafeDumper
else:

    class _Source(Reader, Scanner, Parser, Composer):  # type: ignore[misc, no-redef]  # untyped bases; the other branch's name
        def __init__(self, text: str) -> None:
            Reader.__init__(self, text)
            for part in (Scanner, Parser, Composer):
                part.__init__(self)

    _SafeDumper = yaml.SafeDumper


class _Loader(_Source, SafeConstructor, Resolver):  # type: ignore[misc]  # untyped bases
    """PyYAML's safe loader, stopped at the first node that would make more of the document than there is."""

    def __init__(self, text: str) -> None:
        _Source.__init__(self, text)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)
        self._allowed = max(len(text), _REPEATED)
        self._repeated = 0
        self._read = 0
        """Characters of all nodes so far, those that aliases stand for included."""
        self._lengths: dict[str, int] = {}
        """Of each anchored node that is complete, its characters."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        start = self._read
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            self._repeat(event.anchor)
        else:
            # Checked before there is a node: a directive can make every short tag stand for a long one.
            if event.tag not in self.yaml_constructors and event.tag != "!":
                raise DecodeError(f"{event.tag[:100]!r} is not a tag of safe YAML")
            node = super().compose_node(parent, index)
            self._read += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
            if event.anchor is not None:
                self._lengths[event.anchor] = self._read - start
        is_key = index is None and isinstance(parent, yaml.MappingNode)
        if is_key and node.tag == _INT and len(node.value) > _KEY_LENGTH:
            raise DecodeError("an integer of more than 64 bits is a key in the YAML document")
        return node

    def _repeat(self, anchor: str) -> None:
        if anchor not in self._lengths:
            raise DecodeError("a value of the YAML document contains itself")
        self._repeated += self._lengths[anchor]
        self._read += self._lengths[anchor]
        if self._repeated > self._allowed:
            raise DecodeError(f"the aliases of the YAML document repeat more than {self._allowed:,} characters")

    def construct_yaml_int(self, node: Any) -> Any:
        if len(node.value) > _INT_LENGTH:
            raise DecodeError(f"an integer of the YAML document has more than {_INT_LENGTH:,} digits")
        return super().construct_yaml_int(node)


_Loader.add_constructor(_INT, _Loader.construct_yaml_int)


class _Dumper(_SafeDumper):  # type: ignore[misc, valid-type]  # an untyped base, one of two
    """PyYAML's safe dumper: what occurs twice is written twice, and a subclass as what it is."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, value: str) -> Any:
        text = str.__str__(value)
        text.encode(
            "utf-8"
        )  # refuses lone surrogates: PyYAML's own emitter would write them, and libyaml not read them
        return self.represent_str(text)

    def represent_moment(self, value: datetime) -> Any:
        offset = value.utcoffset()
        if offset is not None and offset.total_seconds() % 60:
            raise EncodeError(f"YAML has no UTC offset with seconds: pass {value.isoformat()} in another time zone")
        return self.represent_datetime(value)

    def refuse(self, value: object) -> Any:
        cls = type(value)
        name = f"{cls.__module__}.{cls.__qualname__}"
        if isinstance(value, (time, Decimal, UUID)):
            raise EncodeError(
                f"YAML has no form for {name}: pass it as text, which typed=True on the task turns back into what its "
                "annotation says, or use the json serializer, which carries it"
            )
        raise EncodeError(
            f"YAML has no form for {name}: pass plain values (None, bool, int, float, str, bytes, list, dict, set, datetime, "
            "date), or set typed=True on the task"
        )


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(datetime, _Dumper.represent_moment)
_Dumper.add_representer(None, _Dumper.refuse)
_Dumper.add_multi_representer(datetime, _Dumper.represent_moment)
_Dumper.add_multi_representer(date, _Dumper.represent_date)
_Dumper.add_multi_representer(int, lambda dumper, value: dumper.represent_int(int(value)))
_Dumper.add_multi_representer(float, lambda dumper, value: dumper.represent_float(float(value)))
_Dumper.add_multi_representer(str, _Dumper.represent_text)
_Dumper.add_multi_representer(bytes, lambda dumper, value: dumper.represent_binary(value))
_Dumper.add_multi_representer(list, _Dumper.represent_list)
_Dumper.add_multi_representer(tuple, _Dumper.represent_list)
_Dumper.add_multi_representer(set, _Dumper.represent_set)
_Dumper.add_multi_representer(dict, _Dumper.represent_dict)
