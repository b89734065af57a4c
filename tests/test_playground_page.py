"""The playground in a real Chromium, used as people use it: with the mouse and the keyboard."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import attrs
import pytest
import trio

from inference_trio.model import build_model
from inference_trio.variables import Secret
from tests import answers
from tests.browser import CHROMIUM, Page, chromium, open_page
from tests.harness import PATIENCE, Server, open_server, settings
from tests.javascript import without
from tests.upstream import Request, Upstream, open_upstream

HELLO = answers.reply("Hel", "lo")
TOKEN = "token-of-the-tests"
FAST_CLOCK = "const wait = setTimeout; window.setTimeout = (run, time, ...rest) => wait(run, time / 100, ...rest);"
"""Scissors hold the line cut for seconds, which nobody wants to wait for."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not CHROMIUM:
        without("Chromium")
    with chromium(tmp_path_factory.mktemp("profile")) as address:
        yield address


@attrs.frozen
class Bench:
    page: Page
    upstream: Upstream
    server: Server

    async def ask(self, text: str) -> None:
        await self.page.click("#message")
        await self.page.type(text)
        await self.page.press("Enter")

    async def answered(self, text: str) -> None:
        """Asks, and waits for the end of the answer."""
        count = await self.page.count(".meta .status")
        await self.ask(text)
        await self.page.wait_for(f"document.querySelectorAll('.meta .status').length > {count}")


@asynccontextmanager
async def opened(browser: str, *script: Any, clock: str = "", **changes: Any) -> AsyncIterator[Bench]:
    """The page of a server whose upstream answers as scripted; asserts at the end that nothing went wrong in it."""
    async with (
        open_upstream(*script) as upstream,
        aclosing(build_model(settings(upstream.base_url))) as model,
        open_server(settings(upstream.base_url, **changes), model) as server,
        open_page(browser) as page,
    ):
        await page.resize(1280, 800)
        await page.call("Page.addScriptToEvaluateOnNewDocument", source=clock)
        await page.open(server.url)
        if not changes.get("auth_tokens"):
            await page.wait_for("document.querySelector('#line').dataset.status === 'open'")
        yield Bench(page, upstream, server)
        assert page.troubles == []
        assert page.dialogs == []
        assert [url for url in page.requests if server.url.partition("//")[2] not in url] == []


async def test_an_answer_streams_in_as_markdown_and_says_what_it_took(browser: str) -> None:
    script = [
        answers.reasoning("Hm, hm."),
        answers.pause("1"),
        answers.text("Some **bo"),
        answers.pause("2"),
        answers.reply("ld** words"),
    ]
    async with opened(browser, script) as it:
        await it.ask("hi")
        await it.upstream.wait_for_requests(1)
        await it.page.wait_for_text("hi", ".question")
        await it.page.wait_for_text("Reasoning", ".reasoning")
        assert await it.page.evaluate("document.querySelector('.reasoning').open") is False
        it.upstream.gate("1").set()
        await it.page.wait_for_text("Some **bo", ".prose")
        assert await it.page.count(".answer[aria-busy]") == 1
        assert await it.page.evaluate("document.querySelector('#stop').hidden") is False
        it.upstream.gate("2").set()
        await it.page.wait_for_text("completed", ".meta")
        assert await it.page.text(".prose strong") == "bold"
        meta = await it.page.text(".meta")
        assert "first token" in meta
        assert "7 in, 3 out" in meta
        assert await it.page.count(".answer[aria-busy]") == 0
        assert "Some **bold** words" in await it.page.evaluate("document.querySelector('#spoken').textContent")
        assert await it.page.evaluate("document.querySelector('#welcome').hidden") is True


async def test_a_tool_runs_in_the_page_and_is_shown_as_a_card(browser: str) -> None:
    call = answers.calls(answers.tool_call(0, "c1", "calculate", {"expression": "(17.5 * 23) - 2^7"}))
    async with opened(browser, call, HELLO) as it:
        await it.answered("calculate")
        assert await it.page.text(".call .name") == "calculate"
        assert await it.page.text(".call .state") == "answered"
        card = await it.page.text(".call .body")
        assert '"expression":"(17.5 * 23) - 2^7"' in card
        assert '"value":274.5' in card
        first, second = it.upstream.requests
        assert [tool["function"]["name"] for tool in first.tools] == ["get_time", "calculate"]
        assert json.loads(second.messages[-1]["content"])["value"] == 274.5


