"""Log lines: what stands in them, what never does, and that writing them holds nobody up."""

from __future__ import annotations

import json
import logging
import logging.handlers
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import hypercorn
import pytest
import trio

from inference_trio import logs
from inference_trio.errors import ConfigurationError
from inference_trio.logs import configure_logging, log_context
from inference_trio.settings import Settings
from inference_trio.variables import Secret

KEY = 'sk-"0123\\456'
LOGGERS = ("", "inference_trio", "hypercorn", "hypercorn.error", "openai", "httpx2", "httpcore2", "langchain_openai")
log = logging.getLogger("inference_trio.a_test")


@pytest.fixture(autouse=True)
def _levels_as_they_were() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Callable[..., list[str]]]:
    """Configure logging as the keyword arguments say, call the function, and return the file's lines."""
    stops: list[Callable[[], None]] = []

    def write(act: Callable[[], object], **fields: object) -> list[str]:
        file = tmp_path / "a.log"
        stops.append(configure_logging(Settings(**{"log_file": file, "api_key": Secret(KEY), **fields})))
        act()
        stops[-1]()
        return file.read_bytes().decode().splitlines()

    yield write
    for stop in stops:
        stop()


def fail(message: str) -> None:
    raise RuntimeError(message)


def raise_and_log(message: str) -> None:
    try:
        fail(message)
    except RuntimeError:
        log.exception("it failed")


# Lines


def test_a_text_line_has_its_time_level_logger_ids_and_message(written: Callable[..., list[str]]) -> None:
    def act() -> None:
        with log_context(task_id="t1", session_id="0123456789abcdef"):
            log.info("%d rounds", 2)
        log.warning("done", extra={"seconds": 1.5})

    first, second = written(act)
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(rf"{time} INFO  inference_trio\.a_test \[t1 01234567\] 2 rounds", first)
    assert re.fullmatch(rf"{time} WARNING inference_trio\.a_test \[- -\] done seconds=1\.5", second)


def test_the_time_is_utc(written: Callable[..., list[str]]) -> None:
    record = logging.makeLogRecord({"name": "inference_trio", "levelno": 40, "levelname": "ERROR", "msg": "x"})
    record.created = 1795428000.123
    [line] = written(lambda: logging.getLogger("inference_trio").handle(record))
    assert line.startswith("2026-11-23T10:00:00.123Z ERROR ")


