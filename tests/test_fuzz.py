"""Seeded fuzzers of what miners write: config.json with safetensors headers and index, and tokenizer.json.

Every case is accepted or refused with a reason. Never another exception, never a hang, never memory without a bound; and
what the metadata accepts is a model that loads.
"""

from __future__ import annotations

import copy
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from zoo.all_cases import TEXTS
from zoo.case import content_of, join, split
from zoo.honest import TOKENIZERS, saved
from zoo.judge import _Memory
from zoo.open_cases import FUZZ_OPEN
from zoo.tokenizer_files import hostile_parts

from sn29.errors import Reason, Rejected, Unavailable
from sn29.models import checkpoint
from sn29.records import ModelId, RepoFile, RepoListing

pytestmark = pytest.mark.timeout(900)
CASES = 2000
LONGEST_S = 30
"""A case that takes longer hangs; on an idle machine the slowest takes a second."""

NASTY: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 16, 2**31, 2**63, 2**70, -(2**63), 1.5, -0.0, 1e308, "", "x", "NaN", "\ud800", "\x00",
    "x" * 70_000, [], [[]], {}, {"a": 1}, [None] * 2000, [0, 2**63], ["F32"], "F32", "BF16", "silu", "default",
    json.loads("[" * 60 + "]" * 60),
)  # fmt: skip
KEYS = (
    "is_causal", "auto_map", "quantization_config", "rope_scaling", "sliding_window", "head_dim", "tie_word_embeddings",
    "num_key_value_heads", "attention_bias", "layer_types", "__metadata__", "dtype", "weight_map", "", "x" * 300,
)  # fmt: skip
SCRAPS = (
    b"NaN",
    b"Infinity",
    b"1e999",
    b"[" * 200,
    b"{",
    b"}",
    b'"',
    b",",
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"//",
    b"\\u0000",
    b"9" * 5000,
    b'\\"' * 10_000,
)


# --- changes ------------------------------------------------------------------------------------------------------------


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        found += places(inner)
    return found