@pytest.mark.parametrize(
    ("button", "typed", "content"),
    [("[type=submit]", '{"sky": "clear"}', '{"sky":"clear"}'), ("[type=button]", "no sight", "Error: no sight")],
)
async def test_a_call_of_the_users_own_tool_is_answered_by_hand(
    button: str, typed: str, content: str, browser: str
) -> None:
    call = answers.calls(answers.tool_call(0, "c1", "get_weather", {"city": "Paris"}))
    async with opened(browser, call, HELLO) as it:
        await it.page.click(".chip:last-child")
        await it.page.wait_for("document.querySelector('#parameters').hidden === false")
        await it.ask("weather?")
        await it.page.wait_for_text("waits for you", ".call")
        await it.page.wait_for("document.activeElement.matches('.by-hand textarea')")
        await it.page.type(typed)
        await it.page.click(f".by-hand {button}")
        await it.page.wait_for_text("completed", ".meta")
        assert it.upstream.requests[1].messages[-1]["content"] == content
        declared = it.upstream.requests[0].tools[-1]["function"]
        assert (declared["name"], declared["parameters"]["required"]) == ("get_weather", ["city"])


async def test_a_schema_that_is_none_is_said_before_it_is_sent(browser: str) -> None:
    async with opened(browser, HELLO) as it:
        await it.page.click(".chip:last-child")
        await it.page.evaluate("document.querySelector('[name=own_parameters]').select()")
        await it.page.type("{")
        await it.page.wait_for_text("Not a tool yet", "#own-error")
        await it.ask("weather?")
        assert await it.page.count(".question") == 0
        assert it.upstream.requests == []


@pytest.mark.parametrize("way", ["Escape", "button"])
async def test_stopping_ends_it_at_the_provider(way: str, browser: str) -> None:
    async with opened(browser, [answers.text("Hel"), answers.hang()]) as it:
        await it.ask("hi")
        await it.page.wait_for_text("Hel", ".prose")
        await (it.page.press("Escape") if way == "Escape" else it.page.click("#stop"))
        await it.page.wait_for_text("cancelled", ".meta")
        assert await it.page.text(".prose") == "Hel"
        with trio.fail_after(PATIENCE):
            await it.upstream.requests[0].closed.wait()
        await it.page.wait_for("document.querySelector('#stop').hidden")


async def test_a_cut_line_resumes_where_it_was(browser: str) -> None:
    """Also in the midst of a list, which stays one."""
    first, second = answers.text("1. one\n2. tw"), answers.text("o\n3. th")
    script = [first, answers.pause("cut"), second, answers.pause("end"), answers.reply("ree")]
    async with opened(browser, script, clock=FAST_CLOCK) as it:
        await it.page.click("#show-frames")
        await it.ask("count")
        await it.page.wait_for_text("tw", ".prose")
        await it.page.click("#cut")
        await it.page.wait_for_text("The line", ".answer .event")
        it.upstream.gate("cut").set()
        await it.page.wait_for_text("nothing lost", ".answer .event")
        it.upstream.gate("end").set()
        await it.page.wait_for_text("completed", ".meta")
        assert (await it.page.text(".prose ol")).split() == ["one", "two", "three"]
        await it.page.wait_for_text("?after=", "#frame-list")
        assert len(it.upstream.requests) == 1


