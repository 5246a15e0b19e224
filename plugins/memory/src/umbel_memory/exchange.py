"""Which queues a message reaches that is published to an exchange."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import define, field


@define(eq=False)
class Exchange:
    """One named exchange and its bindings."""

    type: str
    _bindings: dict[tuple[str, str], None] = field(factory=dict)
    """Queue and binding key, in the order of binding."""

    def bind(self, queue: str, key: str) -> None:
        self._bindings[queue, key] = None

    def route(self, key: str) -> Sequence[str]:
        """The queues of a routing key, each once."""
        return list(dict.fromkeys(queue for queue, bound in self._bindings if self._matches(bound, key)))

    def _matches(self, bound: str, key: str) -> bool:
        match self.type:
            case "fanout":
                return True
            case "topic":
                return matches(bound.split("."), key.split("."))
        return bound == key


def matches(pattern: Sequence[str], words: Sequence[str]) -> bool:
    """Whether a topic pattern fits: ``*`` stands for one word, ``#`` for any number."""
    if not pattern:
        return not words
    head, *rest = pattern
    if head == "#":
        return any(matches(rest, words[skipped:]) for skipped in range(len(words) + 1))
    return bool(words) and head in ("*", words[0]) and matches(rest, words[1:])