def test_a_json_line_is_one_object_with_every_extra_field(written: Callable[..., list[str]]) -> None:
    def act() -> None:
        with log_context(task_id="t1", session_id="0123456789abcdef"):
            log.info("%d rounds", 2, extra={"calls": ["a"], "path": Path("b"), "level": "mine"})
        log.info("plain")

    first, second = map(json.loads, written(act, log_format="json"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "INFO",
        "logger": "inference_trio.a_test",
        "message": "2 rounds",
        "task_id": "t1",
        "session": "01234567",
        "calls": ["a"],
        "path": "b",
    }
    assert second.keys() == {"time", "level", "logger", "message"}


def test_an_exception_is_a_field_in_json(written: Callable[..., list[str]]) -> None:
    [line] = written(lambda: raise_and_log("one\ntwo"), log_format="json")
    fields = json.loads(line)
    assert fields["message"] == "it failed"
    assert fields["exception"].startswith("Traceback")
    assert fields["exception"].endswith("RuntimeError: one\ntwo")


def test_an_exception_is_indented_in_text(written: Callable[..., list[str]]) -> None:
    first, *further = written(lambda: raise_and_log("one\n2026-11-23T10:00:00.123Z INFO  forged\x1b[2J\x85line"))
    assert first.endswith("it failed")
    assert further[0] == "    Traceback (most recent call last):"
    assert further[-3:] == [
        "    RuntimeError: one",
        "    2026-11-23T10:00:00.123Z INFO  forged\\x1b[2J",
        "    line",
    ]
    assert all(line.startswith("    ") for line in further)


def test_asking_for_an_exception_where_there_is_none_is_harmless(written: Callable[..., list[str]]) -> None:
    [line] = written(lambda: log.error("odd", exc_info=True))
    assert line.endswith("] odd")


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\x00", "\x85", "\u2028", "\u202e", "\udc80"], ids=ascii)
def test_no_text_can_forge_a_second_line(written: Callable[..., list[str]], log_format: str, character: str) -> None:
    def act() -> None:
        with log_context(task_id=f"t{character}1"):
            log.info("a%sforged", character, extra={"field": f"b{character}c"})

    [line] = written(act, log_format=log_format)
    assert line.isprintable()
    assert "forged" in line
    if log_format == "json":
        assert json.loads(line)["message"] == f"a{character}forged"


def test_readable_text_of_any_language_stays_as_it_is_in_text(written: Callable[..., list[str]]) -> None:
    [line] = written(lambda: log.info("größer, 你好 🙂"))
    assert line.endswith("größer, 你好 🙂")


# Ids


def test_inner_contexts_add_to_outer_ones_and_end(written: Callable[..., list[str]]) -> None:
    def act() -> None:
        with log_context(session_id="s1"):
            with log_context(task_id="t1"):
                log.info("in")
            log.info("out")

    assert [line.split("a_test ")[1] for line in written(act)] == ["[t1 s1] in", "[- s1] out"]


async def test_ids_reach_the_tasks_and_threads_that_are_started_in_a_context(tmp_path: Path) -> None:
    inside = [trio.Event(), trio.Event()]

    async def work(mine: int) -> None:
        with log_context(task_id=f"t{mine}"):
            inside[mine].set()
            await inside[1 - mine].wait()
            await trio.to_thread.run_sync(log.info, f"thread {mine}")
            log.info("task %d", mine)

    stop = configure_logging(Settings(log_file=tmp_path / "a.log"))
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            with log_context(session_id="s1"):
                nursery.start_soon(work, 0)
            nursery.start_soon(work, 1)
    stop()
    lines = sorted(line.split("a_test ")[1] for line in (tmp_path / "a.log").read_text().splitlines())
    assert lines == ["[t0 s1] task 0", "[t0 s1] thread 0", "[t1 -] task 1", "[t1 -] thread 1"]


# What never stands in the log


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_key_is_replaced_wherever_it_occurs(written: Callable[..., list[str]], log_format: str) -> None:
    def act() -> None:
        log.info("message %s", KEY, extra={"header": f"Bearer {KEY}", "fields": {"key": KEY}})
        raise_and_log(f"refused {KEY}")

    text = "\n".join(written(act, log_format=log_format))
    assert text.count("***") == 4
    assert "0123" not in text


@pytest.mark.parametrize("key", [None, Secret("none")])
def test_a_stand_in_for_a_key_is_not_looked_for(written: Callable[..., list[str]], key: Secret | None) -> None:
    [line] = written(lambda: log.info("there are none"), api_key=key)
    assert line.endswith("there are none")


def test_at_debug_the_libraries_still_say_nothing_below_warning(written: Callable[..., list[str]]) -> None:
    def act() -> None:
        for name in ("openai._base_client", "httpx2", "httpcore2.http11", "langchain_openai.chat_models", "other"):
            logging.getLogger(name).debug("request: prompt")
            logging.getLogger(name).info("request: prompt")
        for name in ("inference_trio", "hypercorn.error"):
            logging.getLogger(name).debug("wanted")
        logging.getLogger("openai").warning("wanted")

    lines = written(act, log_level="DEBUG")
    assert [line.split()[2] for line in lines] == ["inference_trio", "hypercorn.error", "openai"]


def test_a_library_that_lowers_its_own_level_is_not_heard_either(written: Callable[..., list[str]]) -> None:
    def act() -> None:
        assert not logging.getLogger("openai").isEnabledFor(logging.INFO)
        logging.getLogger("openai").setLevel(logging.DEBUG)
        logging.getLogger("openai").debug("request: prompt")

    logging.getLogger("openai").setLevel(logging.DEBUG)
    assert written(act, log_level="DEBUG") == []


def test_the_level_of_the_settings_holds_for_the_server_and_hypercorn(written: Callable[..., list[str]]) -> None:
    def act() -> None:
        for name in ("inference_trio.x", "hypercorn.error"):
            logging.getLogger(name).warning("no")
            logging.getLogger(name).error("yes")

    assert [line.split()[-1] for line in written(act, log_level="ERROR")] == ["yes", "yes"]


def test_hypercorn_writes_no_access_log_of_its_own_accord_for_paths_hold_session_ids() -> None:
    assert hypercorn.Config().accesslog is None


# Where lines go


def test_lines_go_to_stderr_and_without_a_file_only_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stop = configure_logging(Settings(log_file=None))
    log.info("hello")
    stop()
    captured = capsys.readouterr()
    assert captured.err.endswith("[- -] hello\n")
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_file_rotates_and_a_bounded_number_of_old_ones_is_kept(
    written: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (logs._FILE_BYTES, logs._OLD_FILES) == (10_000_000, 5)
    monkeypatch.setattr(logs, "_FILE_BYTES", 100)
    monkeypatch.setattr(logs, "_OLD_FILES", 2)
    [last] = written(lambda: [log.info("line %d", number) for number in range(10)])
    assert last.endswith("line 9")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.log", "a.log.1", "a.log.2"]


def test_an_existing_file_is_continued(written: Callable[..., list[str]]) -> None:
    written(lambda: log.info("one"))
    assert [line.split()[-1] for line in written(lambda: log.info("two"))] == ["one", "two"]


def test_a_file_that_cannot_be_opened_is_a_configuration_error_and_changes_nothing(
    written: Callable[..., list[str]], tmp_path: Path
) -> None:
    def act() -> None:
        with pytest.raises(ConfigurationError) as caught:
            configure_logging(Settings(log_file=tmp_path / "none" / "a.log", log_level="CRITICAL"))
        message = str(caught.value)
        assert message.startswith("INFERENCE_LOG_FILE: ")
        assert message.endswith("cannot be opened: No such file or directory")
        log.info("still here")

    threads = threading.active_count()
    [line] = written(act)
    assert line.endswith("still here")
    assert threading.active_count() == threads


def test_configuring_again_replaces_what_was_there_and_leaks_nothing(tmp_path: Path) -> None:
    threads, handlers = threading.active_count(), list(logging.getLogger().handlers)
    for number in range(20):
        stop = configure_logging(Settings(log_file=tmp_path / f"{number}.log"))
        log.info("line %d", number)
        assert threading.active_count() == threads + 1
        assert len(logging.getLogger().handlers) == len(handlers) + 1
    stop()
    stop()
    assert threading.active_count() == threads
    assert logging.getLogger().handlers == handlers
    for number in range(20):
        [line] = (tmp_path / f"{number}.log").read_text().splitlines()
        assert line.endswith(f"line {number}")


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "raise RuntimeError"])
def test_everything_is_written_when_the_process_exits(tmp_path: Path, ending: str) -> None:
    file = tmp_path / "a.log"
    program = f"""
import logging
from pathlib import Path
from inference_trio.logs import configure_logging
from inference_trio.settings import Settings
configure_logging(Settings(log_file=Path({str(file)!r})))
for number in range(500):
    logging.getLogger("inference_trio").info("line %d", number)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert [line.split()[-1] for line in file.read_text().splitlines()] == [str(number) for number in range(500)]
    assert done.stderr.count("[- -] line ") == 500


# When writing is slow


class StuckStream:
    """A terminal that takes nothing until it is released."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()

    def write(self, text: str) -> None:
        self.entered.set()
        assert self.released.wait(30)

    def flush(self) -> None:
        pass