async def test_a_reload_in_the_midst_of_an_answer_goes_on(browser: str) -> None:
    """What was answered is shown again, a call that was answered is not run again, and the conversation goes on."""
    call = answers.calls(answers.tool_call(0, "c1", "calculate", {"expression": "1 + 1"}))
    running = [answers.text("**Hel"), answers.pause("reloaded"), answers.reply("lo**")]
    async with opened(browser, answers.reply("One"), call, running, HELLO) as it:
        await it.answered("first")
        await it.ask("second")
        await it.page.wait_for_text("**Hel", ".turn:last-child .prose")
        await it.page.open(it.server.url)
        await it.page.wait_for_text("**Hel", ".turn:last-child .prose")
        assert await it.page.text(".turn:first-child .prose") == "One"
        assert "7 in, 3 out" in await it.page.text(".turn:first-child .meta")
        assert await it.page.evaluate("document.querySelector('#welcome').hidden") is True
        it.upstream.gate("reloaded").set()
        await it.page.wait_for_text("completed", ".turn:last-child .meta")
        assert await it.page.text(".turn:last-child strong") == "Hello"
        assert '"value":2' in await it.page.text(".call .body")
        assert await it.page.text(".call .state") == "answered"
        await it.page.open(it.server.url)
        await it.page.wait_for_text("Hello", ".turn:last-child .prose")
        await it.answered("third")
        contents = [message["content"] for message in it.upstream.requests[-1].messages if message["role"] == "user"]
        assert contents == ["first", "second", "third"]
        assert len(it.upstream.requests) == 4


async def test_a_new_conversation_is_new_after_a_reload_too(browser: str) -> None:
    async with opened(browser, HELLO) as it:
        await it.answered("hi")
        await it.page.click("#new")
        await it.page.wait_for("document.querySelector('#line').dataset.status === 'open'")
        await it.page.open(it.server.url)
        await it.page.wait_for("document.querySelector('#line').dataset.status === 'open'")
        assert await it.page.count(".turn") == 0
        assert await it.page.evaluate("document.querySelector('#welcome').hidden") is False


async def test_the_frames_are_those_on_the_wire(browser: str) -> None:
    async with opened(browser, HELLO) as it:
        await it.answered("hi")
        await it.page.click("#show-frames")
        await it.page.wait_for_text("completed", "#frame-list")
        methods = await it.page.evaluate(
            "[...document.querySelectorAll('.frame .method')].map((part) => part.textContent)"
        )
        assert [name for name in methods if name != "text_chunk"] == [
            "connected",
            "resumed",
            "generate",
            "result",
            "end",
        ]
        await it.page.click(".frame:last-child summary")
        await it.page.wait_for_text('"final_text": "Hello"', ".frame:last-child pre")


async def test_several_answers_come_at_once_and_one_of_them_is_kept(browser: str) -> None:
    def answer(request: Request) -> answers.Answer:
        number = len(it.upstream.requests)
        return (answers.pause("all") if number < 4 else (), answers.reply(f"answer {request.body['seed']}"))

    async with opened(browser, answer) as it:
        await it.page.click("#show-parameters")
        await it.page.evaluate("document.querySelector('[name=answers]').value = '3'")
        await it.page.click("[name=seed]")
        await it.page.type("5")
        await it.ask("hi")
        with trio.fail_after(PATIENCE):
            await it.upstream.wait_for_requests(3)
        it.upstream.gate("all").set()
        await it.page.wait_for("document.querySelectorAll('.meta .status').length === 3")
        assert sorted(request.body["seed"] for request in it.upstream.requests) == [5, 6, 7]
        await it.page.click(".answer:nth-child(2) input")
        await it.page.evaluate("document.querySelector('[name=answers]').value = '1'")
        await it.answered("more")
        contents = [message["content"] for message in it.upstream.requests[3].messages]
        assert contents == ["hi", "answer 6", "more"]


async def test_the_parameters_are_sent_as_they_are_set(browser: str) -> None:
    fields = {
        "temperature": "0.3",
        "top_p": "0.5",
        "max_new_tokens": "9",
        "seed": "4",
        "stop": "END",
        "system": "Be kind.",
    }
    async with opened(browser, HELLO, HELLO) as it:
        await it.answered("plain")
        assert not {"temperature", "top_p", "max_tokens", "seed", "stop", "tool_choice"} & set(
            it.upstream.requests[0].body
        )
        await it.page.click("#show-parameters")
        for name, value in fields.items():
            await it.page.click(f"[name={name}]")
            await it.page.type(value)
        await it.page.evaluate("document.querySelector('[name=tool_choice]').value = 'none'")
        await it.answered("set")
        body = it.upstream.requests[1].body
        assert (body["temperature"], body["top_p"], body["max_tokens"], body["seed"]) == (0.3, 0.5, 9, 4)
        assert (body["stop"], body["tool_choice"]) == (["END"], "none")
        assert body["messages"][0] == {"role": "system", "content": "Be kind."}


