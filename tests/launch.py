"""The server's commands as a test needs them: ``python -m tests.launch '{"write_timeout": 1}' serve --port 0``.

The first argument has limits of connections in place of the defaults of `ServerLimits`; ``serve`` is ours, anything
else is for Hypercorn's command. On SIGUSR1 the process writes how many Trio tasks it has, a line on standard output,
and an idle thread ends at once: Trio would keep it for ten seconds, and a test could not tell it from one left behind.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial

import hypercorn.__main__
import trio
import trio._core._thread_cache

from inference_trio import __main__ as ours
from inference_trio import server
from inference_trio.hypercorn_fixes import ServerLimits


def report_tasks(*_: object) -> None:
    os.write(1, f"{trio.lowlevel.current_statistics().tasks_living}\n".encode())


limits, *arguments = sys.argv[1:]
# Also in a worker, for which Hypercorn's command starts this module anew.
server.ServerLimits = partial(ServerLimits, **json.loads(limits))  # type: ignore[misc, assignment]
trio._core._thread_cache.IDLE_TIMEOUT = 0.01

if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, report_tasks)
    sys.exit(ours.main(arguments) if arguments[0] == "serve" else hypercorn.__main__.main(arguments))
