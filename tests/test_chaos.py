"""Some seconds of `tests.chaos`; by hand it goes on for longer, and with many seeds."""

from __future__ import annotations

import pytest

from tests.chaos import chaos
from tests.redis_server import running_redis


@pytest.mark.soak
def test_whatever_happens_to_workers_and_to_redis_every_task_has_its_end_and_every_word_is_right() -> None:
    with running_redis() as redis:
        assert chaos(redis, seconds=4, clients=6, seed=1) == []