async def test_a_server_with_tokens_is_given_one_by_a_form(browser: str) -> None:
    async with opened(browser, HELLO, auth_tokens={"tests": Secret(TOKEN)}) as it:
        asked = "document.querySelector('#token-dialog').open && document.activeElement.id === 'token'"
        await it.page.wait_for(asked)
        await it.page.press("Escape")
        await it.page.wait_for(asked)
        await it.page.type("not the token at all")
        await it.page.press("Enter")
        await it.page.wait_for_text("does not know this token", "#token-error")
        it.page.troubles.clear()  # the console has the 401
        await it.page.wait_for(asked)
        await it.page.evaluate("document.querySelector('#token').select()")
        await it.page.type(TOKEN)
        await it.page.press("Enter")
        await it.page.wait_for("document.querySelector('#line').dataset.status === 'open'")
        await it.answered("hi")
        assert await it.page.text(".prose") == "Hello"
        assert [url for url in it.page.requests if TOKEN in url] == []


async def test_the_keyboard_is_enough(browser: str) -> None:
    async with opened(browser, HELLO) as it:
        await it.page.wait_for("document.activeElement.id === 'message'")
        await it.page.type("one")
        await it.page.press("Enter", shift=True)
        await it.page.type("two")
        assert await it.page.count(".question") == 0
        await it.page.press("Enter")
        await it.page.wait_for_text("completed", ".meta")
        assert it.upstream.requests[0].messages[-1]["content"] == "one\ntwo"
        await it.page.evaluate("document.activeElement.blur()")
        seen: list[str] = []
        while not (seen.count("message") and "skip" in seen[: seen.index("message")]) and len(seen) < 40:
            await it.page.press("Tab")
            seen.append(await it.page.evaluate("document.activeElement.id || document.activeElement.className"))
        first = seen.index("skip")
        assert seen[first : first + 6] == ["skip", "cut", "theme", "new", "show-parameters", "show-frames"]
        assert seen[-1] == "message"


async def test_a_failure_is_said_where_the_answer_would_be(browser: str) -> None:
    refusal = answers.status(400, {"error": {"message": "no such <b>model</b>"}})
    async with opened(browser, refusal) as it:
        await it.answered("hi")
        failure = await it.page.text(".failure")
        assert "no such <b>model</b>" in failure
        assert "-32000" in failure
        assert await it.page.count(".failure[role=alert]") == 1


async def test_where_there_is_no_session_yet_enter_tries_again_and_the_text_is_kept(browser: str) -> None:
    refusing = (
        'Response.json({ error: { code: -32001, message: "Too many", data: { retryable: true } } }, { status: 429 })'
    )
    async with opened(browser, HELLO) as it:
        await it.page.evaluate(
            f"window.whole = fetch; window.count = 0; window.fetch = async () => (count++, {refusing})"
        )
        await it.page.click("#new")
        await it.page.wait_for_text("Too many", "#turns > .failure")
        await it.ask("hi")
        await it.page.wait_for("count === 2 && document.querySelector('#turns > .failure') !== null")
        assert await it.page.count("#turns > .failure") == 1
        assert await it.page.evaluate("document.querySelector('#message').value") == "hi"
        await it.page.evaluate("window.fetch = whole")
        await it.page.press("Enter")
        await it.page.press("Enter")
        await it.page.wait_for_text("completed", ".meta")
        assert await it.page.count("#turns > .failure") == 0
        assert await it.page.count(".question") == len(it.upstream.requests) == 1


async def test_a_conversation_that_goes_on_elsewhere_says_so(browser: str) -> None:
    async with opened(browser, [answers.text("Hel"), answers.hang()], HELLO) as it:
        await it.ask("hi")
        await it.page.wait_for_text("Hel", ".prose")
        (address,) = [url for url in it.page.requests if url.startswith("ws")]
        async with it.server.connect(address.partition("/ws/")[2].partition("?")[0], "?after=0"):
            await it.page.wait_for_text("goes on in another window", ".failure")
        await it.page.click("#new")
        await it.page.wait_for("document.querySelector('#line').dataset.status === 'open'")
        assert await it.page.count(".question") == 0
        await it.answered("hi")
        assert await it.page.text(".prose") == "Hello"


