"""The command line: ``inference-trio``, or ``python -m inference_trio``.

What a command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

from . import __version__

CHAT_ENDS = """\
Ctrl-C cancels an answer, Ctrl-D ends the chat. The token, where the server asks for one, is taken from the
environment variable CHAT_TOKEN. What is piped in is asked as one message.

exit status:
  0    answered, or the chat was ended
  1    no answer: the generation failed
  2    wrong arguments, or there is no embedded model to start
  3    the server cannot be reached, or refuses the token
  130  cancelled
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "chat":
        from .terminal import run as chat

        return chat(options)
    from .process import leave

    bind = f"[{options.host}]:{options.port}" if ":" in options.host else f"{options.host}:{options.port}"
    if options.workers > 1:
        from .workers import run as run_workers

        return leave(run_workers(bind, options.workers))
    from .serving import run

    return leave(run(bind))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="inference-trio", description="An LLM inference session server.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    formatter = argparse.RawDescriptionHelpFormatter
    _add_serve(
        commands.add_parser(
            "serve", help="start the server", description=_SERVE, epilog=SERVE_ENDS, formatter_class=formatter
        )
    )
    _add_chat(
        commands.add_parser(
            "chat", help="talk to a model", description=_CHAT, epilog=CHAT_ENDS, formatter_class=formatter
        )
    )
    return parser


_SERVE = "Start the server. It is configured by environment variables, also read from .env."
SERVE_ENDS = """\
exit status:
  0    stopped by SIGTERM or SIGINT
  1    the address cannot be had, or a worker did not start
  2    wrong arguments or settings
"""
_CHAT = "Talk to a model, by way of a server; without a URL, of one on the embedded model that is started for it."


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", default=8000, type=_port, help="port; 0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--workers",
        default=1,
        type=_number_of_workers,
        metavar="N",
        help="processes that share the port, and their sessions in Redis; one that ends is replaced (default: 1)",
    )


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url", nargs="?", type=_url, metavar="URL", help="address of the server, like http://127.0.0.1:8000"
    )
    parser.add_argument(
        "--tool",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="a function that the model may call, here; may be given several times",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    parser.add_argument("--model", help="another model than the server's own")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="the most tokens of an answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 to 2")
    parser.add_argument("--json", action="store_true", help="write what happens as JSON, one object a line")


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise ValueError
    return port


def _number_of_workers(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,2}", text):
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 999, got {text!r}")
    return int(text)


def _url(text: str) -> str:
    try:
        is_url = re.match(r"(http|ws)s?://[^/]", text) and urlsplit(text).port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise argparse.ArgumentTypeError(f"expected something like http://127.0.0.1:8000, got {text!r}")
    return text


if __name__ == "__main__":
    sys.exit(main())
