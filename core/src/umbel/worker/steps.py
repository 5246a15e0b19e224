"""A worker's components: a dependency graph, started in order, stopped in reverse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from umbel.errors import UmbelError
from umbel.ports.step import Step


def in_order(steps: Sequence[Step]) -> list[Step]:
    """``steps`` so that each comes after those that must run before it; otherwise as given.

    Raises ``UmbelError`` for a name given twice, a string in the place of names, a missing requirement, or a circle.
    """
    by_name: dict[str, Step] = {}
    for step in steps:
        if step.name in by_name:
            raise UmbelError(f"two worker steps are named {step.name!r}")
        for given in ("requires", "before"):
            if isinstance(names := getattr(step, given), str):
                raise UmbelError(f"worker step {step.name!r}: {given} is a string, not a tuple: write ({names!r},)")
        by_name[step.name] = step
    for step in steps:
        if missing := [name for name in step.requires if name not in by_name]:
            known = ", ".join(by_name)
            raise UmbelError(f"worker step {step.name!r} requires {missing[0]!r}, which is not there; steps: {known}")
    earlier = earlier_steps(steps)
    try:
        TopologicalSorter(earlier).prepare()
    except CycleError as exc:
        raise UmbelError(f"worker steps require each other in a circle: {' → '.join(exc.args[1])}") from exc
    order: dict[str, Step] = {}

    def place(step: Step) -> None:
        for name in earlier[step.name]:
            if name not in order:
                place(by_name[name])
        order[step.name] = step

    for step in steps:
        if step.name not in order:
            place(step)
    return list(order.values())


def earlier_steps(steps: Sequence[Step]) -> Mapping[str, Sequence[str]]:
    """By name: what starts before each step, because it requires that or because that says so itself (``before``)."""
    earlier = {step.name: list(step.requires) for step in steps}
    for step in steps:
        for name in step.before:
            if name in earlier and step.name not in earlier[name]:
                earlier[name].append(step.name)
    return earlier
