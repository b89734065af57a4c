"""Events are the same however their bytes are cut and their lines end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_trio import sse
from inference_trio.errors import BrokenStreamError
from inference_trio.sse import EventDecoder


def events(*reads: bytes) -> list[bytes]:
    decoder = EventDecoder()
    found = [event for read in reads for event in decoder.feed(read)]
    return found + decoder.finish()


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data:a\n\n", [b"a"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b"data: a\r\ndata: b\r\n\r\n", [b"a\nb"]),
        (b": comment\n\ndata: a\n: comment\n\n:\n\n", [b"a"]),
        (b"event: x\nid: 1\nretry: 2\ndata: a\n\n", [b"a"]),
        (b"data\n\ndata:\n\ndata: \n\n", []),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data: a\n\ndata: b", [b"a", b"b"]),
        (b"data: a\n\ndata: b\n", [b"a", b"b"]),
        (b"data: a\r\n\r\ndata: b\r", [b"a", b"b"]),
        ("data: Grüße\n\n".encode(), ["Grüße".encode()]),
        (b"data : a\n\n dataa: b\n\n", []),
        (b"", []),
    ],
)
def test_events_are_read_by_the_rules_in_one_read_or_many(stream: bytes, expected: list[bytes]) -> None:
    assert events(stream) == expected
    assert events(*(stream[i : i + 1] for i in range(len(stream)))) == expected


@settings(max_examples=200)
@given(
    lines=st.lists(st.sampled_from([b"data: a", b"data: b", b": x", b"", b""]), max_size=8),
    end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    cuts=st.lists(st.integers(0, 60), max_size=5),
)
def test_cuts_and_line_ends_make_no_difference(lines: list[bytes], end: bytes, cuts: list[int]) -> None:
    stream = end.join(lines)
    edges = [0, *sorted(cuts), max([len(stream), *cuts])]
    reads = [stream[start:stop] for start, stop in itertools.pairwise(edges)]
    assert events(*reads) == events(b"\n".join(lines))


def test_an_empty_read_between_cr_and_lf_makes_no_difference() -> None:
    assert events(b"data: a\r", b"", b"\ndata: b\r\n\r\n") == [b"a\nb"]


def test_what_comes_before_the_first_event_is_kept_until_then() -> None:
    decoder = EventDecoder()
    decoder.feed(b"<html>\n")
    decoder.feed(b"no")
    assert decoder.answer_so_far == b"<html>\nno"
    decoder.feed(b"\ndata: a\n\n")
    decoder.feed(b": comment\n\n")
    assert decoder.answer_so_far == b""


@pytest.mark.parametrize("read", [b"data: " + b"x" * 50, b"data: x\n" * 10, b": x\n\n" * 20])
def test_no_event_may_grow_without_end(read: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 150)
    decoder = EventDecoder()
    decoder.feed(b"data: a\n\n")
    decoder.feed(read)
    with pytest.raises(BrokenStreamError):
        [decoder.feed(read) for _ in range(2)]


def test_the_limit_is_for_each_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 50)
    assert events(*[b"data: " + b"x" * 30 + b"\n\n"] * 20) == [b"x" * 30] * 20
