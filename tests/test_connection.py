"""Connection and session together, with a WebSocket made of channels and a model that plays a script."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from inference_trio.access import Owner
from inference_trio.connection import Connection
from inference_trio.protocol import CreateSession, Error, TextChunk
from inference_trio.session import Session
from inference_trio.store import SessionStore

from . import fakes
from .fakes import FakeModel, FakeWebSocket, at_once, finish, hang, text, tool_call

TOOL = {"name": "look", "parameters": {"type": "object"}}
CALLS = [tool_call("c1", "look", '{"at": 1}', 0), tool_call("c2", "look", "{}", 1), finish("tool_calls")]


@attrs.define
class Bench:
    """A store in a nursery; `connect` gives the client's end of a new connection."""

    store: SessionStore
    nursery: trio.Nursery
    owner: Owner = attrs.field(factory=lambda: Owner(None))

    def create(self, **params: Any) -> Session:
        return at_once(self.store.create(CreateSession(**params), self.owner))

    def connect(self, session: Session, after: int | None = None, **options: Any) -> FakeWebSocket:
        socket = FakeWebSocket(session.id, **options)
        connection = Connection(socket, session)
        at_once(session.attach(connection, after))

        async def serve() -> None:
            with socket.scope:
                await connection.run()
            socket.gone.set()

        self.nursery.start_soon(serve)
        return socket


@asynccontextmanager
async def bench(*rounds: list[Any], **changes: Any) -> AsyncIterator[Bench]:
    async with trio.open_nursery() as nursery:
        yield Bench(SessionStore(fakes.settings(**changes), FakeModel(*rounds), nursery), nursery)
        nursery.cancel_scope.cancel()


HELLO = [text("Hel"), text("lo"), finish()]


async def transcript(socket: FakeWebSocket) -> list[Any]:
    """Frames up to the end of a task."""
    frames = [await socket.hear()]
    while frames[-1].get("method") not in ("end", "error"):
        frames.append(await socket.hear())
    return frames


def text_of(frames: list[Any]) -> str:
    return "".join(frame["params"]["chunk"] for frame in frames if frame.get("method") == "text_chunk")


def numbers(frames: list[Any]) -> list[int]:
    return [frame["params"]["seq"] for frame in frames if "seq" in frame.get("params", {})]


async def test_a_generation_is_answered_before_it_streams_and_ends_once() -> None:
    async with bench(HELLO) as it:
        session = it.create()
        socket = it.connect(session)
        socket.call("generate", {"message": "hi"}, request_id="a")
        answer, *notes = await transcript(socket)
        task_id = answer["result"]["task_id"]
        assert answer == {
            "jsonrpc": "2.0",
            "id": "a",
            "result": {"session_id": session.id, "task_id": task_id, "state": "streaming"},
        }
        assert text_of(notes) == "Hello"
        assert numbers(notes) == list(range(1, len(notes) + 1))
        assert notes[-1]["params"] == {
            "session_id": session.id,
            "task_id": task_id,
            "seq": len(notes),
            "status_message": "completed",
            "final_text": "Hello",
            "finish_reason": "stop",
            "usage": {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15},
            "messages": [{"role": "assistant", "content": "Hello"}],
        }
        await trio.testing.wait_all_tasks_blocked()
        assert socket.heard() == []
        assert session.runners == {}


async def test_tools_of_the_session_are_called_and_their_results_taken() -> None:
    async with bench(CALLS, HELLO) as it:
        socket = it.connect(it.create(tools=[fakes.tool(TOOL)]))
        socket.call("generate", {"message": "hi"})
        answer, first, second = [await socket.hear() for _ in range(3)]
        task_id = answer["result"]["task_id"]
        assert first["method"] == second["method"] == "function_call_request"
        assert first["params"]["parameters"] == {"at": 1}
        assert first["params"]["timeout"] == 300
        result = {"tool_call_id": "c2", "tool_name": "look", "result": {"seen": True}}
        socket.call("tool_result", {"task_id": task_id, "results": [result]}, request_id=2)
        assert (await socket.hear())["result"] == {
            "task_id": task_id,
            "accepted": ["c2"],
            "outstanding": ["c1"],
            "state": "awaiting_tools",
        }
        failed = {"tool_call_id": "c1", "is_error": True, "error_message": "dark"}
        socket.call("tool_result", {"task_id": task_id, "results": [failed]}, request_id=3)
        accepted, *rest = await transcript(socket)
        assert accepted["result"]["state"] == "streaming"
        tool_messages = rest[-1]["params"]["messages"][1:3]
        assert [message["content"] for message in tool_messages] == ["Error: dark", '{"seen":true}']


