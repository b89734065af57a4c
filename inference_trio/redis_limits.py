"""What may be held and run, counted over all workers; what a task holds in memory, in this one."""

from __future__ import annotations

from typing import Any

import attrs

from .access import Owner
from .errors import OverloadedError
from .outbox import RETRY_AFTER, Budget
from .redis_link import FOREVER
from .redis_worker import Worker
from .settings import Settings
from .store import too_many


@attrs.frozen
class Limits:
    settings: Settings
    budget: Budget

    async def enter(self, worker: Worker, session_id: str, owner: Owner) -> None:
        """Counts one more session. Raises OverloadedError where it would be too many."""
        limits = (self.settings.max_sessions, _limit(owner.max_sessions), _limit(owner.requests_per_minute))
        terms = (session_id, name_of(owner), worker.ttl, *limits, worker.id)
        reply = await worker.link.run("enter", worker.for_all, *terms)
        _check(reply, "sessions", self.settings.max_sessions, owner.max_sessions, owner)

    async def admit(self, worker: Worker, session_id: str, task_id: str, owner: Owner, model: str) -> None:
        """Counts one more task. Raises OverloadedError where it would be too many."""
        limits = (self.settings.max_tasks, _limit(owner.max_tasks), _limit(owner.requests_per_minute))
        terms = (worker.id, task_id, session_id, name_of(owner), *limits, model)
        reply = await worker.link.run("admit", worker.for_all, *terms)
        _check(reply, "tasks", self.settings.max_tasks, owner.max_tasks, owner)

    async def dismiss(self, worker: Worker, task_id: str, owner: Owner) -> None:
        """The task has ended, or never began."""
        await worker.link.run("dismiss", worker.for_all, worker.id, task_id, name_of(owner), within=FOREVER)

    async def spend(self, worker: Worker, owner: Owner) -> None:
        """Raises OverloadedError where the owner asks for too much in a minute."""
        reply = await worker.link.run("spend", worker.for_all, name_of(owner), _limit(owner.requests_per_minute))
        _check(reply, "requests", 0, 0, owner)


def name_of(owner: Owner) -> str:
    return owner.name or ""


def _limit(limit: int | None) -> int | str:
    return "" if limit is None else limit


def _check(reply: list[Any], what: str, most: int, most_of_owner: int | None, owner: Owner) -> None:
    match [part.decode() for part in reply]:
        case ["many"]:
            raise too_many(what, most, "on the server")
        case ["owner"]:
            raise too_many(what, most_of_owner or 0, "of this token")
        case ["rate", wait]:
            raise OverloadedError(owner.too_many_requests, retry_after=float(wait))
        case ["lost"]:
            raise OverloadedError("The server is not ready", retry_after=RETRY_AFTER)
