"""The Python client, against the whole server over real sockets."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trustme

from inference_trio import errors, protocol
from inference_trio.client import (
    BrokenStreamError,
    ClosedError,
    DefectError,
    Generation,
    InferenceError,
    OverloadedError,
    Parameters,
    ReasoningChunk,
    RequestError,
    Result,
    TextChunk,
    TooBigError,
    ToolCall,
    ToolResult,
    UnauthorizedError,
    UnreachableError,
    Usage,
    connect,
)
from inference_trio.client.errors import from_wire
from inference_trio.variables import Secret
from tests import answers
from tests.client_bench import CALL, HANGS, HELLO, Look, events_of, running, text_of
from tests.harness import PATIENCE, open_server, settings
from tests.line import open_line
from tests.upstream import Request, open_upstream

TOKEN = "token-of-the-tests"

# Generations


async def test_a_generation_is_iterated_as_it_comes() -> None:
    slow = [answers.text("Hel"), answers.pause("go on"), answers.reply("lo")]
    async with running(slow) as it, it.session.generate("hi", temperature=0.5, system="Be brief.") as task:
        assert await anext(task) == TextChunk("Hel")
        assert task.text == "Hel"
        it.upstream.gate("go on").set()
        assert [event async for event in task] == [TextChunk("lo")]
        assert task.result == await task.finish()
        assert (task.result.final_text, task.result.status) == ("Hello", "completed")
        assert task.result.usage == Usage(7, 3, 10)
        assert task.result.task_id == task.task_id
        request = it.upstream.requests[0]
        assert [message["role"] for message in request.messages] == ["system", "user"]
        assert request.body["temperature"] == 0.5


async def test_the_next_generation_goes_on_from_the_one_before() -> None:
    async with running(lambda request: answers.reply(f"to {request.messages[-1]['content']}")) as it:
        assert str(await it.session.ask("one")) == "to one"
        await it.session.ask("two", system="Be brief.")
        await it.session.ask("aside", history=[])
        turns = [("user", "one"), ("assistant", "to one"), ("user", "two"), ("assistant", "to two")]
        assert [(message["role"], message["content"]) for message in it.session.history] == turns
        assert [len(request.messages) for request in it.upstream.requests] == [1, 4, 1]


async def test_a_function_is_called_and_its_result_goes_to_the_model() -> None:
    look = Look()
    async with running(CALL, HELLO, tools=[look.tool]) as it:
        events, result = await events_of(it.session)
        assert isinstance(events[0], ToolCall)
        assert (events[0].id, events[0].name, events[0].arguments) == ("c1", "look", {"at": "sea"})
        assert events[1] == ToolResult("c1", "look", result={"saw": "SEA"})
        assert text_of(events) == result.final_text == "Hello"
        assert it.upstream.requests[1].messages[-1]["content"] == '{"saw":"SEA"}'
        assert look.seen == ["sea"]


async def test_several_generations_run_at_a_time() -> None:
    def answer(request: Request) -> Any:
        name = request.messages[-1]["content"]
        return [answers.text(name), answers.pause(name), answers.reply("!")]

    async with running(answer) as it, it.session.generate("one") as one, it.session.generate("two") as two:
        assert [await anext(one), await anext(two)] == [TextChunk("one"), TextChunk("two")]
        it.upstream.gate("two").set()
        assert (await two.finish()).final_text == "two!"
        it.upstream.gate("one").set()
        assert (await one.finish()).final_text == "one!"
        assert [message["content"] for message in it.session.history] == ["two", "two!", "one", "one!"]


async def test_text_that_nobody_reads_becomes_one_event() -> None:
    parts = [answers.reasoning("Hm", "m"), answers.reply("a", "b", "c")]
    async with running(parts) as it, it.session.generate("hi") as task:
        await task.finish()
        assert [event async for event in task] == [ReasoningChunk("Hmm"), TextChunk("abc")]


def test_the_parameters_are_those_of_the_protocol() -> None:
    own = {"history", "message", "tools"}
    assert set(Parameters.__annotations__) == set(protocol.Generate.__struct_fields__) - own


# Cancelling


async def test_leaving_the_block_cancels_the_generation() -> None:
    async with running(HANGS) as it:
        async with it.session.generate("hi") as task:
            async for _ in task:
                break
        await it.upstream.requests[0].closed.wait()
        assert (task.result.status, task.result.final_text) == ("cancelled", "Hel")
        assert [message["content"] for message in it.session.history] == ["hi", "Hel"]


async def test_a_cancel_scope_around_it_cancels_the_generation() -> None:
    async with running(HANGS) as it:
        with trio.CancelScope() as scope:
            async with it.session.generate("hi") as task:
                async for _ in task:
                    scope.cancel()
        assert scope.cancelled_caught
        assert (task.result.status, task.result.final_text) == ("cancelled", "Hel")
        assert [message["content"] for message in it.session.history] == ["hi", "Hel"]
        await it.upstream.requests[0].closed.wait()


async def test_an_end_that_comes_after_the_block_was_cancelled_changes_nothing() -> None:
    async with running(HANGS, HELLO) as it:
        with trio.CancelScope() as scope:
            async with it.session.generate("hi") as task:
                await anext(task)
                scope.cancel()
                await task.finish()
        left = task.result
        it.session.history.clear()
        await it.session.ask("more")  # its end comes after that of the first
        assert [message["content"] for message in it.session.history] == ["more", "Hello"]
        assert task.result is left


async def test_what_was_cancelled_without_a_connection_is_in_the_history_at_once() -> None:
    async with running(HANGS) as it:
        with trio.CancelScope() as scope:
            async with it.session.generate("hi") as task:
                await anext(task)
                it.line.target = "http://127.0.0.1:1"
                it.line.cut()
                scope.cancel()
        assert [message["content"] for message in it.session.history] == ["hi", "Hel"]


async def test_what_was_cancelled_before_it_said_anything_is_not_in_the_history() -> None:
    async with running(HANGS) as it:
        with trio.CancelScope() as scope:
            scope.cancel()
            await it.session.ask("hi")
        assert it.session.history == []


async def test_a_cancel_scope_around_the_session_cancels_the_generation() -> None:
    async with open_upstream(HANGS) as upstream, open_server(settings(upstream.base_url)) as server:
        with trio.fail_after(PATIENCE), trio.CancelScope() as scope:
            async with connect(server.url) as session, session.generate("hi") as task:
                async for _ in task:
                    scope.cancel()
        assert scope.cancelled_caught
        await upstream.requests[0].closed.wait()


async def test_what_was_only_just_asked_for_is_cancelled_at_the_end_of_the_session() -> None:
    async with open_upstream(HELLO, HANGS) as upstream, open_server(settings(upstream.base_url)) as server:
        with trio.fail_after(PATIENCE):
            async with connect(server.url) as session:
                await session.ask("hi")
                await session.generate("more").__aenter__()
            for request in upstream.requests[1:]:
                await request.closed.wait()
            async with server.connect(session.id or "", "?after=0") as later:
                assert (await later.hear())["params"]["tasks"] == []


async def test_a_generation_that_waits_for_another_to_be_taken_on_is_cancelled_without_being_asked_for() -> None:
    async with running(HELLO) as it:
        it.line.target = "http://127.0.0.1:1"
        it.line.cut()
        async with it.session.generate("hi") as task:
            await task.cancel()
            assert task.result == Result(final_text="", status="cancelled")
        assert it.session.history == []


async def test_what_the_block_raises_comes_out_as_it_is() -> None:
    async with open_upstream(HANGS) as upstream, open_server(settings(upstream.base_url)) as server:

        async def fails() -> None:
            async with connect(server.url) as session, session.generate("hi") as task:
                await anext(task)
                raise KeyError("mine")

        with pytest.raises(KeyError, match="mine") as raised:
            await fails()
        assert type(raised.value) is KeyError
        await upstream.requests[0].closed.wait()


async def test_what_is_running_when_the_session_ends_fails() -> None:
    async with running(HANGS) as it:
        await it.session.generate("hi").__aenter__()
        task = it.session.generate("hi")
        async with task:
            await it.session.close()
            with pytest.raises(ClosedError):
                await task.finish()
        with pytest.raises(ClosedError):
            it.session.generate("more")


async def test_misuse_is_told() -> None:
    async with running(HANGS) as it:
        task = it.session.generate("hi")
        with pytest.raises(RuntimeError, match="async with"):
            await anext(task)
        async with task:
            with pytest.raises(RuntimeError, match="not ended"):
                _ = task.result
        with pytest.raises(RuntimeError, match="once"):
            await task.__aenter__()
        with pytest.raises(TypeError, match="JSON"):
            it.session.generate("hi", response_format={"type": object()})
        for empty in ("", []):
            with pytest.raises(ValueError, match="not empty"):
                it.session.generate(empty)
        for url in ("127.0.0.1:8000", "http://127.0.0.1:abc", "http://127.0.0.1:0"):
            with pytest.raises(ValueError, match=r"http|[Pp]ort"):
                async with connect(url):
                    pass


async def test_a_generation_that_is_read_by_two_does_not_hang() -> None:
    """Each event goes to one of them; who has the first, or is through first, is nobody's to say."""
    got = []

    async def read(task: Generation) -> None:
        got.extend([event async for event in task])

    async with running([answers.text("Hel"), answers.pause("go on"), answers.reply("lo")]) as it:
        async with it.session.generate("hi") as task, trio.open_nursery() as nursery:
            nursery.start_soon(read, task)
            nursery.start_soon(read, task)
            await trio.testing.wait_all_tasks_blocked(0.01)
            it.upstream.gate("go on").set()
        said = "".join(event.text for event in got if isinstance(event, TextChunk))
        assert sorted(said) == sorted("Hello")