@pytest.mark.parametrize(
    ("results", "code"),
    [
        ([{"tool_call_id": "nobody", "result": 1}], -32602),
        ([{"tool_call_id": "c1", "result": 1}, {"tool_call_id": "nobody", "result": 1}], -32602),
        ([{"tool_call_id": "c1", "result": 1}, {"tool_call_id": "c1", "result": 2}], -32602),
    ],
)
async def test_results_that_do_not_fit_change_nothing(results: list[Any], code: int) -> None:
    async with bench(CALLS, HELLO) as it:
        session = it.create(tools=[fakes.tool(TOOL)])
        socket = it.connect(session)
        socket.call("generate", {"message": "hi"})
        task_id = (await socket.hear())["result"]["task_id"]
        await trio.testing.wait_all_tasks_blocked()
        socket.heard()
        socket.call("tool_result", {"task_id": task_id, "results": results})
        assert (await socket.hear())["error"]["code"] == code
        assert session.runners[task_id].task.outstanding == ["c1", "c2"]


async def test_a_task_that_is_unknown_or_not_waiting_takes_no_results() -> None:
    async with bench([text("x"), hang]) as it:
        socket = it.connect(it.create())
        socket.call("generate", {"message": "hi"})
        task_id = (await socket.hear())["result"]["task_id"]
        await socket.hear()
        for name in ("nobody", task_id):
            socket.call("tool_result", {"task_id": name, "results": [{"tool_call_id": "c", "result": 1}]})
            assert (await socket.hear())["error"]["code"] == -32004


async def test_cancel_is_answered_when_the_tasks_have_ended() -> None:
    async with bench([text("x"), hang]) as it:
        session = it.create()
        socket = it.connect(session)
        ids = []
        for _ in range(2):
            socket.call("generate", {"message": "hi"})
            ids.append((await socket.hear())["result"]["task_id"])
            await socket.hear()
        socket.call("cancel", {"task_id": ids[0]})
        ended, answer = await socket.hear(), await socket.hear()
        if "result" in ended:
            ended, answer = answer, ended
        assert (ended["params"]["status_message"], ended["params"]["task_id"]) == ("cancelled", ids[0])
        assert answer["result"] == {"cancelled": [ids[0]]}
        assert it.store.model.streaming == 1
        socket.call("cancel")
        await trio.testing.wait_all_tasks_blocked()
        assert {"cancelled": [ids[1]]} in [frame.get("result") for frame in socket.heard()]
        assert it.store.model.streaming == 0
        for params in ({}, {"task_id": ids[0]}, {"task_id": "nobody"}):
            socket.call("cancel", params)
            assert (await socket.hear())["result"] == {"cancelled": []}


async def test_a_batch_is_answered_in_one_frame_when_its_last_answer_is_there() -> None:
    async with bench([text("x"), hang]) as it:
        socket = it.connect(it.create())
        request = {"jsonrpc": "2.0", "method": "generate", "params": {"message": "hi"}}
        socket.say([request | {"id": 1}, {"jsonrpc": "2.0", "method": "cancel", "id": 2}, 7, request])
        frames = [await socket.hear() for _ in range(3)]
        (batch,) = [frame for frame in frames if isinstance(frame, list)]
        started, cancelled, invalid = batch
        assert cancelled["result"] == {"cancelled": [started["result"]["task_id"]]}
        assert invalid["error"]["code"] == -32600
        await trio.testing.wait_all_tasks_blocked()
        assert it.store.model.streaming == 1


async def test_notifications_are_carried_out_and_not_answered() -> None:
    async with bench(HELLO) as it:
        socket = it.connect(it.create())
        socket.say({"jsonrpc": "2.0", "method": "nothing"})
        socket.say({"jsonrpc": "2.0", "method": "tool_result", "params": {}})
        socket.say({"jsonrpc": "2.0", "method": "generate", "params": {"message": "hi"}})
        frames = await transcript(socket)
        assert text_of(frames) == "Hello"
        assert all("id" not in frame for frame in frames)


