"""What is published grows with the number of tasks. What goes over the wire, and what a sender keeps: test_canvas_great.py."""

from __future__ import annotations

from typing import Any

from canvas_model import Lab
from cluster import FULL

from umbel import chain, chord, group
from umbel.model import Message


def weight(message: Message) -> int:
    return len(message.body) + len(repr(dict(message.headers)))


def published(lab: Lab, chords: int, width: int) -> int:
    """Bytes that a chain of so many chords of that width publishes, from its sending to its end."""
    with lab.running() as harness:
        steps: list[Any] = []
        for _ in range(chords):
            steps += [group([lab.note.si(n) for n in range(width)]), lab.note.si("body")]
        sent = chain(*steps).apply_async()
        harness.run_until_idle(60)
        assert sent.get(timeout=30) == "body"
        return sum(map(weight, harness.published))


def test_a_chain_of_chords_publishes_bytes_linear_in_its_size() -> None:
    lab = Lab()
    numbers = (2, 10, 50) if FULL else (2, 6, 18)
    width = 50 if FULL else 12
    few, some, many = (published(lab, number, width) for number in numbers)
    first, second = (some - few) / (numbers[1] - numbers[0]), (many - some) / (numbers[2] - numbers[1])
    assert abs(second - first) < 0.05 * first, "each chord more costs the same"


def test_nested_chords_publish_bytes_linear_in_their_depth() -> None:
    lab = Lab()
    sizes = []
    for depth in (1, 3, 5):
        canvas: Any = lab.note.si(0)
        for _ in range(depth):
            canvas = chord([canvas, lab.note.si(1)], lab.note.si("body"))
        with lab.running() as harness:
            canvas.apply_async()
            harness.run_until_idle(20)
            sizes.append(sum(map(weight, harness.published)))
    assert abs((sizes[2] - sizes[1]) - (sizes[1] - sizes[0])) < 0.1 * (sizes[1] - sizes[0])
