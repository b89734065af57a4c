"""`client.js` in Node, against the whole server over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from inference_trio.variables import Secret
from tests import answers
from tests.harness import Server, open_server, settings
from tests.javascript import NODE, Script, node, node_modules, without
from tests.proxy import Direction, Fate, How, open_proxy
from tests.upstream import Request, Upstream, open_upstream


@pytest.fixture(autouse=True)
def needs_node() -> None:
    if not NODE:
        without("Node")


LOOK = """
const seen = [];
const look = {
  name: "look", description: "Looks.", parameters: { type: "object", properties: { at: { type: "string" } } },
  run({ at }) { seen.push(at); return { saw: at.toUpperCase() }; },
};
"""
CALL = answers.calls(answers.tool_call(0, "c1", "look", {"at": "sea"}))
HELLO = answers.reply("Hel", "lo")
TOKEN = "token-of-the-tests"


@attrs.frozen
class Bench:
    script: Script
    upstream: Upstream
    server: Server

    async def hear(self) -> Any:
        return await self.script.hear()

    async def say(self, value: Any) -> None:
        await self.script.say(value)


@asynccontextmanager
async def running(source: str, folder: Path, *script: Any, **changes: Any) -> AsyncIterator[Bench]:
    """The script in Node beside a server, whose upstream answers as scripted."""
    async with (
        open_upstream(*script) as upstream,
        open_server(settings(upstream.base_url, **changes)) as server,
        node(source, server.url, folder) as process,
    ):
        yield Bench(process, upstream, server)


async def said(source: str, folder: Path, *script: Any, **changes: Any) -> Any:
    """The one thing that the script says."""
    async with running(source, folder, *script, **changes) as it:
        return await it.hear()


# Generations


async def test_a_generation_is_iterated_as_it_comes(tmp_path: Path) -> None:
    source = """
    const session = await createSession(url);
    const generation = session.generate("hi", { temperature: 0.5, system: "Be brief." });
    for await (const event of generation) say(event);
    say([generation.text, generation.taskId, await generation.result]);
    session.close();
    """
    reasoned = [
        answers.reasoning("Hm"),
        answers.pause("go on"),
        answers.text("Hel"),
        answers.pause("end"),
        answers.reply("lo"),
    ]
    async with running(source, tmp_path, reasoned) as it:
        request = await it.upstream.wait_for_requests(1)
        assert request.body["temperature"] == 0.5
        assert [message["role"] for message in request.messages] == ["system", "user"]
        assert await it.hear() == {"type": "reasoning", "text": "Hm"}
        it.upstream.gate("go on").set()
        assert await it.hear() == {"type": "text", "text": "Hel"}
        it.upstream.gate("end").set()
        assert await it.hear() == {"type": "text", "text": "lo"}
        end = await it.hear()
        text, task_id, result = await it.hear()
        assert (text, end) == ("Hello", {"type": "end", **result})
        assert result == {
            "taskId": task_id,
            "text": "Hello",
            "status": "completed",
            "finishReason": "stop",
            "usage": {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10},
            "messages": result["messages"],
        }
        assert result["messages"][-1]["content"] == "Hello"


async def test_the_next_generation_goes_on_from_the_one_before(tmp_path: Path) -> None:
    source = """
    const session = await createSession(url);
    await session.generate("one").result;
    await session.generate("two", { system: "Be brief." }).result;
    await session.generate("aside", { history: [] }).result;
    session.close();
    say(session.history);
    """
    async with running(source, tmp_path, lambda request: answers.reply(f"to {request.messages[-1]['content']}")) as it:
        history = await it.hear()
        turns = [("user", "one"), ("assistant", "to one"), ("user", "two"), ("assistant", "to two")]
        assert [(message["role"], message["content"]) for message in history] == turns
        assert [len(request.messages) for request in it.upstream.requests] == [1, 4, 1]


async def test_several_generations_run_at_a_time(tmp_path: Path) -> None:
    source = """
    const session = await createSession(url);
    const results = [1, 2, 3].map((n) => session.generate(`${n}`).result);
    say((await Promise.all(results)).map((result) => result.text));
    session.close();
    """

    def answer(request: Request) -> answers.Answer:
        return (answers.pause(request.messages[-1]["content"]), answers.reply(request.messages[-1]["content"]))

    async with running(source, tmp_path, answer) as it:
        for count, name in enumerate("321", start=1):
            await it.upstream.wait_for_requests(count)
            it.upstream.gate(name).set()
        assert await it.hear() == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ("{ temperatur: 1 }", -32602, "temperatur"),
        ("{ seed: 1n }", "invalid", "BigInt"),
        ("{ tool_choice: 'required' }", -32602, "tool_choice"),
    ],
)
async def test_a_wrong_parameter_is_an_error_that_names_it(options: str, code: Any, named: str, tmp_path: Path) -> None:
    source = f"""
    const session = await createSession(url);
    const generation = session.generate("hi", {options});
    say([await failing(generation.result), await failing(all(generation))]);
    session.close();
    """
    result, iteration = await said(source, tmp_path)
    assert result == iteration
    assert result["code"] == code
    assert named in result["message"]


@pytest.mark.parametrize("message", ['""', "[]"])
async def test_an_empty_message_is_refused_before_it_is_sent(message: str, tmp_path: Path) -> None:
    """Also with a history, from which a model would just go on, a small one without end."""
    source = f"""
    const session = await createSession(url);
    await session.ask("hi");
    say(await failing(session.ask({message})));
    session.close();
    """
    async with running(source, tmp_path, HELLO) as it:
        error = await it.hear()
        assert (error["code"], len(it.upstream.requests)) == ("invalid", 1)
        assert "not empty" in error["message"]


@pytest.mark.parametrize("none", ["", "undefined", "null"])
async def test_without_a_message_it_goes_on_from_the_history_as_it_is(none: str, tmp_path: Path) -> None:
    source = f"""
    const session = await createSession(url);
    session.history.push({{ role: "user", content: "one" }});
    await session.ask({none});
    say([(await session.ask("two")).text, session.history.map((message) => message.content)]);
    session.close();
    """
    async with running(source, tmp_path, HELLO, HELLO) as it:
        assert await it.hear() == ["Hello", ["one", "Hello", "two", "Hello"]]
        assert [len(request.messages) for request in it.upstream.requests] == [1, 3]


async def test_two_readers_share_the_events_and_both_end(tmp_path: Path) -> None:
    source = """
    const session = await createSession(url);
    const generation = session.generate("hi");
    const both = await Promise.all([all(generation), all(generation)]);
    say([both.flat().map((event) => event.text ?? "").join(""), await all(generation)]);
    session.close();
    """
    async with running(source, tmp_path, [answers.pause("both wait"), answers.reply("Hello")]) as it:
        await it.upstream.wait_for_requests(1)
        it.upstream.gate("both wait").set()
        text, again = await it.hear()
        assert (text, again) == ("HelloHello", []), "of the text and of the end"


async def test_the_providers_failure_has_the_text_so_far(tmp_path: Path) -> None:
    source = """
    const session = await createSession(url);
    say(await failing(session.generate("hi").result));
    say(await failing(session.generate("hi").result));
    session.close();
    """
    refusal = answers.status(400, {"error": {"message": "no such thing"}})
    async with running(source, tmp_path, [answers.text("Hel"), answers.drop()], refusal) as it:
        broken = await it.hear()
        assert (broken["code"], broken["data"]["partial_text"]) == (-32006, "Hel")
        refused = await it.hear()
        assert (refused["code"], refused["data"]["status"], refused["retryable"]) == (-32000, 400, False)


# Tools


async def test_a_function_is_called_and_its_result_goes_to_the_model(tmp_path: Path) -> None:
    source = (
        LOOK
        + """
    const session = await createSession(url, { tools: [look] });
    const events = await all(session.generate("hi"));
    say(events.filter((event) => event.type.startsWith("tool")));
    say(seen);
    session.close();
    """
    )
    async with running(source, tmp_path, CALL, HELLO) as it:
        call, result = await it.hear()
        assert call == {"type": "toolCall", "id": "c1", "name": "look", "arguments": {"at": "sea"}, "timeout": 300}
        assert result == {"type": "toolResult", "id": "c1", "name": "look", "result": {"saw": "SEA"}}
        assert await it.hear() == ["sea"]
        assert it.upstream.requests[0].tools[0]["function"]["description"] == "Looks."
        assert it.upstream.requests[1].messages[-1]["content"] == '{"saw":"SEA"}'


@pytest.mark.parametrize(
    ("body", "content"),
    [
        ("throw new Error('no sight')", "no sight"),
        ("return Promise.reject('by night')", "by night"),
        ("throw Object.create(null)", "no reason was given"),
        ("throw undefined", "no reason was given"),
        ("throw new RangeError()", "RangeError"),
        ("throw new Error('no \\ud800 sight')", "no \ufffd sight"),
        ("throw Object.assign(new Error(), { message: { why: 1 } })", "[object Object]"),
        ("return { toJSON() { throw Object.create(null); } }", "no reason was given"),
        ("return 10n", "BigInt"),
        ("return () => 1", "function"),
        ("return { at: look }", "at"),
        ("return undefined", "null"),
        ("return '\\ud800'", "cannot be sent"),
        ("return JSON.parse('['.repeat(200) + ']'.repeat(200))", "cannot be sent"),
    ],
)
async def test_whatever_a_function_does_the_model_gets_an_answer(body: str, content: str, tmp_path: Path) -> None:
    source = f"""
    const look = {{ name: "look", async run() {{ {body} }} }};
    const session = await createSession(url, {{ tools: [look] }});
    say((await session.generate("hi").result).text);
    session.close();
    """
    async with running(source, tmp_path, CALL, HELLO) as it:
        assert await it.hear() == "Hello"
        assert content in it.upstream.requests[1].messages[-1]["content"]


async def test_a_declared_tool_is_answered_through_its_event_and_once(tmp_path: Path) -> None:
    source = """
    const session = await createSession(url);
    const generation = session.generate("hi", { tools: [{ name: "look" }] });
    for await (const event of generation) {
      if (event.type === "toolCall") { event.respond({ found: 1 }); event.fail("too late"); event.respond(2); }
      if (event.type === "toolResult") say(event);
    }
    session.close();
    """
    async with running(source, tmp_path, CALL, HELLO) as it:
        assert (await it.hear())["result"] == {"found": 1}
        assert (await it.upstream.wait_for_requests(2)).messages[-1]["content"] == '{"found":1}'


@pytest.mark.parametrize(
    ("reason", "content"),
    [
        ("new Error('no sight')", "Error: no sight"),
        ("", "Error: It failed, and no reason was given"),
        ("{ toString() { throw 1; } }", "Error: It failed, and no reason was given"),
        ("'no \\udc00 sight'", "Error: no \ufffd sight"),
        ("404", "Error: 404"),
        ("'x'.repeat(5_000_000)", "Error: " + "x" * 10_000),
        ("'\u20ac'.repeat(5_000)", "Error: The tool's answer cannot be sent"),  # three bytes each, more than are taken
    ],
)
async def test_a_call_fails_for_whatever_reason_is_given(reason: str, content: str, tmp_path: Path) -> None:
    source = f"""
    const session = await createSession(url, fast);
    const generation = session.generate("hi", {{ tools: [{{ name: "look" }}] }});
    for await (const event of generation) if (event.type === "toolCall") event.fail({reason});
    say(generation.text);
    session.close();
    """
    async with running(source, tmp_path, CALL, HELLO, max_message_bytes=12_000) as it:
        assert await it.hear() == "Hello"
        assert it.upstream.requests[1].messages[-1]["content"] == content


async def test_a_tool_is_told_when_nobody_waits_for_it(tmp_path: Path) -> None:
    source = """
    const stopped = Promise.withResolvers?.() ?? (() => { let resolve; const promise = new Promise((r) => resolve = r);
      return { promise, resolve }; })();
    const look = { name: "look", run: (_, { signal }) => new Promise(() => {
      signal.addEventListener("abort", stopped.resolve);
      generation.cancel();
    }) };
    const session = await createSession(url, { tools: [look] });
    const generation = session.generate("hi");
    await stopped.promise;
    say((await generation.result).status);
    session.close();
    """
    assert await said(source, tmp_path, CALL) == "cancelled"


# Cancelling


@pytest.mark.parametrize("way", ["await generation.cancel()", "controller.abort()", "break"])
async def test_cancelling_ends_it_at_the_provider_and_keeps_the_text(way: str, tmp_path: Path) -> None:
    source = f"""
    const session = await createSession(url);
    const controller = new AbortController();
    const generation = session.generate("hi", {{ signal: controller.signal }});
    for await (const event of generation) if (event.type === "text") {{ {way}; }}
    const result = await generation.result;
    say([result.status, result.text, session.history.length]);
    session.close();
    """
    async with running(source, tmp_path, [answers.text("Hel"), answers.hang()]) as it:
        request = await it.upstream.wait_for_requests(1)
        assert await it.hear() == ["cancelled", "Hel", 2]
        await request.closed.wait()


async def test_what_is_aborted_before_it_starts_is_never_asked_for(tmp_path: Path) -> None:
    source = """
    const session = await createSession(url);
    const early = session.generate("early", { signal: AbortSignal.abort() });
    const soon = session.generate("soon");
    soon.cancel();
    say([(await early.result).status, (await all(soon)).map((event) => event.type)]);
    say((await session.generate("hi").result).text);
    session.close();
    """
    async with running(source, tmp_path, HELLO) as it:
        assert await it.hear() == ["cancelled", ["end"]]
        assert await it.hear() == "Hello"
        assert len(it.upstream.requests) == 1


async def test_closing_the_session_cancels_what_runs(tmp_path: Path) -> None:
    source = """
    const session = await createSession(url);
    const generation = session.generate("hi");
    await hear();
    session.close();
    say([await failing(generation.result), await failing(session.generate("more").result)]);
    """
    async with running(source, tmp_path, [answers.hang()]) as it:
        request = await it.upstream.wait_for_requests(1)
        await it.say("go")
        assert [error["code"] for error in await it.hear()] == ["closed", "closed"]
        await request.closed.wait()


# Broken connections

CUTTING = """
// A WebSocket whose line breaks at the frame with this number, counted in both directions and over all connections.
// The frame itself is lost or is the last one that gets through.
const cutting = (at, isLost) => class Cutting {
  static count = 0;
  isDead = false;
  constructor(...where) { this.inner = new WebSocket(...where); }
  addEventListener(type, listener) {
    if (type === "close") this.closed = listener;
    this.inner.addEventListener(type, (event) => {
      if (this.isDead) return;
      if (type === "message") this.pass(() => listener(event)); else listener(event);
    });
  }
  send(text) { if (!this.isDead) this.pass(() => this.inner.send(text)); }
  pass(action) {
    const isCut = ++Cutting.count === at;
    if (!isCut || !isLost) action();
    if (!isCut) return;
    this.isDead = true;
    this.inner.close();
    queueMicrotask(() => this.closed({ code: 1006 }));
  }
  close() { this.inner.close(); }
};
"""


@pytest.mark.parametrize("is_lost", [True, False], ids=["the frame is lost", "the frame gets through"])
async def test_a_cut_at_any_frame_changes_nothing(is_lost: bool, tmp_path: Path) -> None:
    """Nothing is lost and nothing doubled: neither text nor a call of the tool nor a request to the provider."""
    source = (
        LOOK
        + CUTTING
        + f"""
    for (let at = 1, wasCut = true; wasCut; at++) {{
      const Socket = cutting(at, {str(is_lost).lower()});
      const session = await createSession(url, {{ tools: [look], WebSocket: Socket, ...fast }});
      const generation = session.generate("hi");
      const events = await all(generation);
      wasCut = Socket.count >= at;
      const text = events.map((event) => event.type === "text" ? event.text : "").join("");
      say([at, wasCut, text, await generation.result, seen.splice(0), session.history]);
      session.close();
    }}
    say(null);
    """
    )

    def answer(request: Request) -> answers.Answer:
        if request.messages[-1]["role"] == "tool":
            return HELLO
        return (answers.text("Wait"), answers.text(" …"), CALL)

    async with running(source, tmp_path, answer) as it:
        runs = []
        while (run := await it.hear()) is not None:
            runs.append(run)
        for at, _, text, result, seen, history in runs:
            assert (text, result["text"], result["status"]) == ("Wait …Hello", "Wait …Hello", "completed"), at
            assert seen == ["sea"], at
            assert [message["role"] for message in history] == ["user", "assistant", "tool", "assistant"], at
        assert len(runs) > 8
        assert len(it.upstream.requests) == 2 * len(runs)


@pytest.mark.parametrize("is_lost", [True, False], ids=["the frame is lost", "the frame gets through"])
async def test_a_cut_at_any_frame_while_cancelling_still_cancels(is_lost: bool, tmp_path: Path) -> None:
    source = (
        CUTTING
        + f"""
    for (let at = 1, wasCut = true; wasCut; at++) {{
      const Socket = cutting(at, {str(is_lost).lower()});
      const session = await createSession(url, {{ WebSocket: Socket, ...fast }});
      const generation = session.generate("hi");
      for await (const event of generation) if (event.type === "text") generation.cancel();
      wasCut = Socket.count >= at;
      say((await generation.result).status);
      session.close();
    }}
    say(null);
    """
    )
    async with running(source, tmp_path, lambda _: (answers.text("Hel"), answers.hang())) as it:
        runs = 0
        while (status := await it.hear()) is not None:
            assert status == "cancelled"
            runs += 1
        assert runs > 4
        assert len(it.upstream.requests) == runs
        for request in it.upstream.requests:
            await request.closed.wait()


DIALLING = """
// One generation at each address that the test names. Only the WebSocket goes there, the rest to the server.
const direct = (target, init) => fetch(String(target).replace(/127.0.0.1:[0-9]+/, new URL(url).host), init);
for (let address; (address = await hear()) !== null; ) {
  const session = await createSession(address, { tools: [look], fetch: direct, pingEvery: 200, ...fast });
  const generation = session.generate("hi");
  const events = await all(generation);
  const text = events.map((event) => event.type === "text" ? event.text : "").join("");
  say([text, (await generation.result).text, seen.splice(0), session.history.length]);
  session.close();
}
"""
CUTS: list[tuple[Direction, int]] = [*(("down", count) for count in range(9)), *(("up", count) for count in range(4))]


@pytest.mark.parametrize("how", ["closed", "reset", "half-open"])
async def test_a_line_that_breaks_in_any_way_at_any_frame_changes_nothing(how: How, tmp_path: Path) -> None:
    """Also one on which nothing passes any more although both ends have it open."""

    def answer(request: Request) -> answers.Answer:
        return HELLO if request.messages[-1]["role"] == "tool" else (answers.text("Wait"), CALL)

    async with running(LOOK + DIALLING, tmp_path, answer) as it:
        port = int(it.server.url.rpartition(":")[2])
        resumed = 0
        for direction, frames in CUTS:
            fate = Fate(direction, frames, how=how)
            async with open_proxy(port, partial(iter, [fate])) as proxy:
                await it.say(f"http://127.0.0.1:{proxy.port}")
                assert await it.hear() == ["WaitHello", "WaitHello", ["sea"], 4], fate
                resumed += len(proxy.lines) > 1  # a slow answer to a ping may cost one more
        assert resumed >= 8
        assert len(it.upstream.requests) == 2 * len(CUTS)
        await it.say(None)


async def test_the_break_and_the_resumption_are_events(tmp_path: Path) -> None:
    source = """
    const statuses = [];
    const session = await createSession(url, { ...fast, onStatus: (status) => statuses.push(status) });
    const types = [];
    for await (const event of session.generate("hi")) {
      types.push(event.type === "resumed" ? [event.type, event.gap] : event.type);
      if (types.length === 1) { session.reconnect(); say("cut"); }
    }
    session.close();
    say([types, statuses]);
    """
    async with running(source, tmp_path, [answers.text("Hel"), answers.pause("go on"), answers.reply("lo")]) as it:
        assert await it.hear() == "cut"
        it.upstream.gate("go on").set()
        types, statuses = await it.hear()
        assert [kind for kind in types if kind != "text"] == ["disconnected", ["resumed", False], "end"]
        assert statuses[:5] == ["connecting", "open", "waiting", "connecting", "open"]


async def test_a_listener_that_throws_does_not_end_the_connection(tmp_path: Path) -> None:
    source = """
    const thrown = [];
    process.on("uncaughtException", (error) => thrown.push(error.message));
    const session = await createSession(url, { onStatus: (status) => { throw new Error(status); } });
    say([(await session.ask("hi")).text, thrown]);
    session.close();
    """
    assert await said(source, tmp_path, HELLO) == ["Hello", ["connecting", "open"]]


LOSING = """
// A WebSocket that loses frames of these methods while it is told to, so that the server must have forgotten them.
class Losing extends WebSocket {
  static lost = [];
  addEventListener(type, listener) {
    super.addEventListener(type, type !== "message" ? listener : (event) => {
      const { method } = JSON.parse(event.data);
      if (Losing.lost.includes(method ?? "answer")) say("lost"); else listener(event);
    });
  }
}
"""


async def test_a_gap_is_announced_and_the_result_is_whole(tmp_path: Path) -> None:
    source = (
        LOSING
        + """
    const session = await createSession(url, { WebSocket: Losing, pingEvery: 600_000, ...fast });
    Losing.lost = ["text_chunk"];
    const generation = session.generate("hi");
    await hear();
    Losing.lost = [];
    session.reconnect();
    for await (const event of generation) if (event.type === "resumed") say(event.gap);
    say([generation.text.length, (await generation.result).text.length]);
    session.close();
    """
    )
    chunks = [(answers.pause(str(number)), answers.text("x" * 400)) for number in range(20)]
    script = [*chunks, answers.pause("end"), answers.reply()]
    async with running(source, tmp_path, script, outbox_bytes=4096) as it:
        for number in range(20):
            it.upstream.gate(str(number)).set()
            assert await it.hear() == "lost"
        await it.say("reconnect")
        assert await it.hear() is True
        it.upstream.gate("end").set()
        heard, whole = await it.hear()
        assert heard < whole == 8000


async def test_a_call_that_fell_into_a_gap_is_answered_as_lost(tmp_path: Path) -> None:
    source = (
        LOSING
        + LOOK
        + """
    const session = await createSession(url, { WebSocket: Losing, pingEvery: 600_000, tools: [look], ...fast });
    const other = session.generate("other", { history: [] });
    while (other.taskId === null) await new Promise((resolve) => setTimeout(resolve));
    Losing.lost = ["function_call_request", "text_chunk"];
    const generation = session.generate("hi", { history: [] });
    await hear();
    Losing.lost = [];
    session.reconnect();
    say([(await generation.result).text, seen]);
    session.close();
    """
    )
    big = [answers.pause("call"), *(answers.text("x" * 1500), answers.pause("big")), answers.text("y" * 1500)]

    def answer(request: Request) -> answers.Answer:
        if request.messages[0]["content"] == "other":
            return (*big, answers.hang())
        return HELLO if request.messages[-1]["role"] == "tool" else CALL

    async with running(source, tmp_path, answer, outbox_bytes=2048) as it:
        assert await it.hear() == "lost", "the call"
        for gate in ("call", "big"):
            it.upstream.gate(gate).set()
            assert await it.hear() == "lost", "text that pushes the call out"
        await it.say("reconnect")
        assert await it.hear() == ["Hello", []]
        last = next(request for request in it.upstream.requests if request.messages[-1]["role"] == "tool")
        assert "did not get this call" in last.messages[-1]["content"]


async def test_what_a_gap_leaves_uncertain_fails_and_is_not_run_twice(tmp_path: Path) -> None:
    """A generation whose answer and whose end both fell into it."""
    source = (
        LOSING
        + """
    const session = await createSession(url, { WebSocket: Losing, pingEvery: 600_000, ...fast });
    const other = session.generate("other", { history: [] });
    while (other.taskId === null) await new Promise((resolve) => setTimeout(resolve));
    Losing.lost = ["answer", "text_chunk", "end"];
    const generation = session.generate("hi", { history: [] });
    await hear();
    Losing.lost = [];
    session.reconnect();
    say(await failing(generation.result));
    session.close();
    """
    )
    big = [answers.pause("big 1"), answers.text("x" * 1500), answers.pause("big 2"), answers.text("y" * 1500)]

    def answer(request: Request) -> answers.Answer:
        return (*big, answers.hang()) if request.messages[0]["content"] == "other" else answers.reply()

    async with running(source, tmp_path, answer, outbox_bytes=2048) as it:
        assert [await it.hear(), await it.hear()] == ["lost", "lost"], "the answer and the end"
        for gate in ("big 1", "big 2"):
            it.upstream.gate(gate).set()
            assert await it.hear() == "lost"
        await it.say("reconnect")
        error = await it.hear()
        assert (error["code"], error["retryable"]) == ("connection_lost", True)
        assert len(it.upstream.requests) == 2


async def test_a_session_that_was_taken_over_does_not_fight_for_it(tmp_path: Path) -> None:
    source = """
    const session = await createSession(url);
    const generation = session.generate("hi");
    say(session.id);
    say([await failing(generation.result), await failing(session.generate("more").result)]);
    """
    async with running(source, tmp_path, [answers.hang()]) as it:
        session_id = await it.hear()
        await it.upstream.wait_for_requests(1)
        async with it.server.connect(session_id, "?after=0") as other:
            assert [error["code"] for error in await it.hear()] == ["taken_over", "taken_over"]
            assert not other.socket.closed


async def test_a_message_that_is_too_big_fails_by_itself(tmp_path: Path) -> None:
    source = """
    const look = { name: "look", run: () => "x".repeat(9000) };
    const session = await createSession(url, { tools: [look], ...fast });
    say([await failing(session.generate("x".repeat(9000)).result), (await session.generate("hi").result).text]);
    session.close();
    """
    async with running(source, tmp_path, CALL, HELLO, max_message_bytes=8000) as it:
        error, text = await it.hear()
        assert (error["code"], text) == ("too_big", "Hello")
        assert "9" in it.upstream.requests[1].messages[-1]["content"]


# Servers that go and come


async def test_another_server_in_its_place_gets_a_new_session(tmp_path: Path) -> None:
    source = """
    let at = new URL(url).host;
    const moved = (target) => String(target).replace(/127.0.0.1:[0-9]+/, at);
    class Moved extends WebSocket { constructor(target, protocols) { super(moved(target), protocols); } }
    const options = { WebSocket: Moved, fetch: (target, init) => fetch(moved(target), init), ...fast };
    const session = await createSession(url, options);
    say((await session.generate("one").result).text);
    const running = session.generate("two");
    at = await hear();
    session.reconnect();
    const more = session.generate("three");
    say(await failing(running.result));
    say((await more.result).text);
    session.close();
    """
    async with running(source, tmp_path, HELLO, [answers.hang()], HELLO) as it:
        assert await it.hear() == "Hello"
        await it.upstream.wait_for_requests(2)
        async with open_server(settings(it.upstream.base_url)) as other:
            await it.say(other.url.removeprefix("http://"))
            error = await it.hear()
            assert (error["code"], error["retryable"]) == ("session_gone", True)
            assert await it.hear() == "Hello"
            assert [message["content"] for message in it.upstream.requests[2].messages] == ["one", "Hello", "three"]


async def test_a_server_that_stops_is_given_up_after_a_time(tmp_path: Path) -> None:
    source = """
    const statuses = [];
    const session = await createSession(url, { ...fast, giveUpAfter: 1, onStatus: (status) => statuses.push(status) });
    await session.generate("one").result;
    const generation = session.generate("two");
    say((await generation.result).status);
    say(await failing(session.generate("three").result));
    session.close();
    say(statuses);
    """
    async with running(source, tmp_path, HELLO, [answers.text("Hel"), answers.hang()]) as it:
        await it.upstream.wait_for_requests(2)
        it.server.shutdown.set()
        assert await it.hear() == "cancelled", "by the server, which says so before it closes"
        assert (await it.hear())["code"] in ("connection_lost", -32005)
        assert {"draining", "open"} <= set(await it.hear())


OTHERS = """
import http from "node:http";
const close = { connection: "close" };  // a connection that is kept would keep Node for three seconds
const serving = async (status, body) => {
  const server = http.createServer((_, response) => response.writeHead(status, close).end(body));
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  server.unref();
  return [`http://127.0.0.1:${server.address().port}`, server];
};
const nobody = async () => {
  const [where, server] = await serving();
  await new Promise((resolve) => server.close(resolve));
  return [where];
};
"""


@pytest.mark.parametrize(
    ("where", "found", "retryable"),
    [
        ("await nobody()", "ECONNREFUSED", True),
        ("await serving(200, '{}')", "no sessions", False),
        ("await serving(404, '<p>')", "404", False),
        ("await serving(405, '{\"detail\": 1}')", "405", False),
        ("await serving(502, '')", "502", True),
        ("[`${url}/elsewhere/`]", "404", False),
        ("[`${url}/web/client.js`]", "405", False),
        ("[url.replace('http', 'https')]", "SSL", True),
    ],
)
async def test_where_no_server_is_that_is_said_at_once(where: str, found: str, retryable: bool, tmp_path: Path) -> None:
    source = (
        OTHERS
        + f"""
    const [where] = {where};
    say([where, await failing(createSession(where))]);
    """
    )
    where, error = await said(source, tmp_path)
    assert (error["code"], error["retryable"]) == ("unreachable", retryable)
    assert f"no inference server at {where}" in error["message"]
    assert found in error["message"]


@pytest.mark.parametrize("url", ["", "localhost:8000", "nonsense", "ftp://127.0.0.1"])
async def test_what_is_no_url_is_said_to_be_none(url: str, tmp_path: Path) -> None:
    error = await said(f"say(await failing(createSession({url!r})));", tmp_path)
    assert error["code"] == "invalid"
    assert "Expected a URL like http" in error["message"]


async def test_the_schemes_of_websockets_are_taken_too(tmp_path: Path) -> None:
    source = """
    const session = await createSession(url.replace("http", "ws"));
    say((await session.ask("hi")).text);
    session.close();
    """
    assert await said(source, tmp_path, HELLO) == "Hello"


# Going on in another process, as a page does when it is loaded anew


async def test_a_session_goes_on_elsewhere_with_what_runs(tmp_path: Path) -> None:
    source = (
        LOOK
        + """
    const first = await createSession(url, { tools: [look] });
    await first.ask("one");
    const began = first.generate("two")[Symbol.asyncIterator]();
    while ((await began.next()).value.text !== "Hel");
    const state = JSON.parse(JSON.stringify(first.state));
    const session = await resumeSession(url, state, { tools: [look] });
    const [generation] = session.resumed;
    say([session.id === first.id, session.history.length, seen]);
    const events = await all(generation);
    say([events.map((event) => event.text ?? event.name ?? event.gap), seen]);
    say([(await generation.result).text, session.history.map((message) => message.role)]);
    say((await session.ask("three")).text);
    session.close();
    """
    )
    script = [answers.text("Hel"), answers.pause("resumed"), answers.reply("lo")]
    async with running(source, tmp_path, answers.reply("1"), CALL, script, answers.reply("3")) as it:
        assert await it.hear() == [True, 2, ["sea"]]
        it.upstream.gate("resumed").set()
        shown, seen = await it.hear()
        assert shown[:2] == [False, "look"]
        assert "".join(shown[2:-1]) == shown[-1] == "Hello"
        assert seen == ["sea"], "a call that was answered is not run again"
        roles = ["user", "assistant", "user", "assistant", "tool", "assistant"]
        assert await it.hear() == ["Hello", roles]
        assert await it.hear() == "3"
        assert len(it.upstream.requests) == 4


async def test_a_call_that_waited_is_run_where_the_session_goes_on(tmp_path: Path) -> None:
    source = """
    const look = { name: "look", run: () => new Promise(() => {}) };
    const first = await createSession(url, { tools: [look] });
    for await (const event of first.generate("hi")) {
      if (event.type !== "toolCall") continue;
      const session = await resumeSession(url, first.state, { tools: [{ ...look, run: () => "seen" }] });
      say((await session.resumed[0].result).text);
      say(session.history.length);
      session.close();
      break;
    }
    """
    async with running(source, tmp_path, CALL, HELLO) as it:
        assert await it.hear() == "Hello"
        assert await it.hear() == 4
        assert it.upstream.requests[1].messages[-1]["content"] == "seen"


async def test_a_session_that_is_gone_goes_on_as_a_new_one_with_the_history(tmp_path: Path) -> None:
    source = """
    const first = await createSession(url);
    await first.ask("one");
    const state = { ...first.state, id: "nonesuch", running: [{ id: "task", turn: [] }] };
    first.close();
    const session = await resumeSession(url, state);
    say(await failing(session.resumed[0].result));
    say([(await session.ask("two")).text, session.history.length]);
    session.close();
    """
    async with running(source, tmp_path, HELLO, HELLO) as it:
        assert (await it.hear())["code"] == "session_gone"
        assert await it.hear() == ["Hello", 4]


# Tokens


async def test_with_a_token_it_connects_and_resumes_by_tickets(tmp_path: Path) -> None:
    source = f"""
    say(await failing(createSession(url)));
    say(await failing(createSession(url, {{ token: "another one, and wrong" }})));
    const session = await createSession(url, {{ token: "{TOKEN}", ...fast }});
    const generation = session.generate("hi");
    for await (const event of generation) if (event.type === "text") break;
    session.reconnect();
    say((await generation.result).status);
    say((await session.generate("hi").result).text);
    session.close();
    """
    tokens = {"tests": Secret(TOKEN)}
    async with running(source, tmp_path, [answers.text("Hel"), answers.hang()], HELLO, auth_tokens=tokens) as it:
        assert [(await it.hear())["code"] for _ in range(2)] == ["unauthorized", "unauthorized"]
        assert await it.hear() == "cancelled"
        assert await it.hear() == "Hello"


# Other classes of WebSocket


async def test_it_takes_the_class_of_the_package_ws(tmp_path: Path) -> None:
    modules = await trio.to_thread.run_sync(node_modules) or without("npm")
    source = f"""
    import {{ WebSocket as Ws }} from {str(modules / "ws" / "wrapper.mjs")!r};
    delete globalThis.WebSocket;
    say(await failing(createSession(url)));
    const session = await createSession(url, {{ WebSocket: Ws, ...fast }});
    say((await session.generate("hi").result).text);
    session.reconnect();
    say((await session.generate("hi").result).text);
    session.close();
    """
    async with running(source, tmp_path, HELLO, HELLO) as it:
        message = (await it.hear())["message"]
        assert "`WebSocket`" in message
        assert "--experimental-websocket" in message
        assert [await it.hear(), await it.hear()] == ["Hello", "Hello"]