async def test_nothing_that_comes_in_ends_the_connection() -> None:
    async with bench(HELLO) as it:
        socket = it.connect(it.create())
        for frame in ("{", b"\xff\xfe", "null", "[]", '{"jsonrpc": "1.0", "id": 1}', "[" * 5000):
            socket.say(frame)
            assert (await socket.hear())["error"]["code"] in (-32700, -32600)
        socket.say(b'{"jsonrpc": "2.0", "method": "rpc.discover", "id": 1}')
        assert (await socket.hear())["result"]["openrpc"] == "1.3.2"


async def test_limits_on_tasks_refuse_with_a_time_to_come_back() -> None:
    async with bench([hang], max_tasks=3, max_tasks_per_session=2) as it:
        one, other = it.connect(it.create()), it.connect(it.create())
        for socket in (one, one, other):
            socket.call("generate", {"message": "hi"})
            assert "result" in await socket.hear()
        for socket in (one, other):
            socket.call("generate", {"message": "hi"})
            error = (await socket.hear())["error"]
            assert (error["code"], error["data"]["retry_after"]) == (-32005, 1.0)


async def test_tasks_that_have_ended_make_place_for_others() -> None:
    async with bench(HELLO, max_tasks=1) as it:
        socket = it.connect(it.create())
        for _ in range(3):
            socket.call("generate", {"message": "hi"})
            assert (await transcript(socket))[-1]["method"] == "end"
            await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize(
    ("params", "path"),
    [
        ({"message": "hi", "model": "other"}, "`params.model`"),
        ({"message": "hi", "tool_choice": "required", "tools": []}, "`params.tool_choice`"),
        (
            {"message": "hi", "tool_choice": {"type": "function", "function": {"name": "nobody"}}},
            "`params.tool_choice`",
        ),
    ],
)
async def test_what_cannot_be_had_is_refused_by_name(params: Any, path: str) -> None:
    async with bench(HELLO) as it:
        socket = it.connect(it.create(tools=[fakes.tool(TOOL)]))
        socket.call("generate", params)
        error = (await socket.hear())["error"]
        assert error["code"] == -32602
        assert path in error["message"]


async def test_parameters_reach_the_model_under_openais_names() -> None:
    async with bench(HELLO, allowed_models=frozenset({"other"})) as it:
        socket = it.connect(it.create(tools=[fakes.tool(TOOL)]))
        given = {"max_new_tokens": 7, "temperature": 0, "stop": ["x"], "logit_bias": {"1": 2}, "seed": None}
        socket.call("generate", {"message": "hi", "model": "other", "tools": [], **given})
        await transcript(socket)
        (request,) = it.store.model.requests
        assert request.parameters == {"max_tokens": 7, "temperature": 0, "stop": ["x"], "logit_bias": {"1": 2}}
        assert (request.model, request.tools) == ("other", [])


async def test_what_waits_to_be_sent_is_merged_and_a_full_outbox_holds_the_model_up() -> None:
    pieces = [text("x" * 100) for _ in range(200)]
    async with bench([*pieces, finish()], outbox_bytes=4000) as it:
        session = it.create()
        socket = it.connect(session, outgoing=0)
        socket.call("generate", {"message": "hi"})
        await trio.testing.wait_all_tasks_blocked()
        runner = next(iter(session.runners.values()))
        assert len(runner.task.text) < 4000
        frames = await transcript(socket)
        assert text_of(frames) == "x" * 20000
        assert len(frames) < 100


async def test_what_is_told_while_nothing_waits_is_sent_before_whoever_tells_it_goes_on() -> None:
    async with bench(HELLO) as it:
        session = it.create()
        socket = it.connect(session)
        await trio.testing.wait_all_tasks_blocked()
        for piece in "abc":
            session.append(TextChunk(task_id="t", chunk=piece))
        assert text_of(socket.heard()) == "abc"


async def test_what_is_told_while_something_waits_comes_after_it() -> None:
    async with bench(HELLO) as it:
        session = it.create()
        socket = it.connect(session, outgoing=1)
        await trio.testing.wait_all_tasks_blocked()
        for piece in "abcdef":
            session.append(TextChunk(task_id="t", chunk=piece))
        await trio.testing.wait_all_tasks_blocked()
        session.append(TextChunk(task_id="t", chunk="g"))
        session.append(Error(task_id="t", error={}))
        frames = await transcript(socket)
        assert numbers(frames) == list(range(1, len(frames) + 1))
        assert text_of(frames) == "abcdefg"