async def test_the_embedded_model_is_named_with_the_way_to_a_better_one(browser: str) -> None:
    calls = answers.calls(answers.tool_call(0, "c1", "get_time", {"time_zone": "Europe/Berlin"}))
    async with opened(browser, calls, HELLO, provider="local", model_name="SmolLM2") as it:
        assert "SmolLM2 · embedded" in await it.page.text("#model")
        await it.page.click(".notice summary")
        await it.page.wait_for_text("LLM_MODEL_NAME", ".notice")
        for name in ("API_KEY_ENV_VAR", "LLM_BASE_URL"):
            assert name in await it.page.text(".notice")
        await it.page.click(".example:nth-child(2)")
        await it.page.wait_for_text("completed", ".meta")
        body = it.upstream.requests[0].body
        assert body["logit_bias"] == {"<tool_call>": 4}
        assert len(body["messages"]) == 9, "two worked cases and the question"


@pytest.mark.parametrize(("width", "height"), [(390, 844), (320, 568), (768, 1024), (1600, 1000)])
async def test_nothing_is_wider_than_the_screen(width: int, height: int, browser: str) -> None:
    wide = answers.reply("`" + "x" * 400 + "` and " + "y" * 300, "\n\n| a | b |\n|-|-|\n| " + "z" * 200 + " | 1 |")
    async with opened(browser, wide) as it:
        await it.page.resize(width, height)
        await it.answered("w" * 200)
        assert await it.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert await it.page.evaluate(
            "(({ scrollWidth, clientWidth }) => scrollWidth <= clientWidth)(document.querySelector('#scroll'))"
        )
        for panel in ("parameters", "frames"):
            await it.page.click(f"#show-{panel}")
            await it.page.wait_for(f"document.querySelector('#{panel}').hidden === false")
            box = await it.page.evaluate(
                f"(() => {{ const box = document.querySelector('#{panel}').getBoundingClientRect();"
                f" return [box.left, box.right]; }})()"
            )
            assert box[0] >= 0
            assert box[1] <= width
            await it.page.click(f"[data-closes={panel}]")


async def test_text_from_right_to_left_runs_so(browser: str) -> None:
    said = answers.reply(
        "> \u0645\u0631\u062d\u0628\u0627\n\n- \u0642\u0627\u0626\u0645\u0629\n\nleft\n\n```\ncode\n```\n"
    )
    async with opened(browser, said) as it:
        await it.answered("\u0645\u0631\u062d\u0628\u0627")
        for selector, direction in {"blockquote p": "rtl", "ul": "rtl", ".prose > p": "ltr", "pre": "ltr"}.items():
            style = f"getComputedStyle(document.querySelector('.answer {selector}')).direction"
            assert await it.page.evaluate(style) == direction, selector
        assert await it.page.evaluate("getComputedStyle(document.querySelector('.question')).direction") == "rtl"


async def test_light_and_dark_follow_the_system_and_the_button(browser: str) -> None:
    async with opened(browser) as it:
        colour = "getComputedStyle(document.body).backgroundColor"
        light = await it.page.evaluate(colour)
        await it.page.resize(1280, 800, dark=True)
        dark = await it.page.evaluate(colour)
        assert light != dark
        await it.page.click("#theme")
        assert await it.page.evaluate(colour) == light
        await it.page.click("#theme")
        assert await it.page.evaluate(colour) == dark


# What a model writes

