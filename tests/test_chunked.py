"""`inference_trio.chunked`: what h11 makes of the same bytes is the measure."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_trio.chunked import MAX_LINES, ChunkedBody, ChunkError

BODY = b"5\r\nHello\r\n00a;a=b;c\r\n, world!\r\n\r\n1 \t\r\nx\r\n0;last\r\nA: 1\r\nB: 2\r\n\r\n"
CONTENT = b"Hello, world!\r\nx"


def content_of(pieces: list[bytes], first: bytes = b"") -> tuple[bytes, ChunkedBody]:
    body = ChunkedBody(first)
    return b"".join([body.feed(b""), *map(body.feed, pieces)]), body


def by_h11(data: bytes) -> bytes:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
    content = b""
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        assert event is not h11.NEED_DATA
        content += event.data if isinstance(event, h11.Data) else b""
    return content


@given(st.lists(st.integers(0, len(BODY))).map(sorted))
def test_it_may_come_in_any_pieces(cuts: list[int]) -> None:
    pieces = [BODY[start:end] for start, end in zip([0, *cuts], [*cuts, len(BODY)], strict=True)]
    content, body = content_of(pieces)
    assert content == CONTENT == by_h11(BODY)
    assert body.is_complete
    assert body.rest == b""


@pytest.mark.parametrize("size", range(len(BODY)))
def test_it_is_complete_only_at_its_end(size: int) -> None:
    _, body = content_of([], BODY[:size])
    assert not body.is_complete


def test_what_has_come_of_a_chunk_is_given_at_once() -> None:
    body = ChunkedBody(b"5\r\nHe")
    assert [body.feed(piece) for piece in (b"", b"l", b"lo\r", b"\n0\r\n\r\nrest")] == [b"He", b"l", b"lo", b""]
    assert body.is_complete
    assert body.rest == b"rest"


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n",
        b"-1\r\n",
        b"0x1\r\na\r\n",
        b"1_0\r\n",
        b"\r\n",
        b"1\r\nab\r\n",
        b"1\r\na1\r\nb\r\n",
        b"1\na\n",
        b"f" * 17 + b"\r\n",
        b"1;" + b"x" * MAX_LINES,
        b"0\r\n" + b"A: 1\r\n" * (MAX_LINES // 6),
    ],
)
def test_what_is_no_chunk_is_refused_after_what_came_before(data: bytes) -> None:
    body = ChunkedBody(b"1\r\nx\r\n" + data)
    assert body.feed(b"")[:1] == b"x"
    with pytest.raises(ChunkError, match="Expected a chunk"):
        body.feed(b"")
