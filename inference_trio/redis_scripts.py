"""Sessions in Redis: what is kept under which key, and the scripts that change it.

How it works. Every process is a worker; a client may connect to any. Redis holds what must survive one of them,
and each change to it is one script, so that it happens whole, in one order for all, or not at all.

    runner ─▶ RedisSession.append ─▶ pending (merges) ═ APPEND ═▶ log ═ TAKE ═▶ ready ─▶ connection
              on the worker that runs the task                          on the worker that has the connection

Keys. All of a session's share a hash tag, and so do those that concern all workers: a script never touches two slots
of a Redis Cluster. Everything expires by itself when nobody uses it any more. Session ids and names are filled in:

    inference:ERA:{SID}              hash: tools, owner, window; and the state below
    inference:ERA:{SID}:log          stream of notifications; the id of an entry, ``SEQ-0``, is its number
    inference:ERA:{SID}:tasks        hash: running task -> its worker, the log's number when it began, its status
    inference:ERA:{SID}:ticket       digest of the ticket
    inference:ERA:{w:WORKER}:inbox   stream of messages to a worker, each a JSON array
    {inference}                      hash: the era, how often a lease was renewed, and when the last time
    {inference}:ERA:leases           sorted set: worker -> when its lease ends, in Redis's milliseconds
    {inference}:ERA:counts           hash: tasks running, in all and by owner
    {inference}:ERA:held:WORKER      hash: what is lost with this worker, its tasks and connections
    {inference}:ERA:past:WORKER      those of them that ended last
    {inference}:ERA:sessions[:OWNER] sorted set: session -> when it expires, for the limits
    {inference}:ERA:rate:OWNER       until when requests are spent

State of a session. ``latest`` is the newest number, ``base`` the newest that is no longer kept, ``cursor`` what the
connection has taken; ``total``, ``freed`` and ``read`` are the bytes up to each of them. ``conn`` is the connection
that counts (``WORKER:NUMBER``, or nothing) and ``epoch`` how many there were. ``idle`` is the newest number up to which
it has found everything taken: whoever appends right after that tells its worker. ``version`` grows with every reply
that says how much is unsent, as replies may overtake each other.

What is appended is numbered, and never changes again: text merges before, while the previous append is under way. So
there is at most one round trip for each, however many tokens came.

What a new connection is told is exact. A task, and a result for it, count from the moment they are in Redis; the worker
that runs the task acts on them after that, and they are refused where a newer connection has come by then. A task that
was to begin and then could not gets an `error` if a connection may have been told of it meanwhile.

Once and no more. A script whose reply was lost is run again, and a stalled Redis may run a copy late. So each is
idempotent: an append carries its producer's batch number, and is answered from memory the second time; tasks,
connections, results and sessions are added and removed by names of their own, and one that is past is remembered for a
while. What a reply asks its reader to do (tell somebody) is asked again by the second reply; what stands in Redis are
facts, not who was told, so a copy that nobody listens to changes nothing.

Leases. A worker renews its lease every second. When one has run out, every other worker ends what it ran: FAIL removes
the task and appends its `error` in one step, so that however many do it, it happens once, and one of them learns that
it was the one; its connections count as detached. Then the worker is removed. A worker that finds its lease gone, for
whatever reason, has been ended by others (or Redis lost its data): it drops all it has, without a word to the log,
closes its connections so that their clients come back, and begins again under a new name. Appends of tasks that are
not its own any more are refused. Where nobody could renew, it was Redis that was away: all leases are prolonged.

Eras. Redis may come back with less than it had. Renewals are counted, and an append names the one before, a read what
was read before: whoever finds that Redis is behind begins a new era, in which none of the earlier sessions exists. So a
client is told 404, and never gets other text under a number that it knows. (To a worker that was ended and has not
noticed, what others did looks the same: so only one whose lease is in force may.)
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files

import attrs

ROOT = "{inference}"

_FOR_ALL = ("admit", "bury", "dismiss", "enter", "held", "hold", "prolong", "spend")
_FOR_A_SESSION = ("append", "attach", "detach", "fail", "give", "register", "take", "unregister")


@attrs.frozen
class Script:
    """What it takes (``ARGV``) and returns stands at the top of its file."""

    name: str
    text: str
    sha: str


@cache
def script(name: str) -> Script:
    """The file ``lua/NAME.lua``, with what its kind has in common before it."""
    text = _read(name)
    if name in _FOR_ALL:
        text = _read("_all") + text
    elif name in _FOR_A_SESSION:
        text = _read("_session") + text
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _read(name: str) -> str:
    return (files(__package__) / "lua" / f"{name}.lua").read_text(encoding="utf-8")


def key_for_all(era: str) -> str:
    return f"{ROOT}:{era}"


def session_key(era: str, session_id: str) -> str:
    return f"inference:{era}:{{{session_id}}}"


def inbox_key(era: str, worker: str) -> str:
    return f"inference:{era}:{{w:{worker}}}:inbox"