HOSTILE = """<script>window.pwned = 1</script>
<img src=x onerror="window.pwned = 2"><svg onload="window.pwned = 3"><animate onbegin="window.pwned=4" attributeName=x>
<iframe srcdoc="<script>parent.pwned = 5</script>"></iframe><iframe src="http://evil.test/frame"></iframe>
<style>@import url(http://evil.test/style.css); * { background: url(http://evil.test/style.png) }</style>
<link rel=stylesheet href=http://evil.test/link.css><link rel=prefetch href=http://evil.test/prefetch>
<meta http-equiv=refresh content="0;url=http://evil.test/refresh"><base href="http://evil.test/">
<form action="http://evil.test/form"><input autofocus onfocus="window.pwned = 6"><button>go</button></form>
<video src="http://evil.test/v.mp4" poster="http://evil.test/p.png" autoplay onerror="window.pwned = 7"></video>
<object data="http://evil.test/o"></object><embed src="http://evil.test/e"><math><mtext><script>window.pwned=8</script>

![remote](http://evil.test/image.png) ![data](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9ImFsZXJ0KDEpIi8+)
![x](x" onerror="window.pwned = 9) [![in a link](http://evil.test/in.png)](http://evil.test/out)

[a](javascript:window.pwned=10) [b](JaVaScRiPt:window.pwned=11) [c](&#106;avascript:window.pwned=12)
[d](java\tscript:window.pwned=13) [e](\x01javascript:window.pwned=14)
[f](vbscript:x) [g](data:text/html,<script>1</script>)
[h](//evil.test/protocol) [i](/create_session) [j](#message) [k](file:///etc/passwd) [l](blob:http://evil.test/x)
[m](http://evil.test/" onclick="window.pwned=15) [n](http://evil.test 'title" onmouseover="window.pwned=16')
<javascript:window.pwned=17> <http://evil.test/auto> [o][ref] http://evil.test/bare www.evil.test mail@evil.test

[ref]: javascript:window.pwned=18 "x"

| <img src=x onerror=window.pwned=19> | [p](javascript:window.pwned=20) |
|:-:|--:|
| <script>window.pwned=21</script> | ![q](http://evil.test/cell.png) |

- [x] <input onfocus=window.pwned=22 autofocus>
1. > ### <b onmouseover=window.pwned=23>hover</b>

```"><script>window.pwned=24</script> onload=alert(1)
</code></pre><script>window.pwned=25</script><img src=http://evil.test/code.png>
```
`<img src=x onerror=window.pwned=26>` &lt;script&gt;window.pwned=27&lt;/script&gt;
<!-- <script> --> <![CDATA[<script>]]>
**<img src=x onerror=window.pwned=28>** ~~<a href=javascript:window.pwned=29>x</a>~~
<a href="http://evil.test/a" ping="http://evil.test/ping">y</a>
"""
DEEP = ("> " * 400, "- " * 400, "[" * 3000, "*" * 3000, "_a " * 3000, "![" * 1500, "<" * 3000, "`" * 3000, "|" * 3000)
ALLOWED = ["A", "BLOCKQUOTE", "BR", "BUTTON", "CODE", "DEL", "DIV", "EM", "H3", "H4", "H5", "H6", "HR", "INPUT", "LI"]
ALLOWED += ["OL", "P", "PRE", "SPAN", "STRONG", "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL", "svg", "use"]
ATTRIBUTES = [
    "aria-hidden",
    "checked",
    "class",
    "dir",
    "disabled",
    "href",
    "rel",
    "start",
    "tabindex",
    "target",
    "title",
    "type",
]


async def test_what_a_model_writes_never_runs_loads_or_navigates(browser: str) -> None:
    script = [
        answers.reasoning(HOSTILE),
        answers.split(200, answers.text(*HOSTILE.splitlines(keepends=True))),
        answers.tool_call(0, "c1", "calculate", {"expression": HOSTILE}),
        answers.finish("tool_calls"),
        answers.done(),
    ]
    failure = answers.status(400, {"error": {"message": HOSTILE}})
    async with opened(browser, script, failure) as it:
        await it.page.click("#show-frames")
        where = await it.page.evaluate("location.href")
        await it.answered(HOSTILE)
        tags = await it.page.evaluate(
            "[...new Set([...document.querySelectorAll('.prose *')].map((element) => element.tagName))]"
        )
        assert set(tags) <= set(ALLOWED)
        names = await it.page.evaluate(
            "[...document.querySelectorAll('.turns .prose *')].flatMap((element) => element.getAttributeNames())"
        )
        assert set(names) <= set(ATTRIBUTES)
        links = await it.page.evaluate(
            "[...document.querySelectorAll('.prose a')].map((link) => [link.protocol, link.target, link.rel])"
        )
        assert {link[0] for link in links} == {"http:", "mailto:"}
        assert {(link[1], link[2]) for link in links} == {("_blank", "noopener noreferrer")}
        assert (
            await it.page.count(".turns :is(img, script, iframe, style, link, form:not(.by-hand), video, object)") == 0
        )
        assert await it.page.evaluate("[window.pwned ?? null, location.href, document.title]") == [
            None,
            where,
            "inference_trio playground",
        ]


