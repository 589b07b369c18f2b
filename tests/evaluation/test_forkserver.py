from __future__ import annotations

import asyncio
import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sn29.errors import Unavailable
from sn29.evaluation.forkserver import ForkServer, ServerEnded

HERE = "tests.evaluation.test_forkserver"

# --- what children and server are asked to do --------------------------------------------------------------------------


def tells(argument: str, talk: socket.socket | None) -> None:
    """Everything that a child knows, in a file."""
    found = {
        "argument": argument,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "threads": len(os.listdir("/proc/self/task")),
    }
    open_files = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")]
    Path("told").write_text(json.dumps({**found, "pid": os.getpid(), "parent": os.getppid(), "open": open_files, "left": left}))


left = "nothing"


def leaves(argument: str) -> str:
    global left
    left = argument
    return argument.upper()


def leaves_and_tells(argument: str, talk: socket.socket | None) -> None:
    leaves(argument)
    tells(argument, talk)


def answers(argument: str, talk: socket.socket) -> None:
    while word := talk.recv(100):
        talk.sendall(word[::-1])


def fails(argument: str, talk: socket.socket | None) -> None:
    raise ValueError(argument)


def kills_itself(argument: str, talk: socket.socket | None) -> None:
    os.kill(os.getpid(), int(argument))


def sleeps(argument: str, talk: socket.socket | None) -> None:
    if os.fork() == 0:  # a grandchild in the same group
        time.sleep(60)
    Path(argument).write_text(str(os.getpid()))
    time.sleep(60)


def says_when_the_interpreter_closes(argument: str) -> str:
    atexit.register(Path(argument).write_text, "closed")
    return ""


def fails_in_the_server(argument: str) -> str:
    raise ValueError(argument)


