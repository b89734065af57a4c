"""Makes the README's picture of the playground: ``python -m tests.screenshot docs/playground.png``.

The page is the real one in a real Chromium, the server too; the model is the scripted one of the tests.
``--dark``, ``--phone`` and ``--welcome`` give other views.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import trio

from tests import answers
from tests.browser import Page, chromium, open_page
from tests.harness import open_server, settings
from tests.upstream import Request, Upstream, open_upstream

QUESTION = "We need 17 sails at 1,284.50 each, 12 % off. What do we pay?"
EXPRESSION = "17 * 1284.50 * (1 - 0.12)"
PIECES = (
    "You pay **19,216.12** in all",
    ", and save 2,620.38:\n\n",
    "| | each | 17 sails |\n|---|---|---|\n",
    "| list price | 1,284.50 | 21,836.50 |\n",
    "| less 12 % | 1,130.36 | 19,216.12 |\n\n",
    "The calculator of *this page* was asked ",
    "for the sum; ",
    "the same in Python:\n\n",
    "```python\ntotal = 17 * 1284.50 * (1 - 0.12)\n```\n",
)
CUT_AFTER = 5


def answer(request: Request) -> answers.Answer:
    tokens = answers.usage(answers.tokens(206, 83))
    if request.messages[-1]["role"] != "tool":
        thoughts = answers.reasoning("A discount on a product of two numbers. ", "The calculator gets it right.")
        call = answers.tool_call(0, "call_1", "calculate", {"expression": EXPRESSION})
        return (thoughts, call, answers.finish("tool_calls"), tokens, answers.done())
    steps = [(answers.text(piece), answers.sleep(0.05)) for piece in PIECES]
    cut = answers.pause("cut")
    return (*steps[:CUT_AFTER], cut, *steps[CUT_AFTER:], answers.finish(), tokens, answers.done())


async def take(page: Page, url: str, upstream: Upstream, options: argparse.Namespace) -> None:
    width, height, scale = (390, 844, 2) if options.phone else (1360, 900, 1)
    await page.resize(width, height, scale, dark=options.dark)
    await page.open(url)
    await page.wait_for("document.querySelector('#line').dataset.status === 'open'")
    if not options.welcome:
        if not options.phone:
            await page.click("#show-frames")
        await page.click("#message")
        await page.type(QUESTION)
        await page.press("Enter")
        await page.wait_for_text("less 12 %")
        await page.click("#cut")
        upstream.gate("cut").set()
        await page.wait_for_text("completed")
        await page.wait_for_text("Cut the line" if not options.phone else "", "#cut")
    await page.evaluate("Promise.all(document.getAnimations().map((animation) => animation.finished.catch(() => {})))")
    await trio.Path(options.path).write_bytes(await page.screenshot())


async def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
        async with (
            open_upstream(answer) as upstream,
            open_server(settings(upstream.base_url)) as server,
            open_page(browser) as page,
        ):
            await take(page, server.url, upstream, options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("tests.screenshot", description="Make a picture of the playground.")
    parser.add_argument("path")
    for name in ("dark", "phone", "welcome"):
        parser.add_argument(f"--{name}", action="store_true")
    trio.run(main, parser.parse_args())