def mutated(value: Any, draw: random.Random, nasty: tuple[Any, ...] = NASTY) -> Any:
    """A copy with one to three values replaced, removed, renamed, added or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        inside = places(value)
        if not inside:
            return value
        container, key = draw.choice(inside)
        kind = draw.randrange(6)
        if kind < 2:
            container[key] = copy.deepcopy(draw.choice(nasty))
        elif kind == 2 and isinstance(container[key], int) and not isinstance(container[key], bool):
            container[key] = draw.choice(
                (container[key] + 1, container[key] - 1, container[key] * 2, -container[key], float(container[key]))
            )
        elif kind == 3:
            del container[key]
        elif kind == 4 and isinstance(container, dict):
            container[draw.choice(KEYS)] = container.pop(key) if draw.random() < 0.5 else copy.deepcopy(draw.choice(nasty))
        else:
            other, at = draw.choice(inside)
            try:
                container[key], other[at] = other[at], container[key]
                json.dumps(value)
            except (KeyError, IndexError, ValueError):  # a value inside itself
                return {}
    return value


def scratched(data: bytes, draw: random.Random) -> bytes:
    """A copy with bytes flipped, cut, doubled or put in."""
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(made) + 1)
        span = draw.choice((1, 1, 8, 100))
        kind = draw.randrange(5)
        if kind == 0 and made:
            made[min(at, len(made) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del made[at : at + span]
        elif kind == 2:
            made[at:at] = made[at : at + span]
        elif kind == 3:
            made[at:at] = draw.choice(SCRAPS)
        else:
            del made[at:]
    return bytes(made)


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Raises TimeoutError inside when it takes longer."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- config.json, headers, index ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus() -> list[dict[str, bytes]]:
    made = [
        saved("LlamaForCausalLM", 1, num_key_value_heads=1, attention_bias=True),
        saved("LlamaForCausalLM", 2, tie_word_embeddings=True, dtype="bfloat16"),
        saved("LlamaForCausalLM", 3, shards="20KB"),
        saved("PhiForCausalLM", 4, eos_token_id=2, qk_layernorm=True),
        saved("Phi3ForCausalLM", 5, eos_token_id=2, sliding_window=8),
    ]
    return [{path: content_of(content) for path, content in files.items()} for files in made]


def a_repository(files: dict[str, bytes], draw: random.Random) -> dict[str, bytes]:
    """One of its structured files changed, or two."""
    files = dict(files)
    structured = [
        path for path in files if path in ("config.json", "model.safetensors.index.json") or path.endswith(".safetensors")
    ]
    for _ in range(draw.choice((1, 1, 1, 2))):
        path = draw.choice([*structured, "config.json"])
        if path.endswith(".json"):
            files[path] = scratched(files[path], draw) if draw.random() < 0.3 else _written(mutated(json_of(files[path]), draw))
        elif draw.random() < 0.3:
            files[path] = scratched(files[path][:4000], draw) + files[path][4000:]
        else:
            try:
                header, body = split(files[path])
            except ValueError:  # scratched before
                continue
            files[path] = join(_written(mutated(header, draw)), body)
    return files


def json_of(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:  # scratched before
        return {}


def _written(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "replace")


def listed(files: dict[str, bytes]) -> RepoListing:
    rows = [RepoFile(path, len(data), checkpoint.git_blob(data)) for path, data in files.items()]
    return RepoListing(ModelId("fuzz", "model", "0" * 40), tuple(sorted(rows)))


def judged(files: dict[str, bytes]) -> str:
    """Reason code, or `accepted`; `inspect_all` must agree."""
    listing = listed(files)

    def read(path: str, start: int, length: int) -> bytes:
        return files[path][start : start + length]

    told = checkpoint.inspect_all(listing, read)
    refusal, facts = None, None
    try:
        facts = checkpoint.inspect(listing, read)
    except Rejected as error:
        refusal = error
    if refusal is None:
        assert (told.refusals, told.facts) == ((), facts)
        return "accepted"
    assert refusal.reason in [each.reason for each in told.refusals]
    for each in (refusal, *told.refusals):
        assert str(each).isprintable(), each
        assert len(str(each)) < 2000, each
    return refusal.reason.code


def test_config_header_and_index(corpus: list[dict[str, bytes]], tmp_path: Path) -> None:
    """2,000 repositories: refused with a reason, or accepted, and then they load."""
    import torch

    memory, found = _Memory(), Counter[str]()
    for seed in range(CASES):
        draw = random.Random(seed)
        files = a_repository(draw.choice(corpus), draw)
        try:
            with no_longer_than(LONGEST_S):
                code = judged(files)
                if code == "accepted":
                    code = _loaded(files, tmp_path / "model", torch.float32)
        except (Exception, Unavailable) as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        found[code] += 1
    assert found["loads"] >= 50, found  # enough of both to have asked anything
    assert sum(found.values()) - found["loads"] - found["not_finite"] >= 1000, found
    assert memory.risen() <= 300e6, f"{memory.risen() / 1e6:.0f} MB"


def _loaded(files: dict[str, bytes], folder: Path, dtype: Any) -> str:
    """Whether what was accepted loads: a model, or NOT_FINITE, which metadata cannot show."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path, data in files.items():
        (folder / path).write_bytes(data)
    try:
        checkpoint.load(folder, dtype=dtype)
    except Rejected as refusal:
        if refusal.reason is not Reason.NOT_FINITE:
            raise
        return refusal.reason.code
    return "loads"


# --- texts that make a reader go back --------------------------------------------------------------------------------

PUMPED = """
import itertools, signal
from sn29.errors import Reason, Rejected, shown
from sn29.models import checkpoint
from sn29.models.config import read_config, strict_json
from sn29.models.tokenizer_json import checked, is_plain_regex
from sn29.records import Commitment, ModelId, RepoFile, RepoListing, Sealed

BEFORE = ("", '{"a":"', '{"a":', '{"a":0.', '{"a":-', "[", "(?i:", "[^", "a/", "model-")
PUMPS = (
    '\\\\"', '"', "\\\\", "[", "{", '{"a":', "[[],", " ", "0", "9", "-", "e", "1e", ",", "a", "a-", "a.", "\\\\u0041",
    "\\\\ud83d", "\u00e9", "(", ")", "(?:", "|", "a|", "a?", "[a", "&", "\\\\p{L}", "'s|", "{1,2}", "00001-of-", "a:",
)
AFTER = ("", '"}', "x")


def tried(read):
    try:
        read()
    except Rejected as refusal:
        assert len(str(refusal)) < 2000, str(refusal)[:3000]


def header(text):
    files = {"config.json": b"{}", "model.safetensors": len(text).to_bytes(8, "little") + text + bytes(8)}
    rows = tuple(RepoFile(path, len(data), "") for path, data in files.items())
    listing = RepoListing(ModelId("a", "b", "0" * 40), rows)
    checkpoint.inspect_all(listing, lambda path, start, length: files[path][start : start + length])


def read_all(text):
    data = text.encode()
    tried(lambda: strict_json(data, Reason.BAD_CONFIG, "x"))
    tried(lambda: read_config(data))
    tried(lambda: header(data))
    tried(lambda: checked(data))
    tried(lambda: ModelId.parse(text))
    tried(lambda: Commitment.parse("5x", 1, data))
    Sealed.parse("5x", 1, data)
    is_plain_regex(text)
    shown(text)
    checkpoint._look_at_files([RepoFile(text, 1, ""), RepoFile(text + ".safetensors", 1, "")])


for case in itertools.product(BEFORE, PUMPS, AFTER):
    print(case, flush=True)
    signal.setitimer(signal.ITIMER_PROF, 3)  # of its processor; it ends the process, also in the middle of one call
    for length in (1000, 64_000):
        read_all(case[0] + case[1] * (length // len(case[1])) + case[2])
print("done")
"""