@pytest.fixture
def stuck() -> Iterator[StuckStream]:
    stream = StuckStream()
    yield stream
    stream.released.set()


def overflow(stuck: StuckStream) -> None:
    """One line is being written, three wait, six are dropped."""
    log.info("line 0")
    assert stuck.entered.wait(30)
    for number in range(1, 10):
        log.info("line %d", number)


def test_lines_that_find_no_room_are_dropped_and_counted(
    written: Callable[..., list[str]], stuck: StuckStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act() -> None:
        with log_context(task_id="t1"):
            overflow(stuck)
            stuck.released.set()

    monkeypatch.setattr(logs, "_QUEUE_LINES", 3)
    monkeypatch.setattr(sys, "stderr", stuck)
    *lines, notice = written(act)
    assert [line.split("] ")[1] for line in lines] == ["line 0", "line 1", "line 2", "line 3"]
    assert " WARNING inference_trio.logs [- -] 6 lines were dropped here: " in notice


def test_the_count_stands_where_the_lines_are_missing(
    written: Callable[..., list[str]], stuck: StuckStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act() -> None:
        with log_context(task_id="t1"):
            overflow(stuck)
            stuck.released.set()
            [handler] = [each for each in logging.getLogger().handlers if isinstance(each, logs._LineQueue)]
            handler._lines.join()
            log.info("after")

    monkeypatch.setattr(logs, "_QUEUE_LINES", 3)
    monkeypatch.setattr(sys, "stderr", stuck)
    *_, before, notice, after = written(act)
    assert before.endswith("line 3")
    assert "[- -] 6 lines were dropped here" in notice
    assert after.endswith("[t1 -] after")


def test_ending_the_log_waits_for_room_instead_of_failing(
    written: Callable[..., list[str]], stuck: StuckStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act() -> None:
        log.info("line 0")
        assert stuck.entered.wait(30)
        for number in range(1, 4):
            log.info("line %d", number)
        [handler] = [each for each in logging.getLogger().handlers if isinstance(each, logs._LineQueue)]
        wait_until_written = handler._lines.join

        def release_and_wait() -> None:
            stuck.released.set()
            wait_until_written()

        monkeypatch.setattr(handler._lines, "join", release_and_wait)

    monkeypatch.setattr(logs, "_QUEUE_LINES", 3)
    monkeypatch.setattr(sys, "stderr", stuck)
    assert [line.split("] ")[1] for line in written(act)] == ["line 0", "line 1", "line 2", "line 3"]
