"""Frames come out of a stream as they went in, wherever it is cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from umbel_children.channel import Decoder, encode

frames = st.lists(st.tuples(st.integers(0, 9), st.binary(max_size=300) | st.text(max_size=20)), max_size=12)


@given(frames, st.data())
def test_a_stream_that_is_cut_anywhere_gives_its_frames(sent: list[tuple[int, object]], data: st.DataObject) -> None:
    stream = b"".join(map(encode, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    decoder = Decoder()
    found = [frame for begin, end in pairwise([0, *cuts, len(stream)]) for frame in decoder.feed(stream[begin:end])]
    assert found == sent


def test_a_frame_is_there_with_its_last_byte_and_not_before() -> None:
    decoder, data = Decoder(), encode((1, b"x" * 100_000))
    assert [decoder.feed(data[at : at + 1000]) for at in range(0, len(data) - 1, 1000)][:-1] == [[]] * 100
    again = Decoder()
    assert again.feed(data[:-1]) == []
    assert again.feed(data[-1:]) == [(1, b"x" * 100_000)]
