"""What a connection is still to be sent, and how much of it may be here."""

from __future__ import annotations

from inference_trio.outbox import Budget
from inference_trio.protocol import TextChunk
from inference_trio.redis_delivery import LARGEST_READY, Delivery, Ready

SIZE = LARGEST_READY // 4


def entries(first: int, count: int) -> list[Ready]:
    return [Ready(seq, TextChunk(task_id="t", chunk="x"), SIZE) for seq in range(first, first + count)]


def delivery(limit: int = 100 * LARGEST_READY) -> Delivery:
    return Delivery(0, LARGEST_READY, lambda: None, Budget(limit))


def taken(it: Delivery) -> list[int]:
    return [entry.seq for entry in iter(it.take, None)]


def test_what_is_here_is_counted_until_it_is_taken() -> None:
    it = delivery()
    it.accept(entries(1, 3))
    assert it.budget.used == 3 * SIZE
    assert taken(it) == [1, 2, 3]
    assert it.budget.used == 0


def test_or_until_nobody_takes_it_any_more() -> None:
    it = delivery()
    it.accept(entries(1, 3))
    it.take()
    it.close()
    assert it.budget.used == 0
    assert it.take() is None


def test_no_more_than_the_largest_is_here_and_the_rest_is_fetched_later() -> None:
    it = delivery()
    it.accept(entries(1, 9))
    assert (it.position, it.is_behind) == (4, True)
    assert taken(it) == [1, 2, 3, 4]
    it.accept(entries(5, 5))
    assert taken(it) == [5, 6, 7, 8]


def test_while_all_together_hold_too_much_there_is_one_at_a_time() -> None:
    it = delivery(limit=SIZE)
    it.budget.add(SIZE + 1)
    for seq in range(1, 4):
        assert it.most == 1
        it.accept(entries(seq, 3))
        assert taken(it) == [seq]
    it.budget.release(SIZE + 1)
    assert it.most == LARGEST_READY