async def test_what_takes_a_parser_long_takes_the_page_not_long(browser: str) -> None:
    async with opened(browser, *(answers.reply(text) for text in DEEP)) as it:
        for count in range(1, len(DEEP) + 1):
            await it.answered("go on")
            assert await it.page.count(".meta .status[data-status=completed]") == count


async def test_the_policy_of_the_page_would_hold_if_all_else_failed(browser: str) -> None:
    async with opened(browser) as it:
        await it.page.evaluate(
            "(() => { const hole = document.createElement('div'); document.body.append(hole);"
            ' hole.innerHTML = \'<img src=x: onerror="window.pwned = 1"><img src="http://127.0.0.1:9/x.png">\'; })()'
        )
        await it.page.evaluate(
            "(() => { const script = document.createElement('script'); script.textContent = 'window.pwned = 2';"
            " document.body.append(script); })()"
        )
        refused = await it.page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')")
        assert refused == "refused"
        assert await it.page.evaluate("window.pwned ?? null") is None
        assert len([trouble for trouble in it.page.troubles if "Content Security Policy" in trouble]) >= 3
        it.page.troubles.clear()
        it.page.requests.clear()


# Markdown as it streams

DOCUMENT = """# Title

A paragraph with **bold**, *em*, `code`, ~~del~~, [a link](https://example.org/) & an entity &lt;.
It goes on here
# Heading right after

Setext
------

- one
- two

  with a paragraph
- three
    - nested

1. first
2. second

#hashtag and 1.5
***bold and em***
> quote
> goes on
lazy

| a | b |
|---|--:|
| 1 | 2 |

```js
const a = `b`;

# not a heading
```
    indented code

---
- [x] done
- [ ] open

last line without end"""

MARKDOWN = """
const {{ StreamingMarkdown }} = await import("/web/markdown.js");
const source = {source};
const shown = (pieces) => {{
  const target = document.createElement("div");
  const markdown = new StreamingMarkdown(target);
  for (const piece of pieces) {{ markdown.append(piece); markdown.flush(); }}
  return target.innerHTML;
}};
"""


async def test_markdown_in_pieces_looks_as_in_one_piece(browser: str) -> None:
    """At every point, with what has come so far: a block is done only when nothing can change it any more."""
    source = MARKDOWN.format(source=json.dumps(DOCUMENT))
    async with opened(browser) as it:
        different = await it.page.evaluate(
            f"(async () => {{ {source}"
            " const different = []; const target = document.createElement('div');"
            " const markdown = new StreamingMarkdown(target);"
            " for (let at = 1; at <= source.length; at++) {"
            "   markdown.append(source[at - 1]); markdown.flush();"
            "   if (target.innerHTML !== shown([source.slice(0, at)])) different.push(source.slice(0, at));"
            " } return different; })()"
        )
        assert different == []


async def test_blocks_that_are_done_are_not_made_again(browser: str) -> None:
    source = MARKDOWN.format(source=json.dumps(DOCUMENT))
    async with opened(browser) as it:
        made = await it.page.evaluate(
            f"(async () => {{ {source}"
            " const target = document.createElement('div'); const markdown = new StreamingMarkdown(target);"
            " const made = new Set();"
            " for (let turn = 0; turn < 100; turn++) {"
            "   for (const line of source.split(/(?<=\\n)/)) {"
            "     markdown.append(line); markdown.flush(); for (const node of target.children) made.add(node);"
            "   }"
            "   markdown.append('\\n\\n');"
            " } return [made.size, target.children.length]; })()"
        )
        assert made[1] > 1000
        assert made[0] < 4 * made[1]