@pytest.fixture(autouse=True)
def these_functions_can_be_imported(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


# --- tests ------------------------------------------------------------------------------------------------------------


def served(tell, **more):
    async def story():
        async with ForkServer(libraries=[HERE], **more) as server:
            return await tell(server)

    return asyncio.run(story())


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


async def appears(path: Path) -> str:
    while not (path.exists() and path.read_text()):
        await asyncio.sleep(0.01)
    return path.read_text()


def test_a_child_knows_nothing_of_the_validator_and_nothing_of_its_sisters(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    async def two(server):
        for name in ("one", "two"):
            folder = tmp_path / name
            folder.mkdir()
            assert await server.run(f"{HERE}:leaves_and_tells", name, folder=folder, deadline_s=60) == 0
        return [json.loads((tmp_path / name / "told").read_text()) for name in ("one", "two")]

    one, two = served(two)
    assert (one["argument"], one["folder"], one["left"]) == ("one", str(tmp_path / "one"), "one")
    assert "hf_secret" not in json.dumps(one)
    assert one["environment"]["HOME"] == str(tmp_path / "one")
    assert one["threads"] == 1
    assert one["pid"] != two["pid"]
    assert one["parent"] == two["parent"] != os.getpid()
    assert not [name for name in one["open"] if "socket" in name or "pidfd" in name or "eventpoll" in name]
    assert (tmp_path / "two" / "errors").read_bytes() == b""


def test_what_the_server_was_called_for_is_there_in_every_child(tmp_path):
    async def story(server):
        assert await server.call(f"{HERE}:leaves", "compiled") == "COMPILED"
        assert await server.run(f"{HERE}:tells", "", folder=tmp_path, deadline_s=60) == 0
        with pytest.raises(Unavailable, match="ValueError: no compiler"):
            await server.call(f"{HERE}:fails_in_the_server", "no compiler")
        assert await server.run(f"{HERE}:tells", "", folder=tmp_path, deadline_s=60) == 0

    served(story)
    assert json.loads((tmp_path / "told").read_text())["left"] == "compiled"


def test_a_child_can_be_talked_to(tmp_path):
    heard = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for word in (b"abc", b"xyz"):
            writer.write(word)
            heard.append(await reader.read(100))
        writer.write_eof()

    async def story(server):
        return await server.run(f"{HERE}:answers", "", folder=tmp_path, deadline_s=60, talk=talk)

    assert served(story) == 0
    assert heard == [b"cba", b"zyx"]


def test_a_conversation_that_fails_ends_the_child(tmp_path):
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await appears(tmp_path / "pid")
        raise ValueError("not what was agreed")

    async def story(server):
        with pytest.raises(ValueError, match="not what was agreed"):
            await server.run(f"{HERE}:sleeps", str(tmp_path / "pid"), folder=tmp_path, deadline_s=60, talk=talk)
        assert gone(int((tmp_path / "pid").read_text()))

    served(story)


def test_how_a_child_ended_is_told_and_the_others_go_on(tmp_path):
    async def story(server):
        folders = [tmp_path / str(n) for n in range(5)]
        for folder in folders:
            folder.mkdir()
        targets = [("tells", ""), ("fails", "why"), ("kills_itself", "11"), ("kills_itself", "9"), ("no_such_function", "")]
        running = [
            server.run(f"{HERE}:{name}", argument, folder=folder, deadline_s=60)
            for (name, argument), folder in zip(targets, folders, strict=True)
        ]
        return await asyncio.gather(*running)

    assert served(story) == [0, 1, -signal.SIGSEGV, -signal.SIGKILL, 1]
    assert "ValueError: why" in (tmp_path / "1" / "errors").read_text()


def test_at_its_deadline_a_child_is_killed_with_all_that_it_started(tmp_path):
    async def story(server):
        with pytest.raises(TimeoutError):
            await server.run(f"{HERE}:sleeps", str(tmp_path / "pid"), folder=tmp_path, deadline_s=1)
        assert await server.run(f"{HERE}:tells", "", folder=tmp_path, deadline_s=60) == 0

    served(story)
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_cancelled_run_leaves_no_child(tmp_path):
    async def story(server):
        running = asyncio.ensure_future(server.run(f"{HERE}:sleeps", str(tmp_path / "pid"), folder=tmp_path, deadline_s=60))
        pid = int(await appears(tmp_path / "pid"))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return pid

    assert gone(served(story))


def test_a_server_that_died_takes_its_children_along_and_the_next_run_has_a_new_one(tmp_path):
    async def story(server):
        running = asyncio.ensure_future(server.run(f"{HERE}:sleeps", str(tmp_path / "pid"), folder=tmp_path, deadline_s=60))
        pid = int(await appears(tmp_path / "pid"))
        os.kill(server._process.pid, signal.SIGKILL)
        with pytest.raises(ServerEnded):
            await running
        assert gone(pid)
        return await server.run(f"{HERE}:tells", "", folder=tmp_path, deadline_s=60)

    assert served(story) == 0


def test_a_hundred_children_leave_nothing_behind(tmp_path):
    async def story(server):
        await server.run(f"{HERE}:tells", "", folder=tmp_path, deadline_s=60)
        files = Path(f"/proc/{server._process.pid}/fd")
        before = len(list(files.iterdir()))
        for n in range(100):
            await server.run(
                f"{HERE}:kills_itself", str(signal.SIGKILL if n % 2 else signal.SIGABRT), folder=tmp_path, deadline_s=60
            )
        children = Path(f"/proc/{server._process.pid}/task/{server._process.pid}/children").read_text()
        return len(list(files.iterdir())) - before, children

    assert served(story) == (0, "")


def test_a_server_whose_validator_was_killed_ends_with_its_children_and_leaves_no_folder(tmp_path):
    """Its validator is another process, which is killed while a child runs."""
    program = f"""
import asyncio
from pathlib import Path
from sn29.evaluation.forkserver import ForkServer

async def main():
    server = ForkServer(libraries=["{HERE}"])
    await server.call("{HERE}:leaves", "")
    Path("server").write_text(f"{{server._process.pid}} {{server._home.name}}")
    await server.run("{HERE}:sleeps", "{tmp_path}/pid", folder=Path("{tmp_path}"), deadline_s=60)

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path) as validator:
        child = int(asyncio.run(asyncio.wait_for(appears(tmp_path / "pid"), 60)))
        server, home = (tmp_path / "server").read_text().split()
        validator.kill()
    assert gone(int(server))
    assert gone(child)
    assert not Path(home).exists()


def test_a_start_that_is_called_off_ends_the_server_at_once(tmp_path, monkeypatch):
    (tmp_path / "endless.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    async def called_off() -> int | None:
        async with ForkServer(libraries=["endless"]) as server:
            call = asyncio.create_task(server.call("os:getcwd", ""))
            while server._process is None:
                await asyncio.sleep(0.01)
            process = server._process
            call.cancel()
            async with asyncio.timeout(60):
                return await process.wait()

    assert asyncio.run(called_off()) == -signal.SIGKILL


def test_who_closes_it_does_not_wait_for_the_interpreter(tmp_path):
    """With torch in it that is a second and more."""

    async def story() -> None:
        async with ForkServer(libraries=()) as server:
            await server.call(f"{HERE}:says_when_the_interpreter_closes", str(tmp_path / "said"))

    asyncio.run(story())
    assert not (tmp_path / "said").exists()