def test_in_asyncio_it_says_that_it_needs_trio() -> None:
    async def main() -> None:
        async with connect("http://127.0.0.1:1"):
            pass

    with pytest.raises(RuntimeError, match=r"trio\.run\(main\)"):
        asyncio.run(main())


# Errors


def test_every_error_of_the_server_has_its_class() -> None:
    for kind in errors.InferenceError.__subclasses__():
        error = from_wire({"code": kind.code, "message": "m", "data": {"retry_after": 1}})
        assert type(error) is not InferenceError
        assert (error.code, error.message, error.retry_after) == (kind.code, "m", 1)
    assert type(from_wire({"code": -1, "message": "m"})) is InferenceError


async def test_an_error_of_the_generation_has_its_code_and_the_text_so_far() -> None:
    async with running([answers.text("Hel"), answers.drop()]) as it:
        with pytest.raises(BrokenStreamError) as broken:
            await events_of(it.session)
        assert (broken.value.code, broken.value.partial_text) == (-32006, "Hel")
        assert it.session.history == []


async def test_a_wrong_parameter_is_named_and_the_session_goes_on() -> None:
    async with running(HELLO) as it:
        with pytest.raises(RequestError, match=r"params\.temperature"):
            await it.session.ask("hi", temperature=9)
        assert str(await it.session.ask("hi")) == "Hello"


