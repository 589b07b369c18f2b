"""`sn29 demo` and `sn29 localnet up`: a subnet on this machine, told as a story, or for rehearsals."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sn29.errors import Reason, Rejected

if TYPE_CHECKING:
    from sn29.settings import LocalnetSettings


def demo(words: list[str]) -> int:
    """The demo, and its page."""
    from sn29.settings import DemoSettings, read

    settings = read(DemoSettings, words)
    from sn29.localnet.demo import check_outcomes, check_training, run
    from sn29.report.page import shown, write_page

    ended = run(settings)
    page = write_page(
        ended.folder / "report.html", [shown(r) for r in ended.records], ended.published, ended.names, ended.curves, ended.unigram
    )
    check_outcomes(ended)
    if not settings.steps:
        check_training(ended)
    print(f"\nThe page with curves, win matrix and weights: {page}")
    state, rules = ended.folder / "validator", ended.folder / "localnet" / "competitions"
    operator = ["sn29", "report", "--state.dir", str(state), "--competitions.dir", str(rules), "--serve", "127.0.0.1:2929"]
    print(f"As an operator sees it:\n  {shlex.join(operator)}")
    hotkey = next(hotkey for hotkey, name in ended.names.items() if name == "giant")
    why = shlex.join(["sn29", "explain", hotkey, "--records", str(state / "records")])
    print(f"Why giant was refused (`giant`, the owner of its repository, does as well as the hotkey):\n  {why}")
    if settings.open_page:
        import webbrowser

        webbrowser.open(page.as_uri())
    return 0


def up(words: list[str]) -> int:
    """In the foreground, until Ctrl-C or SIGTERM."""
    from sn29.settings import LocalnetSettings, read

    settings = read(LocalnetSettings, words)
    with _alone(settings.localnet_dir):
        return _up(settings)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A lock that ends with the process, with its number in it. Raises Rejected(SETTING) where another process has it, and for a
    folder that cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / "lock").open("a+")
    except OSError as error:
        got = f"{folder}: {error.strerror or error}"
        raise Rejected(Reason.SETTING, got, "a folder that can be written to", "--localnet.dir") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            got = f"{folder}, where a localnet is up already (process {stream.read(20).strip()})"
            raise Rejected(Reason.SETTING, got, "one at a time: end that one, or name another folder", "--localnet.dir") from None
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        yield


def _up(settings: LocalnetSettings) -> int:
    from sn29.localnet import text
    from sn29.localnet.network import TRAINING_FILES, prepare
    from sn29.settings import default_cache

    def say(what: str) -> None:
        print(f"  {what}", flush=True)

    texts = text.build(default_cache(), say)
    localnet = prepare(
        settings.localnet_dir, texts, port=settings.port, block_seconds=settings.block_seconds,
        window_blocks=settings.window_blocks, say=say,
    )  # fmt: skip
    common = f"--network localnet --localnet.dir {localnet.folder} --hub.endpoint {localnet.endpoint}"
    common += f" --competitions.dir {localnet.competitions} --wallet.path {settings.wallet_path}"
    commands = []
    for entry, validator in [(e, False) for e in settings.miners] + [(e, True) for e in settings.validators]:
        wallet, _, hotkey = entry.partition("/")
        hotkey = hotkey or "default"
        address = localnet.register(wallet, hotkey, settings.wallet_path, validator=validator)
        print(f"  registered {entry}: {address}")
        start = "sn29 validator" if validator else f"env HF_TOKEN={localnet.hub_token(wallet)} sn29 miner"  # no shell is needed
        keys = f"--wallet.name {wallet} --wallet.hotkey {hotkey}"
        own = f" --repo {wallet}/model --competition c00 --text '{TRAINING_FILES}' --cycles 1 --publish-at 0"
        more = "" if validator else own
        commands.append(f"{start} {keys}{more} {common}")
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # set here, because a shell starts background jobs deaf to SIGINT
        signal.signal(number, lambda *_: over.set())
    with localnet.serve() as hub:
        print(
            f"up: chain and Hub in {localnet.folder}, Hub at {hub.endpoint}; Ctrl-C stops it, all state stays",
            flush=True,
        )
        for command in commands or ["--miner WALLET/HOTKEY and --validator WALLET/HOTKEY register keys and print their commands"]:
            print(f"  {command}", flush=True)
        over.wait()
    print("\ndown: all state stays", flush=True)
    return 0