def test_no_text_is_read_again_and_again() -> None:
    """What is repeated 10,000 times costs what its length costs. Looked at anew from each of its places it would take a
    minute, and half an hour where a header may be longest.

    In a child that is killed: what hangs is a single call of the interpreter, which no alarm in it interrupts.
    """
    done = subprocess.run([sys.executable, "-c", PUMPED], capture_output=True, text=True)
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    assert (done.returncode, last) == (0, "done"), f"ended by {done.returncode} at {last}: {done.stderr[-2000:]}"


# --- tokenizer.json -----------------------------------------------------------------------------------------------------

READER = """
import json, os, resource, sys
from pathlib import Path
from sn29.errors import Rejected
from sn29.models.tokenizer import Tokenizer
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
texts = json.loads(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    try:
        tokenizer = Tokenizer.load(Path(line.strip()))
        kept = all([tokenizer.round_trips(text, tokenizer.encode(text)) for text in texts])
        said = "accepted" if kept and tokenizer.largest_id() >= 0 else "round_trip"
    except Rejected as refusal:
        said = refusal.reason.code if str(refusal).isprintable() else "not printable"
    except BaseException as error:
        said = f"foreign {type(error).__name__}: {error}"[:300].replace(chr(10), " ")
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss begins with the parent's
    print(json.dumps([said, int(peak.split()[1])]), flush=True)
"""


class Reader:
    """A child that reads one tokenizer.json after the other until it dies; then there is another."""

    def __init__(self) -> None:
        self.deaths: list[str] = []
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", READER, json.dumps(TEXTS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def judge(self, path: Path) -> tuple[str, int]:
        """(reason code, `accepted`, `died` or `hung`; the child's peak memory in bytes)."""
        if self._process is None:
            self.start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], LONGEST_S)[0]:
            self.stop()
            return "hung", 0
        line = process.stdout.readline()
        if not line:
            self.stop()
            return "died", 0
        said, peak_kb = json.loads(line)
        return said, peak_kb * 1024

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def a_tokenizer(draw: random.Random, whole: list[dict[str, Any]], parts: dict[str, list[Any]]) -> bytes:
    """An honest one with parts of hostile ones, changed values, or scratched bytes."""
    made = copy.deepcopy(draw.choice(whole))
    if draw.random() < 0.5:
        for name in draw.sample(sorted(parts), draw.choice((1, 1, 2))):
            made[name] = copy.deepcopy(draw.choice(parts[name]))
    if draw.random() < 0.6:
        # the large vocabulary is mutated for itself, so that the small parts get their turn
        aside = made["model"].pop("vocab", None) if isinstance(made["model"], dict) and draw.random() < 0.7 else None
        made = mutated(made, draw)
        if aside is not None and isinstance(made, dict) and isinstance(made.get("model"), dict):
            made["model"]["vocab"] = aside
    data = _written(made)
    return scratched(data, draw) if draw.random() < 0.2 else data


def test_tokenizer_json(tmp_path: Path) -> None:
    """2,000 files, read in a child that is used until it dies."""
    whole, parts = [make() for make in TOKENIZERS.values()], hostile_parts()
    reader, found, notes = Reader(), Counter[str](), []
    path, largest, honest = tmp_path / "tokenizer.json", 0, 0
    try:
        for seed in range(CASES):
            path.write_bytes(a_tokenizer(random.Random(seed), whole, parts))
            said, peak = reader.judge(path)
            honest, largest = honest or peak, max(largest, peak)
            found[said.partition(" ")[0]] += 1
            if said.startswith("foreign") or said in ("died", "hung", "not printable"):
                notes.append(f"seed {seed}: {said}")
    finally:
        reader.stop()
    new = [note for note in notes if note.partition(": ")[2] not in FUZZ_OPEN]
    assert new == [], "\n" + "\n".join(new)
    assert FUZZ_OPEN.keys() <= {note.partition(": ")[2] for note in notes}, "mended: take it off the list"
    assert found["accepted"] >= 100, found
    assert found["tokenizer"] >= 500, found
    assert largest - honest <= 200e6, f"{largest / 1e6:.0f} MB"
