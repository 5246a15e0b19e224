"""Stamps: headers that every task of a composed call carries, the same for all, or as a visitor says for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from attrs import evolve

from umbel.canvas.compose import Chain, Chord, Group, Stream, read
from umbel.canvas.signature import Canvas, Signature, plain_signatures

C = TypeVar("C", bound=Canvas[Any])
Stamps = Mapping[str, Any]


class StampingVisitor:
    """Says what each part of a composed call is stamped with; the methods, and what they are given, are Celery's.

    Each is given the part and the stamps around it, and returns stamps for it and what is in it. Where the answer names some
    of its keys in ``stamped_headers``, the others are options of the call. Parts are values: to change one changes nothing.
    """

    def on_signature(self, sig: Signature, **headers: Any) -> Stamps:
        """A task's call, wherever it stands."""
        return {}

    def on_chain_start(self, chain: Chain, **headers: Any) -> Stamps:
        """Before the steps of a chain."""
        return {}

    def on_chain_end(self, chain: Chain, **headers: Any) -> None:
        """After them."""

    def on_group_start(self, group: Group, **headers: Any) -> Stamps:
        """Before the members of a group; those of a generator are stamped as they are made, after ``on_group_end``."""
        return {}

    def on_group_end(self, group: Group, **headers: Any) -> None:
        """After them."""

    def on_chord_header_start(self, sig: Chord, **headers: Any) -> Stamps:
        """Before the members of a chord."""
        return self.on_group_start(sig.header, **headers)

    def on_chord_header_end(self, sig: Chord, **headers: Any) -> None:
        """After them."""
        self.on_group_end(sig.header, **headers)

    def on_chord_body(self, sig: Chord, **headers: Any) -> Stamps:
        """Before the body of a chord."""
        return {}

    def on_callback(self, callback: Canvas[Any], **headers: Any) -> Stamps:
        """A call's ``link``, before it is stamped as a call itself."""
        return {}

    def on_errback(self, errback: Canvas[Any], **headers: Any) -> Stamps:
        """A call's ``link_error`` or ``on_error``, likewise."""
        return {}


def stamped(canvas: C, visitor: StampingVisitor | None, append: bool, headers: Stamps) -> C:
    """See ``Canvas.stamp``."""
    made: C = _Stamping(visitor, append).stamp(canvas, headers)
    return made


class _Stamping:
    def __init__(self, visitor: StampingVisitor | None, append: bool) -> None:
        self._visitor = visitor or StampingVisitor()
        self._append = append

    def stamp(self, canvas: Any, headers: Stamps) -> Any:
        ask = self._visitor
        made: Any
        match canvas:
            case Signature():
                made = self._put(canvas, self._with(headers, ask.on_signature(canvas, **headers)))
            case Chain():
                inner = self._with(headers, ask.on_chain_start(canvas, **headers))
                made = evolve(canvas, tasks=tuple(self.stamp(task, inner) for task in canvas.tasks))
                ask.on_chain_end(canvas, **inner)
            case Group():
                inner = self._with(headers, ask.on_group_start(canvas, **headers))
                made = evolve(canvas, members=self._members(canvas, inner))
                ask.on_group_end(canvas, **inner)
            case Chord():
                inner = self._with(headers, ask.on_chord_header_start(canvas, **headers))
                header, body = evolve(canvas.header, members=self._members(canvas.header, inner)), canvas.body
                ask.on_chord_header_end(canvas, **inner)
                header = self._links(header, headers)
                if body is not None:
                    body = self.stamp(body, self._with(headers, ask.on_chord_body(canvas, **headers)))
                made = evolve(canvas, header=header, body=body)
        return self._links(made, headers)

    def _members(self, group: Group, headers: Stamps) -> Any:
        if isinstance(group.members, Stream):
            return Stream(self.stamp(member, headers) for member in group.members)
        return tuple(self.stamp(member, headers) for member in group.members)

    def _links(self, canvas: C, headers: Stamps) -> C:
        found = {}
        for option in ("link", "link_error", "on_error"):
            ask = self._visitor.on_callback if option == "link" else self._visitor.on_errback
            if links := [read(plain) for plain in plain_signatures(canvas.options.get(option))]:
                found[option] = [
                    self.stamp(link, self._with(headers, ask(link, **headers))).to_plain() for link in links
                ]
        return canvas.set(**found) if found else canvas

    def _put(self, call: Signature, headers: Stamps) -> Signature:
        """The call with stamps and options of its own over those that it has."""
        names: Sequence[str] = headers.get("stamped_headers", list(headers))
        known = call.options.get("stamped_headers") or ()
        options = {name: value for name, value in headers.items() if name != "stamped_headers"}
        if self._append:
            options |= {name: _both(call.options[name], options[name]) for name in names if name in known}
        return call.set(**options, stamped_headers=list(dict.fromkeys([*known, *names])))

    def _with(self, headers: Stamps, answer: Stamps | None) -> Stamps:
        """``headers`` and what a visitor has answered, which wins. ``stamped_headers`` is there if some are no stamps."""
        if not answer:
            return headers
        names = {*headers.get("stamped_headers", headers), *answer.get("stamped_headers", answer)}
        merged = {**headers, **answer}
        merged.pop("stamped_headers", None)
        stamps = [name for name in merged if name in names]
        return merged if len(stamps) == len(merged) else {**merged, "stamped_headers": stamps}


def _both(old: Any, new: Any) -> list[Any]:
    return [*(old if isinstance(old, list) else [old]), *(new if isinstance(new, list) else [new])]
