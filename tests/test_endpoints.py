"""Failover between endpoints, on embedded chains that misbehave; what real sockets do is in test_chain_faults.py."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest
from chain_net import Net

from sn29.endpoints import STUCK_BLOCKS, Endpoints, Link, NoBlock
from sn29.localnet.ledger import LedgerSubstrate

Look = Callable[[Endpoints], Awaitable[tuple[str, int]]]


class Silent(LedgerSubstrate):
    """A node that says nothing, or nothing to the first so many questions for the head."""

    def __init__(self, path: Path, asked: list[str], questions: int = 10**9) -> None:
        super().__init__(path)
        self.asked, self.questions = asked, questions

    async def block_number(self) -> int:
        self.asked.append("silent")
        if len(self.asked) <= self.questions:
            await asyncio.Event().wait()
        return await super().block_number()


class At(LedgerSubstrate):
    """A node that knows no block after this one."""

    def __init__(self, path: Path, block: int, lag: int = 0) -> None:
        super().__init__(path)
        self.block, self.lag = block, lag

    async def block_number(self) -> int:
        return self.block

    async def finalized_block_number(self) -> int:
        return self.block - self.lag

    async def block_hash(self, block: int | None = None) -> str:
        if block is not None and block > self.block:
            raise NoBlock(block)
        return await super().block_hash(self.block if block is None else block)


async def head(endpoints: Endpoints) -> tuple[str, int]:
    async def question(link: Link) -> tuple[str, int]:
        return link.address, (await endpoints.newest(link)).block

    return await endpoints.ask(question)


async def final(endpoints: Endpoints) -> tuple[str, int]:
    async def question(link: Link) -> tuple[str, int]:
        return link.address, (await endpoints.final(link)).block

    return await endpoints.ask(question)


def story_with(deadline_s: float = 5.0, **makers: Callable[[], Any]) -> Endpoints:
    return Endpoints("local", makers, deadline_s)


def test_a_silent_endpoint_is_left_and_remembered(tmp_path: Path) -> None:
    Net(tmp_path)
    asked: list[str] = []
    endpoints = story_with(
        1.0, silent=lambda: Silent(tmp_path / "chain", asked), good=lambda: LedgerSubstrate(tmp_path / "chain")
    )

    async def story() -> None:
        assert (await head(endpoints))[0] == "good"
        assert (await head(endpoints))[0] == "good"
        await endpoints.close()
        assert (await head(endpoints))[0] == "good"  # also when it connects anew
        assert asked == ["silent"]
        await endpoints.close()

    asyncio.run(story())


def test_when_all_fail_the_last_failure_is_told_and_they_are_asked_again(tmp_path: Path) -> None:
    Net(tmp_path)
    asked: list[str] = []
    endpoints = story_with(0.4, **{name: lambda: Silent(tmp_path / "chain", asked, questions=2) for name in ("a", "b")})

    async def story() -> None:
        with pytest.raises(TimeoutError):
            await head(endpoints)
        assert len(asked) == 2
        assert (await head(endpoints))[0] == "a"  # shunned for longest, so the first to be given another chance
        await endpoints.close()

    asyncio.run(story())


def test_an_endpoint_of_another_chain_is_refused(tmp_path: Path) -> None:
    Net(tmp_path / "ours", seed=1)
    Net(tmp_path / "theirs", seed=2)
    paths = iter([tmp_path / "ours" / "chain", tmp_path / "theirs" / "chain"])
    endpoints = story_with(first=lambda: LedgerSubstrate(next(paths)))

    async def story() -> None:
        await head(endpoints)
        await endpoints.close()
        with pytest.raises(bt.RpcConnectionError, match="first is of another chain: genesis 0x"):
            await head(endpoints)
        await endpoints.close()

    asyncio.run(story())


@pytest.mark.parametrize("look", [head, final])
def test_an_endpoint_that_stands_still_is_left_for_one_that_moves(tmp_path: Path, look: Look) -> None:
    net = Net(tmp_path)
    net.ledger.advance(100)
    endpoints = story_with(stuck=lambda: At(tmp_path / "chain", 100), good=lambda: LedgerSubstrate(tmp_path / "chain"))

    async def story() -> None:
        assert await look(endpoints) == ("stuck", 100)
        await asyncio.sleep((STUCK_BLOCKS + 1) * net.ledger.block_seconds)
        assert (await look(endpoints))[0] == "good"
        await endpoints.close()

    asyncio.run(story())


def test_of_one_endpoint_it_is_said_that_it_stands_still(tmp_path: Path) -> None:
    net = Net(tmp_path)
    net.ledger.advance(100)
    only = At(tmp_path / "chain", 100)
    endpoints = story_with(only=lambda: only)

    async def story() -> None:
        assert await final(endpoints) == ("only", 100)
        await asyncio.sleep((STUCK_BLOCKS + 1) * net.ledger.block_seconds)
        for _ in range(2):
            with pytest.raises(bt.RpcConnectionError, match="only stands still: no final block after 100 for "):
                await final(endpoints)
        only.block = 101
        assert await final(endpoints) == ("only", 101)
        await endpoints.close()

    asyncio.run(story())


def test_what_is_final_never_goes_back(tmp_path: Path) -> None:
    """Neither over another endpoint nor over the same one, which may be many machines behind one address."""
    net = Net(tmp_path, finality_lag=5)
    net.ledger.advance(100)
    first, behind = At(tmp_path / "chain", 90), At(tmp_path / "chain", 60)
    endpoints = story_with(first=lambda: first, behind=lambda: behind)

    async def lose(link: Link) -> None:
        if link.address == "first":
            raise bt.RpcConnectionError("lost")

    async def story() -> None:
        assert await final(endpoints) == ("first", 90)
        with pytest.raises(bt.RpcConnectionError, match="behind lags: it has not block 90, which is final"):
            await endpoints.ask(lose)
        assert await final(endpoints) == ("first", 90)
        first.block = 80
        with pytest.raises(bt.RpcConnectionError, match="lags: it has not block 90"):
            await final(endpoints)
        with pytest.raises(bt.RpcConnectionError, match="lags: "):
            await head(endpoints)
        behind.block = 95
        assert await final(endpoints) == ("behind", 95)
        await endpoints.close()

    asyncio.run(story())


def test_a_node_that_has_the_block_but_does_not_know_that_it_is_final(tmp_path: Path) -> None:
    net = Net(tmp_path, finality_lag=5)
    net.ledger.advance(100)
    ahead, behind = At(tmp_path / "chain", 99), At(tmp_path / "chain", 99, lag=2)
    endpoints = story_with(ahead=lambda: ahead, behind=lambda: behind)

    async def lose(link: Link) -> None:
        if link.address == "ahead":
            raise bt.RpcConnectionError("lost")

    async def story() -> None:
        assert await final(endpoints) == ("ahead", 99)
        await endpoints.ask(lose)
        assert await final(endpoints) == ("behind", 99)
        await endpoints.close()

    asyncio.run(story())


def test_a_final_block_that_an_endpoint_has_not_is_asked_of_another(tmp_path: Path) -> None:
    net = Net(tmp_path)
    net.ledger.advance(100)
    set_back, good = At(tmp_path / "chain", 100), At(tmp_path / "chain", 100)
    endpoints = story_with(set_back=lambda: set_back, good=lambda: good)

    async def hash_of_100(link: Link) -> str:
        await link.substrate.block_hash(100)
        return link.address

    async def story() -> None:
        await final(endpoints)
        assert await endpoints.ask(hash_of_100) == "set_back"
        set_back.block = 50  # behind the connection that stays open
        assert await endpoints.ask(hash_of_100) == "good"
        with pytest.raises(bt.ChainError, match="no block at height 101"):  # nobody has it: an answer, not a failure
            await endpoints.ask(lambda link: link.substrate.block_hash(101))
        assert (await final(endpoints))[0] == "good"
        await endpoints.close()

    asyncio.run(story())


def test_a_refusal_under_a_policy_is_not_carried_to_another_endpoint(tmp_path: Path) -> None:
    Net(tmp_path)
    asked: list[str] = []

    class Refusing(LedgerSubstrate):
        async def block_number(self) -> int:
            asked.append("refused")
            if len(asked) == 1:
                raise bt.RpcPolicyError("too many requests", retry_after="1")
            return await super().block_number()

    endpoints = story_with(refusing=lambda: Refusing(tmp_path / "chain"), other=lambda: LedgerSubstrate(tmp_path / "chain"))

    async def story() -> None:
        assert (await head(endpoints))[0] == "refusing"
        assert len(asked) == 2
        await endpoints.close()

    asyncio.run(story())


class Shut(LedgerSubstrate):
    """A node that refuses every question."""

    def __init__(self, path: Path, asked: list[str], **refusal: Any) -> None:
        super().__init__(path)
        self.asked, self.refusal = asked, refusal

    async def block_number(self) -> int:
        self.asked.append("refused")
        raise bt.RpcPolicyError("go away", **self.refusal)


@pytest.mark.parametrize("status", [403, 1008])
def test_an_endpoint_that_shuts_us_out_is_left(tmp_path: Path, status: int) -> None:
    Net(tmp_path)
    asked: list[str] = []
    endpoints = story_with(
        shut=lambda: Shut(tmp_path / "chain", asked, status_code=status), good=lambda: LedgerSubstrate(tmp_path / "chain")
    )

    async def story() -> None:
        for _ in range(3):
            assert (await head(endpoints))[0] == "good"
        assert asked == ["refused"]
        await endpoints.close()

    asyncio.run(story())


def test_an_endpoint_that_refuses_again_and_does_not_say_for_how_long_is_left(tmp_path: Path) -> None:
    Net(tmp_path)
    asked: list[str] = []
    makers = {"limited": lambda: Shut(tmp_path / "chain", asked), "good": lambda: LedgerSubstrate(tmp_path / "chain")}
    endpoints = Endpoints("local", makers, 5.0, pause_s=0.2)

    async def story() -> None:
        assert (await head(endpoints))[0] == "good"
        assert len(asked) == 2  # waited for once
        await endpoints.close()

    asyncio.run(story())


def test_when_the_only_endpoint_shuts_us_out_it_is_said_and_asked_again_after_a_pause(tmp_path: Path) -> None:
    Net(tmp_path)
    asked: list[str] = []
    endpoints = story_with(shut=lambda: Shut(tmp_path / "chain", asked, status_code=403, retry_after="1"))

    async def story() -> None:
        for _ in range(2):
            with pytest.raises(bt.RpcPolicyError, match="go away"):
                await head(endpoints)
        assert len(asked) == 2  # the second after the second that it named
        await endpoints.close()

    asyncio.run(story())
