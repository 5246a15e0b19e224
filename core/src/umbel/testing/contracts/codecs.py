"""What the laws of serializers and compressors share."""

from __future__ import annotations

import threading
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st


def thorough(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, database=None)


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes of which a few were changed, left out, doubled or put in."""
    data = draw(whole)
    start = draw(st.integers(0, len(data)))
    stop = draw(st.integers(start, min(start + 4, len(data))))
    return data[:start] + draw(st.binary(max_size=4)) + data[stop:]


def at_once(work: Callable[[int], None]) -> None:
    """Do ``work`` in several threads; raise what one of them raised."""
    raised: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "threads hang"
    if raised:
        raise raised[0]