async def test_requests_are_not_read_while_their_answers_are_not() -> None:
    async with bench(HELLO) as it:
        socket = it.connect(it.create(), outgoing=0)
        for _ in range(100):
            socket.call("rpc.discover")
        await trio.testing.wait_all_tasks_blocked()
        assert socket.unread > 50
        for _ in range(100):
            assert "result" in await socket.hear()


# Resuming


async def test_a_dropped_connection_is_resumed_where_it_was_cut() -> None:
    go_on = trio.Event()
    async with bench([text("Hel"), fakes.wait(go_on), text("lo"), finish()]) as it:
        session = it.create()
        first = it.connect(session)
        first.call("generate", {"message": "hi"})
        answer, chunk = await first.hear(), await first.hear()
        await first.drop()
        go_on.set()
        await trio.testing.wait_all_tasks_blocked()
        second = it.connect(session, after=chunk["params"]["seq"])
        resumed, *rest = await transcript(second)
        assert resumed["params"] == {
            "session_id": session.id,
            "after": 1,
            "oldest_seq": 1,
            "latest_seq": 3,
            "gap": False,
            "tasks": [],
        }
        assert numbers(rest) == [2, 3]
        assert rest[-1]["params"]["task_id"] == answer["result"]["task_id"]
        assert text_of([chunk, *rest]) == "Hello"


async def test_resumed_names_the_running_tasks_and_their_outstanding_calls() -> None:
    async with bench(CALLS) as it:
        session = it.create(tools=[fakes.tool(TOOL)])
        first = it.connect(session)
        first.call("generate", {"message": "hi"})
        task_id = (await first.hear())["result"]["task_id"]
        await trio.testing.wait_all_tasks_blocked()
        await first.drop()
        resumed = await it.connect(session, after=0).hear()
        assert resumed["params"]["tasks"] == [
            {"task_id": task_id, "state": "awaiting_tools", "outstanding": ["c1", "c2"]}
        ]


async def test_without_after_nothing_is_replayed() -> None:
    async with bench(HELLO) as it:
        session = it.create()
        first = it.connect(session)
        first.call("generate", {"message": "hi"})
        await transcript(first)
        await first.drop()
        second = it.connect(session)
        second.call("generate", {"message": "hi"})
        answer, *notes = await transcript(second)
        assert "result" in answer
        assert min(numbers(notes)) > 1


async def test_a_newer_connection_takes_over() -> None:
    go_on = trio.Event()
    async with bench([text("Hel"), fakes.wait(go_on), text("lo"), finish()]) as it:
        session = it.create()
        first = it.connect(session)
        first.call("generate", {"message": "hi"})
        await first.hear()
        await first.hear()
        second = it.connect(session, after=1)
        await first.gone.wait()
        assert first.close_code == 4409
        go_on.set()
        frames = await transcript(second)
        assert text_of(frames) == "lo"
        assert first.heard() == []


async def test_without_a_client_tasks_end_with_the_resume_window(autojump_clock: Any) -> None:
    async with bench([text("x"), hang]) as it:
        session = it.create(resume_window=5.0)
        first = it.connect(session)
        first.call("generate", {"message": "hi"})
        await first.hear()
        await first.drop()
        await trio.sleep(4.9)
        assert session.runners
        await trio.sleep(0.2)
        assert not session.runners
        frames = await transcript(it.connect(session, after=0))
        assert frames[-1]["params"]["status_message"] == "cancelled"


async def test_a_client_that_comes_back_stops_the_window(autojump_clock: Any) -> None:
    async with bench([text("x"), hang]) as it:
        session = it.create()
        first = it.connect(session)
        first.call("generate", {"message": "hi"})
        await first.hear()
        await first.drop()
        await trio.sleep(29)
        it.connect(session, after=0)
        await trio.sleep(29)
        assert session.runners


async def test_a_window_of_zero_cancels_at_once() -> None:
    async with bench([text("x"), hang], resume_window=0.0) as it:
        session = it.create(resume_window=100.0)
        first = it.connect(session)
        first.call("generate", {"message": "hi"})
        await first.hear()
        await first.drop()
        await trio.testing.wait_all_tasks_blocked()
        assert not session.runners


