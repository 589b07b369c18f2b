"""Objects that many tests need, all real: tiny models made once a session, and a drand beacon for the SDK to seal for."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from beacon import install

from sn29.evaluation.probes import Probes
from sn29.evaluation.worker import Chosen, Decide, Evaluated, Here, Job

install()  # before any test imports bittensor

_CACHES = tempfile.TemporaryDirectory(prefix="sn29-tests-")
os.environ["BITTENSOR_RUNTIME_CACHE_DIR"] = _CACHES.name  # the SDK's, by genesis: chains of tests have no business in the user's
os.environ["BTCLI_TOKEN_SYMBOLS_CACHE"] = str(Path(_CACHES.name) / "token_symbols.json")


_LONG = (
    "test_the_demo_tells_its_story",
    "test_a_validator_killed_at_every_stage_ends_where_an_undisturbed_one_does",
    "test_two_miners_take_the_crown_from_each_other",
    "test_a_validator_ends_in_time_at_every_stage_and_goes_on",
    "test_a_new_validator_is_at_work_in_the_window_that_is_open",
    "test_a_thousand_operations_under_random_faults_lose_nothing_and_write_nothing_twice",
)
"""Tests of minutes, most of them waiting for blocks."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: one process has them to itself, and the others the rest, instead of all waiting for it at the end."""
    items.sort(key=lambda item: item.name.partition("[")[0] not in _LONG)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_checkpoint(family, seed=0, **config) -> folder as save_pretrained writes it; a model of some 20,000 parameters."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    shape = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip

    def make(family: str = "LlamaForCausalLM", seed: int = 0, **config: Any) -> Path:
        torch.manual_seed(seed)
        config_class = getattr(transformers, family.removesuffix("ForCausalLM") + "Config")
        model = getattr(transformers, family)(config_class(**{**shape, **config}))
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json with the 256 bytes and two merges (ids 256, 257): lossless, and small enough for a tiny model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)} | {"th": 256, "the": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def model(make_checkpoint: Callable[..., Path], byte_tokenizer: Path, tmp_path: Path) -> Callable[..., Path]:
    """model(seed, **config) -> a legal checkpoint with its tokenizer in a folder of its own, that may be changed."""

    def make(seed: int = 0, **config: Any) -> Path:
        source = make_checkpoint(seed=seed, **config)
        folder = shutil.copytree(source, tmp_path / "models" / f"{source.name}-{len(list(tmp_path.glob('models/*')))}")
        shutil.copy(byte_tokenizer, folder / "tokenizer.json")
        return folder

    return make


@pytest.fixture
def events() -> Iterator[list[tuple[str, str]]]:
    """(event, sentence) of everything that is told from here on."""
    from loguru import logger

    from sn29 import telemetry

    found: list[tuple[str, str]] = []
    telemetry.configure(level="CRITICAL")
    handler = logger.add(lambda m: found.append((m.record["extra"]["event"], m.record["message"])), level="INFO")
    yield found
    logger.remove(handler)


T = TypeVar("T")


class OnItsOwnLoop:
    """`Here` for tests that each have an event loop of their own: one fork server a session, which takes 5 s to start."""

    slots = 1

    def __init__(self, work_dir: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._here = Here(work_dir)

    @property
    def server_pid(self) -> int:
        process = self._here._server._process
        assert process is not None
        return process.pid

    async def _there(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def choose(self, vocab_size: int, *, device: str, dtype: str) -> Chosen:
        return await self._there(self._here.choose(vocab_size, device=device, dtype=dtype))

    async def evaluate(self, job: Job, *, deadline_s: float, memory_bytes: int, decide: Decide | None = None) -> Evaluated:
        return await self._there(self._here.evaluate(job, deadline_s=deadline_s, memory_bytes=memory_bytes, decide=decide))

    async def self_test(self, *, device: str, dtype: str, threads: int, deadline_s: float = 300) -> Probes:
        return await self._there(self._here.self_test(device=device, dtype=dtype, threads=threads, deadline_s=deadline_s))

    async def close(self) -> None:
        await self._there(self._here.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


@pytest.fixture(scope="session")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnItsOwnLoop]:
    """What evaluates on this machine."""
    found = OnItsOwnLoop(tmp_path_factory.mktemp("evaluations"))
    yield found
    asyncio.run(found.close())
