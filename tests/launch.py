"""The server's commands as a test needs them: ``python -m tests.launch '{"write_timeout": 1}' serve --port 0``.

The first argument has limits in place of the defaults of `ServerLimits`. It may have ``grace``, in place of
`process.GRACE`, and ``files``, the most that may be open. With ``stuck`` the model is one whose threads react to
nothing; with ``broken`` what serves the metrics fails. ``serve`` is ours, anything else is for Hypercorn's command.

On SIGUSR1 the process writes which Trio tasks it has, a line on standard output; on SIGUSR2 how many blocks of
memory Python has in use, once it has collected its garbage and given back to the system what is free. Idle threads
end at once: Trio would keep them for ten seconds, and a test could not tell them from those that were left behind.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import sys
import threading
from collections import Counter
from contextlib import nullcontext
from functools import partial

import hypercorn.__main__
import trio
import trio._core._thread_cache

from inference_trio import __main__ as ours
from inference_trio import process, server
from inference_trio.hypercorn_fixes import ServerLimits


def report_tasks(*_: object) -> None:
    names: Counter[str] = Counter()
    tasks = [trio.lowlevel.current_root_task()]
    while tasks:
        if task := tasks.pop():
            names[task.name] += 1
            tasks += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    os.write(1, f"{json.dumps(names)}\n".encode())


def report_memory(*_: object) -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    os.write(1, f"{sys.getallocatedblocks()}\n".encode())


class StuckModel:
    async def stream(self, *_: object) -> None:
        await trio.to_thread.run_sync(threading.Event().wait)


async def fail(_: object) -> None:
    raise FileNotFoundError


options, *arguments = sys.argv[1:]
limits = json.loads(options)
# All of this also in a worker, for which Hypercorn's command starts this module anew.
process.GRACE = limits.pop("grace", process.GRACE)
process.FLUSHING_TIME = 10.0  # the last line of the log is to be there also where the machine is busy
if files := limits.pop("files", None):
    resource.setrlimit(resource.RLIMIT_NOFILE, (files // 2, files))
if limits.pop("stuck", False):
    server.open_model = lambda settings: nullcontext(StuckModel())
if limits.pop("broken", False):
    server.Metrics.serve = fail  # type: ignore[method-assign]
server.ServerLimits = partial(ServerLimits, **limits)  # type: ignore[misc, assignment]
trio._core._thread_cache.IDLE_TIMEOUT = 0.01

if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, report_tasks)
    signal.signal(signal.SIGUSR2, report_memory)
    sys.exit(ours.main(arguments) if arguments[0] == "serve" else hypercorn.__main__.main(arguments))