async def test_what_is_too_big_fails_alone() -> None:
    async with running(HELLO, max_message_bytes=10_000) as it:
        with pytest.raises(TooBigError):
            await it.session.ask("x" * 20_000)
        assert str(await it.session.ask("hi")) == "Hello"


async def test_a_server_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:1"):
        async with connect("http://127.0.0.1:1"):
            pass


@asynccontextmanager
async def another_server(head: str) -> AsyncIterator[str]:
    """Its URL; it answers every request with this head."""

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(f"HTTP/1.1 {head}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, answer, listeners)
        yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ("200 OK\r\nContent-Type: text/html", "HTTP 200, text/html"),
        ("404 Not Found", "HTTP 404, no content type"),
        ("301 Moved\r\nLocation: https://elsewhere/", "HTTP 301 to https://elsewhere/, no content type"),
    ],
)
async def test_another_server_at_the_url_is_told_with_what_was_found(head: str, found: str) -> None:
    with trio.fail_after(PATIENCE):
        async with another_server(head) as url:
            with pytest.raises(DefectError) as told:
                async with connect(url):
                    pass
            assert (told.value.message, told.value.code) == (f"No inference server at {url}/: {found}", "defect")


async def test_a_wrong_path_of_the_server_is_told() -> None:
    async with running() as it:
        with pytest.raises(DefectError, match=r"No inference server at http://\S+/v1/: HTTP 404, application/json"):
            async with connect(f"{it.server.url}/v1"):
                pass


async def test_another_server_in_place_of_the_one_before_fails_what_ran() -> None:
    async with (
        running(HANGS) as it,
        another_server("200 OK\r\nContent-Type: text/html") as url,
        it.session.generate("hi") as task,
    ):
        await anext(task)
        it.line.target = url
        it.line.cut()
        with pytest.raises(DefectError, match="No inference server"):
            await task.finish()


async def test_a_full_server_says_when_to_come_back() -> None:
    async with running(max_sessions=1) as it, it.session.generate("hi"):
        with pytest.raises(OverloadedError) as full:
            async with connect(it.server.url):
                pass
    assert full.value.retryable
    assert full.value.retry_after


async def test_a_token_is_sent_where_one_is_asked_for() -> None:
    tokens = {"tests": Secret(TOKEN)}
    async with open_upstream(HELLO) as upstream, open_server(settings(upstream.base_url, auth_tokens=tokens)) as server:
        with trio.fail_after(PATIENCE):
            with pytest.raises(UnauthorizedError):
                async with connect(server.url):
                    pass
            with pytest.raises(UnauthorizedError):
                async with connect(server.url, token="another"):
                    pass
            async with connect(server.url, token=TOKEN) as session:
                assert str(await session.ask("hi")) == "Hello"


async def test_it_works_over_tls() -> None:
    authority = trustme.CA()
    ours, theirs = ssl.create_default_context(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.configure_trust(ours)
    authority.issue_cert("localhost").configure_cert(theirs)
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream(HELLO) as upstream,
            open_server(settings(upstream.base_url)) as server,
            open_line(server.url, ssl_context=theirs) as line,
        ):
            async with connect(line.url.replace("https", "wss"), ssl_context=ours) as session:
                assert str(await session.ask("hi")) == "Hello"
            with pytest.raises(UnreachableError, match="certificate"):
                async with connect(line.url):
                    pass