async def test_a_number_that_was_never_given_out_is_refused() -> None:
    async with bench(HELLO) as it:
        session = it.create()
        with pytest.raises(Exception, match="`after`"):
            it.connect(session, after=1)
        assert session.is_idle


async def test_a_defect_in_a_method_is_answered_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*_: Any) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(Session, "generate", explode)
    async with bench(HELLO) as it:
        socket = it.connect(it.create())
        socket.call("generate", {"message": "hi"})
        error = (await socket.hear())["error"]
        assert error["code"] == -32603
        assert "/secret" not in error["message"]
        assert "/secret" in caplog.text
        socket.call("cancel")
        assert "result" in await socket.hear()


async def test_a_defect_in_a_connection_closes_it_with_1011(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench(HELLO) as it:
        session = it.create()
        socket = it.connect(session)
        monkeypatch.setattr(Session, "take", None)
        socket.call("rpc.discover")
        await socket.gone.wait()
        assert socket.close_code == 1011
        assert session.is_idle
        assert "defect" in caplog.text


async def test_a_defect_in_sending_closes_it_with_1011_and_leaves_the_task_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench(HELLO) as it:
        session = it.create()
        socket = it.connect(session)
        await trio.testing.wait_all_tasks_blocked()
        tried: list[str] = []

        def fail_once(self: FakeWebSocket, text: str) -> None:
            tried.append(text)
            if len(tried) == 1:
                raise RuntimeError("defect")

        monkeypatch.setattr(FakeWebSocket, "send_at_once", fail_once)
        session.append(TextChunk(task_id="t", chunk="lost"))
        session.append(TextChunk(task_id="t", chunk="would hide the loss from who resumes after it"))
        await socket.gone.wait()
        assert (socket.close_code, len(tried)) == (1011, 1)
        assert "defect in a connection" in caplog.text


# The store


async def test_sessions_are_limited_and_expire_when_idle(autojump_clock: Any) -> None:
    async with bench([hang], max_sessions=2, session_ttl=10) as it:
        first, second = it.create(), it.create()
        with pytest.raises(Exception, match="too many sessions"):
            it.create()
        await trio.sleep(9)
        assert await it.store.get(second.id) is second
        await trio.sleep(2)
        assert await it.store.get(first.id) is None
        assert await it.store.get(second.id) is second
        third = it.create()
        assert third.id not in (first.id, second.id)
        assert len(third.id) >= 22


async def test_a_session_in_use_does_not_expire(autojump_clock: Any) -> None:
    async with bench([hang], session_ttl=10) as it:
        session = it.create()
        socket = it.connect(session)
        await trio.sleep(100)
        assert await it.store.get(session.id) is session
        await socket.drop()
        await trio.sleep(9)
        assert await it.store.get(session.id) is session
        await trio.sleep(11)
        assert await it.store.get(session.id) is None


async def test_the_resume_window_is_the_servers_at_most() -> None:
    async with bench(HELLO, resume_window=30.0) as it:
        asked = (None, 5.0, 100.0)
        assert [it.create(resume_window=window).resume_window for window in asked] == [30.0, 5.0, 30.0]


# Stopping


async def test_a_server_that_stops_says_so_lets_tasks_end_and_closes_with_1012(autojump_clock: Any) -> None:
    async with bench([text("Hel"), fakes.sleep(20), text("lo"), finish()], drain_seconds=30.0) as it:
        socket = it.connect(it.create())
        socket.call("generate", {"message": "hi"})
        await socket.hear()
        await socket.hear()
        it.nursery.start_soon(it.store.drain)
        assert (await socket.hear())["params"] == {"session_id": socket.session_id, "deadline": 30.0}
        socket.call("generate", {"message": "hi"})
        error = (await socket.hear())["error"]
        assert (error["code"], error["data"]["retry_after"]) == (-32005, 30.0)
        with pytest.raises(Exception, match="stopping"):
            it.create()
        with trio.fail_after(100):
            await socket.gone.wait()
        assert socket.heard()[-1]["params"]["final_text"] == "Hello"
        assert socket.close_code == 1012


async def test_tasks_that_take_too_long_are_cancelled_and_their_clients_told(autojump_clock: Any) -> None:
    async with bench([text("Hel"), hang], drain_seconds=5.0, resume_window=100.0) as it:
        socket, other = it.connect(it.create()), it.create()
        absent = it.connect(other)
        for each in (socket, absent):
            each.call("generate", {"message": "hi"})
            await each.hear()
            await each.hear()
        await absent.drop()
        before = trio.current_time()
        await it.store.drain()
        assert trio.current_time() - before == 5.0
        assert socket.heard()[-1]["params"]["status_message"] == "cancelled"
        assert socket.close_code == 1012
        assert it.store.running == 0


async def test_a_client_that_resumes_while_the_server_stops_is_told(autojump_clock: Any) -> None:
    async with bench([hang], drain_seconds=30.0) as it:
        session = it.create()
        it.connect(session).call("generate", {"message": "hi"})
        await trio.testing.wait_all_tasks_blocked()
        it.nursery.start_soon(it.store.drain)
        await trio.sleep(10)
        socket = it.connect(session, after=0)
        assert [(await socket.hear())["method"] for _ in range(2)] == ["resumed", "draining"]


async def test_a_stopping_server_waits_until_a_slow_client_has_everything(autojump_clock: Any) -> None:
    async with bench([*(text("x") for _ in range(20)), finish()], drain_seconds=10.0) as it:
        socket = it.connect(it.create(), outgoing=0)
        socket.call("generate", {"message": "hi"})
        await trio.testing.wait_all_tasks_blocked()
        stopped = trio.Event()

        async def stop() -> None:
            await it.store.drain()
            stopped.set()

        it.nursery.start_soon(stop)
        await trio.sleep(9)
        assert not stopped.is_set()
        frames = await transcript(socket)
        assert frames[-1]["params"]["final_text"] == "x" * 20
        await stopped.wait()
        assert socket.close_code == 1012


async def test_a_client_that_does_not_read_does_not_hold_up_the_stop(autojump_clock: Any) -> None:
    async with bench([text("x" * 100), hang], drain_seconds=1.0) as it:
        socket = it.connect(it.create(), outgoing=0)
        socket.call("generate", {"message": "hi"})
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(1.0 + 2 * 0.5 + 0.1):
            await it.store.drain()


async def test_a_client_that_comes_while_connections_are_closed_is_closed_too(autojump_clock: Any) -> None:
    async with bench([text("x" * 100), hang], drain_seconds=1.0) as it:
        holds_up, late = it.connect(it.create(), outgoing=0), it.create()
        holds_up.call("generate", {"message": "hi"})
        await trio.testing.wait_all_tasks_blocked()
        it.nursery.start_soon(it.store.drain)
        await trio.sleep(1.25)  # the task was cancelled, and its client is waited for
        socket = it.connect(late)
        with trio.fail_after(1):
            await socket.gone.wait()
        assert socket.close_code == 1012


# A client that overdoes it


async def test_a_session_whose_notifications_are_not_read_starts_no_more_tasks() -> None:
    async with bench([text("x" * 2000), finish()], outbox_bytes=1000) as it:
        session = it.create()
        socket = it.connect(session, outgoing=0)
        for number in range(8):
            socket.call("generate", {"message": "hi"}, request_id=number)
            await trio.testing.wait_all_tasks_blocked()
        answers = [await socket.hear() for _ in range(9)]
        assert -32005 in [answer.get("error", {}).get("code") for answer in answers]


async def test_a_busy_client_gets_its_notifications_all_the_same() -> None:
    async with bench([text("x"), hang]) as it:
        socket = it.connect(it.create(), outgoing=0)
        socket.call("generate", {"message": "hi"})
        for _ in range(1000):
            socket.call("cancel", {"task_id": "nobody"})
        heard = [await socket.hear() for _ in range(200)]
        assert "text_chunk" in [frame.get("method") for frame in heard]


async def test_a_connection_that_was_taken_over_starts_nothing() -> None:
    async with bench(HELLO) as it:
        session = it.create()
        older = it.connect(session)
        await trio.testing.wait_all_tasks_blocked()
        it.connect(session)
        older.call("generate", {"message": "hi"})
        await older.gone.wait()
        assert it.store.model.requests == []


async def test_a_client_that_is_back_at_once_loses_nothing(autojump_clock: Any) -> None:
    async with bench([text("x"), hang], resume_window=0.0) as it:
        session = it.create()
        first = it.connect(session)
        first.call("generate", {"message": "hi"})
        await first.hear()
        await first.hear()
        connection = session.attached
        session.detach(connection)
        it.connect(session, after=1)
        await trio.testing.wait_all_tasks_blocked()
        assert session.runners
