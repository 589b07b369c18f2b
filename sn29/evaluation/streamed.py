"""Models larger than the memory that they may use: evaluated layer by layer, each read from disk while the one before runs.

    rows of packed samples, as the resident engine has them, side by side   [1, row | row | row | ...]    one chunk
    embedding    read piece by piece; each piece gives the hidden states of the tokens that are in it
    layer 0      its weights are there: row after row goes through the stock block, in place      reader: layer 1
    layer 1      the same with the weights that have come meanwhile                               reader: layer 2
    ...          at any time the weights of two blocks, the hidden states of the chunk, and what one row needs in a block
    head         the tiled head over the output layer, row after row

The model is transformers' own, built without weights from the checked config; its own `forward` is called once a chunk. Its
blocks stand in wrappers that take the rows apart, so every operation has the shape that it has in `packed`, and a loss the
same bits (tests/evaluation/test_streamed.py). A chunk is as many rows as memory allows; each chunk reads the weights once.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sn29.errors import Reason, Rejected, Unavailable
from sn29.evaluation.head import MakeHead, TiledHead
from sn29.evaluation.packed import Documents, Profile, Row, _one_thread_an_operation, _sums, _tensors_of, pack
from sn29.models.checkpoint import Tensor as Entry
from sn29.models.checkpoint import opened
from sn29.models.config import ModelConfig, expected_tensors, parse_config

Progress = Callable[[int, int], None]
"""progress(done, of): blocks that all rows of their chunk have gone through."""

_PIECE = 4 << 20
"""Bytes that are read, checked and converted at a time."""
_ALIGNED = 64
"""Bytes: each tensor begins where torch itself would have it begin."""
_TOKEN_BYTES = 128
"""A token's ids, position, place in the embedding's order and -log p, beside its hidden state."""
_SPARE = 16 << 20
"""Bytes for pieces that are being read, converted or gathered, and for what the allocator does not give back at once."""
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# --- how much memory --------------------------------------------------------------------------------------------------


def free_memory(device: str = "cpu") -> int:
    """Bytes that processes may still take: of the machine, of our container if that is less, or of a CUDA device."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # no Linux: at least what there is in all
    try:
        limit, used, more = (Path("/sys/fs/cgroup", f"memory.{name}").read_text() for name in ("max", "current", "stat"))
    except OSError:
        return free
    given_back = sum(int(line.split()[1]) for line in more.splitlines() if line.startswith("inactive_file "))  # files' pages
    return free if limit.strip() == "max" else min(free, int(limit) - int(used) + given_back)


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes beside what the libraries take (and on CUDA beside what the driver takes)."""

    resident: int
    """All weights, and what one row needs in a block."""
    streamed: int
    """The least with which it streams: the weights of two blocks that follow each other, one row, and its hidden states."""
    token: int
    """Of one token more in a chunk."""


def needs(config: ModelConfig, dtype: torch.dtype, profile: Profile, longest: int, threads: int = 1) -> Needs:
    """What a model needs for samples of at most `longest` tokens, of which `threads` rows are computed at a time."""
    shapes = expected_tensors(config)
    layer = _padded((shapes[name] for name in shapes if name.startswith("model.layers.0.")), dtype)  # all are alike
    head = _padded((shapes[name] for name in _head_tensors(shapes).values()), dtype)
    two = layer + max(layer, head)
    row = max(profile.row_tokens, _row_size(longest, profile.row_tokens))
    token = (config.number("hidden_size") + 2 * int(config.head_dim * config.rotary_share)) * dtype.itemsize + _TOKEN_BYTES
    busy = threads * max(row * _row_token_bytes(config, dtype), _head_bytes(config, dtype, profile))
    weights = _padded(shapes.values(), dtype)
    return Needs(weights + busy + row * token + _SPARE, two + busy + row * token + _SPARE, token)


def needs_streaming(
    config: ModelConfig, dtype: torch.dtype, profile: Profile, longest: int, memory_bytes: int, threads: int = 1
) -> bool:
    """Whether a model has to be streamed to stay within so many bytes. Raises Unavailable when even that needs more."""
    found = needs(config, dtype, profile, longest, threads)
    if found.streamed > memory_bytes and found.resident > memory_bytes:
        raise _too_small(found.streamed, memory_bytes)
    return found.resident > memory_bytes


def _too_small(needed: int, allowed: int) -> Unavailable:
    why = f"{needed:,} bytes are needed to evaluate this model layer by layer (two blocks, one row), {allowed:,} are allowed"
    return Unavailable("memory", why)


def _row_size(longest: int, row_tokens: int) -> int:
    return max((row.size for row in pack([longest], row_tokens)), default=0)


def _row_token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of a token while its row is in a block: the larger of attention and MLP as stock modules compute them, with a norm.

    Attention: the projections, their halves turned by the positions, the result twice. MLP: five copies of its width (an
    eager gelu_new). A norm: three float32 copies of the hidden state. Whole runs were measured at 60 to 90% of `needs`.
    """
    hidden, inner, heads = (config.number(name) for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
    attention = 4 * heads * config.head_dim + 4 * config.number("num_key_value_heads", heads) * config.head_dim
    return (3 * hidden + max(attention, 5 * inner)) * dtype.itemsize + 12 * hidden


def _head_bytes(config: ModelConfig, dtype: torch.dtype, profile: Profile) -> int:
    """The tiled head's own: a tile of logits, twice more in float32 with its exponentials, and the tile's hidden states."""
    tiles = profile.tiles
    return tiles.rows * (tiles.columns * (dtype.itemsize + 12) + config.number("hidden_size") * dtype.itemsize)


def _padded(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> int:
    """Bytes of tensors that lie behind each other, each beginning where `_ALIGNED` says."""
    return sum(-(-math.prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED for shape in shapes)


# --- weights on disk --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a model has read so far. Seconds on the wall."""

    num_bytes: int
    """From the files, whatever the type that they are kept in."""
    reading_s: float
    """In which something was being read, checked and converted, summed over threads."""
    waiting_s: float
    """In which a block had to wait for its weights: near 0 when the device is the slower one. On CUDA, where the host runs
    ahead of the device, a bound from above."""


class _Files:
    """Values of a folder's tensors, in the type that is asked for. For several threads."""

    def __init__(self, folder: Path, places: Mapping[str, tuple[str, int, Entry]], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._places = places
        self._open = {path: (folder / path).open("rb", buffering=0) for path in sorted({path for path, _, _ in places.values()})}
        self.checked = False
        """Every value has been read once and found finite."""
        self.num_bytes, self.reading_s = 0, 0.0
        self._counting = threading.Lock()

    def close(self) -> None:
        for stream in self._open.values():
            stream.close()

    def place(self, name: str) -> tuple[str, int]:
        """File, and its byte at which a tensor begins."""
        return self._places[name][:2]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name][2].shape

    def read(self, name: str, into: Tensor, first: int = 0) -> None:
        """Fill `into` [n], on the CPU, with n values of a tensor from its value `first` on.

        Raises Rejected(NOT_FINITE), also for what is finite only in the wider type that the file has.
        """
        begun = time.perf_counter()
        path, start, entry = self._places[name]
        kind = _TYPES[entry.dtype]
        step = _PIECE // kind.itemsize
        staging = into if kind == into.dtype else torch.empty(min(step, len(into)), dtype=kind)
        for at in range(0, len(into), step):
            piece = into[at : at + step]
            raw = piece if staging is into else staging[: len(piece)]
            self._read(path, raw, start + (first + at) * kind.itemsize)
            if raw is not piece:
                piece.copy_(raw)
            # one pass without a copy: 15 to 28 GB/s a core, where isfinite().all() makes 0.7 to 1.3
            if not self.checked and not all(math.isfinite(float(end)) for end in torch.aminmax(piece)):
                raise Rejected(Reason.NOT_FINITE, f"NaN or infinity in {name}", "finite weights")
        with self._counting:
            self.num_bytes += len(into) * kind.itemsize
            self.reading_s += time.perf_counter() - begun

    def _read(self, path: str, into: Tensor, start: int) -> None:
        view = memoryview(into.view(torch.uint8).numpy())  # type: ignore[arg-type]
        while view:
            count = os.preadv(self._open[path].fileno(), [view], start)
            if not count:
                raise Rejected(Reason.TENSORS, f"{path} ends early", "all values of its header", path)
            view, start = view[count:], start + count


def config_of(folder: Path) -> ModelConfig:
    """The checked config of a checkpoint. Raises Rejected."""
    path = folder / "config.json"
    if not path.is_file():
        raise Rejected(Reason.MISSING_FILE, "no config.json", "a folder of a model", "MODEL")
    return parse_config(path.read_bytes())


def _head_tensors(names: Iterable[str]) -> dict[str, str]:
    """weight and bias of the output layer -> tensor; a tied head is the embedding."""
    found = {name.removeprefix("lm_head."): name for name in names if name.startswith("lm_head.")}
    return {"weight": "model.embed_tokens.weight", **found}


@dataclass(frozen=True, slots=True)
class _Block:
    """Tensors that are needed together: of a layer, or of the head."""

    tensors: Mapping[str, str]
    """Name in the block -> name in the files."""


@dataclass
class _Slot:
    """A place for one block's weights, in one piece; on CUDA one on the device beside a pinned one that it is filled from."""

    device: torch.device
    host: Tensor | None = None
    there: Tensor | None = None
    copied: Any = None
    """CUDA event: the device has taken what the host holds."""
    used: Any = None
    """CUDA event: what computes with the weights is done with them. None in new memory, which anything may have used."""

    def fit(self, size: int, dtype: torch.dtype) -> None:
        """Room for exactly so many values; what was there is given back first."""
        if self.host is not None and len(self.host) == size:
            return
        self.host = self.there = self.used = None
        cuda = self.device.type == "cuda"
        self.host = torch.empty(size, dtype=dtype, pin_memory=cuda)
        self.there = torch.empty(size, dtype=dtype, device=self.device) if cuda else self.host


class _Reader:
    """Blocks in the order in which they are needed, each one read while the one before is in use."""

    def __init__(self, files: _Files, device: torch.device) -> None:
        self._files, self._device = files, device
        self.waiting_s = 0.0
        self._side: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def weights(self, blocks: Sequence[_Block]) -> Iterator[dict[str, Tensor]]:
        """Each block's tensors on the device, valid until the next ones are asked for. Raises Rejected as `_Files.read`."""
        slots = (_Slot(self._device), _Slot(self._device))
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._fill, slots[0], blocks[0])
            for number in range(len(blocks)):
                begun = time.perf_counter()
                found = coming.result()
                self.waiting_s += time.perf_counter() - begun
                if number + 1 < len(blocks):
                    coming = pool.submit(self._fill, slots[(number + 1) % 2], blocks[number + 1])
                slot = slots[number % 2]
                if self._side is not None:
                    torch.cuda.current_stream(self._device).wait_event(slot.copied)
                yield found
                if self._side is not None:
                    slot.used = torch.cuda.current_stream(self._device).record_event()

    @torch.inference_mode()
    def _fill(self, slot: _Slot, block: _Block) -> dict[str, Tensor]:
        files = self._files
        step = _ALIGNED // files.dtype.itemsize
        # In the files' order: 8 MB layers come at 1.0 GB/s from a disk of 1.6, in the block's own order at 0.6.
        tensors = dict(sorted(block.tensors.items(), key=lambda pair: files.place(pair[1])))
        sizes = {name: math.prod(files.shape(tensor)) for name, tensor in tensors.items()}
        starts = [0, *accumulate(-(-size // step) * step for size in sizes.values())]
        if slot.copied is not None:
            slot.copied.synchronize()
        slot.fit(starts[-1], files.dtype)
        assert slot.host is not None
        assert slot.there is not None
        for start, (name, size) in zip(starts, sizes.items(), strict=False):
            files.read(tensors[name], slot.host[start : start + size])
        if self._side is not None:
            with torch.cuda.stream(self._side):
                if slot.used is None:
                    self._side.wait_stream(torch.cuda.default_stream(self._device))
                else:
                    self._side.wait_event(slot.used)
                slot.there.copy_(slot.host, non_blocking=True)
                slot.copied = self._side.record_event()
        return {
            name: slot.there[start : start + size].view(files.shape(tensors[name]))
            for start, (name, size) in zip(starts, sizes.items(), strict=False)
        }


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows that go through the model together."""

    spans: Sequence[tuple[int, int]]
    """First token and end of each row in the chunk."""
    documents: Sequence[Documents]
    weights: Iterator[dict[str, Tensor]]
    step: Callable[[], None]
    """Called behind each block."""


class _Now:
    """The chunk that is in the model, for the wrappers, and the threads that share its rows."""

    chunk: _Chunk

    def __init__(self, device: torch.device, threads: int) -> None:
        self.threads = threads if device.type == "cpu" else 1

    def rows(self, work: Callable[[Iterator[int]], None]) -> None:
        """`work` takes numbers of rows until there are none; on a CPU several threads do."""
        left = iter(range(len(self.chunk.spans)))  # next() is one step of the interpreter: no row is taken twice
        lanes = min(self.threads, len(self.chunk.spans))
        if lanes < 2:
            work(left)
            return

        def lane() -> None:
            torch.set_num_threads(1)  # torch keeps it for each thread, as it does inference mode
            with torch.inference_mode():
                work(left)

        with ThreadPoolExecutor(lanes) as pool:
            for part in [pool.submit(lane) for _ in range(lanes)]:
                part.result()


class _Rows(nn.Module):
    """A stock block between hidden states of a chunk [1, tokens, H]: each row by itself, and back into its place."""

    def __init__(self, block: nn.Module, now: _Now, *, streams: bool) -> None:
        super().__init__()
        self.block, self._now, self._streams = block, now, streams
        self._empty = block.state_dict()  # on the meta device: shapes without values

    def forward(self, hidden: Tensor, position_embeddings: Any = None, position_ids: Tensor | None = None, **more: Any) -> Tensor:
        chunk = self._now.chunk
        if self._streams:
            self.block.load_state_dict(next(chunk.weights), assign=True)

        def work(left: Iterator[int]) -> None:
            for number in left:
                start, stop = chunk.spans[number]
                given = more if position_embeddings is None else more | {
                    "position_embeddings": position_embeddings[number],
                    "position_ids": None if position_ids is None else position_ids[:, start:stop],
                    "documents": chunk.documents[number],
                }  # fmt: skip
                hidden[:, start:stop] = self.block(hidden[:, start:stop], **given)

        self._now.rows(work)
        if self._streams:
            self.block.load_state_dict(self._empty, assign=True)
            chunk.step()
        return hidden


class _Angles(nn.Module):
    """The stock rotary positions, one pair of tables a row."""

    def __init__(self, block: nn.Module, now: _Now) -> None:
        super().__init__()
        self.block, self._now = block, now

    def forward(self, hidden: Tensor, position_ids: Tensor) -> list[Any]:
        return [self.block(hidden[:, a:b], position_ids=position_ids[:, a:b]) for a, b in self._now.chunk.spans]


class _Table(nn.Module):
    """The embedding, read in pieces: ids [1, tokens] -> [1, tokens, H], the rows of the table as they are on disk."""

    def __init__(self, files: _Files, name: str) -> None:
        super().__init__()
        self._files, self._name = files, name

    def forward(self, ids: Tensor) -> Tensor:
        files, (rows, width) = self._files, self._files.shape(self._name)
        values, order = ids[0].sort()
        if not 0 <= int(values[0]) <= int(values[-1]) < rows:
            raise IndexError(f"ids from {int(values[0])} to {int(values[-1])} for {rows} rows")
        found = torch.empty((ids.shape[1], width), dtype=files.dtype, device=ids.device)
        step = max(1, _PIECE // (width * files.dtype.itemsize))
        buffer = torch.empty(step * width, dtype=files.dtype)
        firsts = torch.arange(0, rows + step, step, device=ids.device)
        bounds = torch.searchsorted(values, firsts).tolist()
        for number, first in enumerate(range(0, rows, step)):
            begin, end = bounds[number], bounds[number + 1]
            if files.checked and begin == end:
                continue
            count = min(step, rows - first)
            files.read(self._name, buffer[: count * width], first * width)
            piece = buffer[: count * width].view(count, width).to(ids.device)
            for at in range(begin, end, step):
                some = slice(at, min(at + step, end))
                found[order[some]] = piece[values[some] - first]
        return found[None]


class Streamed:
    """A checkpoint that is evaluated layer by layer. Close it, or use it as a context."""

    def __init__(
        self,
        folder: Path,
        *,
        profile: Profile,
        memory_bytes: int,
        dtype: torch.dtype,
        device: str = "cpu",
        threads: int = 1,
        head: MakeHead = TiledHead,
    ) -> None:
        """`memory_bytes` bounds weights, hidden states and activations together, on the device that computes; see `needs`.

        Raises Rejected as `checkpoint.load` does of config, headers and tensors; a weight that is not finite is found by the
        first evaluation, before it gives a loss. Memory that is too small is found there too.
        """
        self.config, places = opened(folder)
        self.profile, self.memory_bytes, self.dtype = profile, memory_bytes, dtype
        self.device, self.threads, self._head = torch.device(device), threads, head
        model = _stock_model(self.config, f"sn29_{profile.attention}")
        named = {name for name, _ in model.named_parameters()}  # a tied head has the embedding's name here
        if named != places.keys():
            wrong = sorted(named ^ places.keys())
            raise Rejected(Reason.TENSORS, ", ".join(wrong)[:300], "every tensor loaded, none left over")
        self._files = _Files(folder, places, dtype)
        self._reader = _Reader(self._files, self.device)
        self._now = _Now(self.device, threads)
        self._base: nn.Module = model.base_model
        self._blocks = [*self._wrap_layers(), _Block(_head_tensors(places))]
        try:
            self._wrap_the_rest()
        except Rejected:
            self.close()
            raise

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._files.close()

    @property
    def traffic(self) -> Traffic:
        return Traffic(self._files.num_bytes, self._files.reading_s, self._reader.waiting_s)

    def _wrap_layers(self) -> Iterator[_Block]:
        layers: Any = self._base.layers
        for number, layer in enumerate(layers):
            yield _Block({name: f"model.layers.{number}.{name}" for name, _ in layer.named_parameters()})
            layers[number] = _Rows(layer, self._now, streams=True)

    @torch.inference_mode()
    def _wrap_the_rest(self) -> None:
        """What is small stays: the last norm with its weights, and the rotary positions, made anew outside the meta device."""
        base: Any = self._base
        for name, child in [*base.named_children()]:
            weights = {key: f"model.{name}.{key}" for key, _ in child.named_parameters()}
            if name == "embed_tokens":
                base.embed_tokens = _Table(self._files, "model.embed_tokens.weight")
            elif name == "rotary_emb":
                base.rotary_emb = _Angles(type(child)(config=base.config).to(self.device), self._now)
            elif name != "layers" and weights:
                slot = _Slot(self.device)
                child.load_state_dict(self._reader._fill(slot, _Block(weights)), assign=True)
                if slot.copied is not None:
                    slot.copied.synchronize()
                setattr(base, name, _Rows(child, self._now, streams=False))

    def nats(self, samples: Sequence[Sequence[int]], start_token: int, progress: Progress | None = None) -> list[float]:
        """As `packed.all_nats_packed` with the same profile, to the bit: nats of each sample, +inf where it is not finite.

        Raises Rejected(NOT_FINITE) for a weight, and Unavailable when memory is too small, naming both values.
        """
        found: dict[int, float] = {}
        for rows, per_token in self._per_token(samples, start_token, progress):
            found.update(_sums(per_token, rows, [len(ids) for ids in samples]))
        return [found.get(number, 0.0) for number in range(len(samples))]

    def token_nats(self, samples: Sequence[Sequence[int]], start_token: int, progress: Progress | None = None) -> list[Tensor]:
        """-log p of every token, float32 [tokens] a sample: for probes, which can so ride on the samples' pass."""
        found = [torch.zeros(0) for _ in samples]
        for rows, per_token in self._per_token(samples, start_token, progress):
            numbers = [number for row in rows for number in row.samples]
            for number, values in zip(numbers, per_token.split_with_sizes([len(samples[n]) for n in numbers]), strict=True):
                found[number] = values
        return found

    @torch.inference_mode()
    def _per_token(
        self, samples: Sequence[Sequence[int]], start_token: int, progress: Progress | None
    ) -> list[tuple[list[Row], Tensor]]:
        """Rows of each chunk, and -log p [tokens] of theirs on the CPU."""
        if not any(samples):
            self._per_token([[0]], start_token, progress)  # the weights are checked even so
            return []
        rows = pack([len(ids) for ids in samples], self.profile.row_tokens)
        chunks = [*self._chunks(rows, max(map(len, samples)))]
        done, total = 0, len(chunks) * len(self._blocks)

        def step() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        with _one_thread_an_operation(self.device), _freed_at_once():
            return [(some, self._through(some, samples, start_token, step)) for some in chunks]

    def _chunks(self, rows: Sequence[Row], longest: int) -> Iterator[list[Row]]:
        """Rows in order, as many at a time as memory allows, in chunks of about one size. Raises Unavailable."""
        threads = self.threads if self.device.type == "cpu" else 1
        found = needs(self.config, self.dtype, self.profile, longest, threads)
        if found.streamed > self.memory_bytes:
            raise _too_small(found.streamed, self.memory_bytes)
        largest = max(row.size for row in rows)
        most = largest + (self.memory_bytes - found.streamed) // found.token
        total = sum(row.size for row in rows)
        wanted = min(most, -(-total // -(-total // most)) + largest)  # two chunks of one half, not one full and a rest
        left = iter(rows)
        taken: list[Row] = []
        for row in left:
            if taken and sum(r.size for r in taken) + row.size > wanted:
                yield taken
                taken = []
            taken.append(row)
        yield taken

    def _through(
        self, rows: Sequence[Row], samples: Sequence[Sequence[int]], start_token: int, step: Callable[[], None]
    ) -> Tensor:
        """One chunk through the whole model: -log p [tokens] of its rows' samples, in their order, on the CPU."""
        made = [_tensors_of([samples[n] for n in row.samples], row.size, start_token, self.device) for row in rows]
        ends = [*accumulate(row.size for row in rows)]
        spans = [*zip([0, *ends], ends, strict=False)]
        ids, positions = torch.cat([each[0] for each in made], dim=1), torch.cat([each[1] for each in made], dim=1)
        asked = [each[2] for each in made]
        with contextlib.closing(self._reader.weights(self._blocks)) as weights:  # type: ignore[type-var]
            self._now.chunk = _Chunk(spans, [each[3] for each in made], weights, step)
            hidden = self._base(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            head = next(weights)
            found: list[Tensor] = [torch.zeros(0)] * len(rows)

            def work(left: Iterator[int]) -> None:
                tiled, taken = self._head(head["weight"], head.get("bias"), self.profile.tiles), []
                for number in left:
                    taken.append(number)
                    start = spans[number][0]
                    tiled.add(hidden[0, start : start + len(asked[number])], asked[number])
                per_token = tiled.finish().cpu()
                for number, part in zip(taken, per_token.split_with_sizes([len(asked[n]) for n in taken]), strict=True):
                    found[number] = part

            self._now.rows(work)
            step()
        self._files.checked = True  # each chunk reads every tensor
        return torch.cat(found)


def _stock_model(config: ModelConfig, attention: str) -> Any:
    """transformers' model of the checked numbers, without weights."""
    import transformers

    made = getattr(transformers, config.family.removesuffix("ForCausalLM") + "Config")(**config.settings())
    with torch.device("meta"):
        model = getattr(transformers, config.family)(made)
    model.requires_grad_(False)
    model.set_attn_implementation(attention)
    return model.eval()


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Of glibc's mallopt."""


@contextlib.contextmanager
def _freed_at_once() -> Iterator[None]:
    """Memory that is freed goes back to the system, from 1 MB on, instead of into one heap a thread.

    glibc raises both limits by itself, to 32 and 64 MB, and each thread's heap then keeps holes that nobody counts: 50 to
    100% more than is in use where blocks are small. Nothing changes for tensors above 32 MB, as real models have them; at
    8 MB a layer it costs 5 to 30% of the processor's time. Behind it the limits are those that glibc comes to.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    for what in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
        mallopt(what, 1 << 20)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)


def streamed_nats(
    folder: Path,
    samples: Sequence[Sequence[int]],
    start_token: int,
    *,
    profile: Profile,
    memory_bytes: int,
    dtype: torch.dtype,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress | None = None,
    head: MakeHead = TiledHead,
) -> list[float]:
    """`Streamed.nats` of a folder, once. Raises as `Streamed` and its `nats`."""
    with Streamed(
        folder, profile=profile, memory_bytes=memory_bytes, dtype=dtype, device=device, threads=threads, head=head
    ) as model:  # fmt: skip
        return model.nats(samples, start_token, progress)


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rates:
    """One repetition of a benchmark, from a cold page cache where the file system lets it be emptied."""

    disk: float
    """Bytes a second of the same files read from one end to the other, and nothing done with them."""
    streamed: float
    """Bytes a second of the evaluation, computing included."""
    waited: float
    """Share of the evaluation's time in which blocks waited for weights: near 0, it is the device that binds."""

    @property
    def share(self) -> float:
        """Of the disk's speed that the evaluation reached."""
        return self.streamed / self.disk


def measure(model: Streamed, samples: Sequence[Sequence[int]], start_token: int, times: int = 5) -> list[Rates]:
    """Plain reading and evaluation in turns, after one evaluation that warms up libraries and checks the weights."""
    model.nats(samples, start_token)
    return [_measured(model, samples, start_token) for _ in range(times)]


def _measured(model: Streamed, samples: Sequence[Sequence[int]], start_token: int) -> Rates:
    files = [*model._files._open.values()]
    buffer = memoryview(bytearray(_PIECE))
    _forget(file.fileno() for file in files)
    begun, plain = time.perf_counter(), 0
    for file in files:
        file.seek(0)
        plain += sum(iter(lambda file=file: file.readinto(buffer), 0))  # type: ignore[misc]
    disk = plain / (time.perf_counter() - begun)
    _forget(file.fileno() for file in files)
    before, begun = model.traffic, time.perf_counter()
    model.nats(samples, start_token)
    taken, after = time.perf_counter() - begun, model.traffic
    return Rates(disk, (after.num_bytes - before.num_bytes) / taken, (after.waiting_s - before.waiting_s) / taken)


def _forget(descriptors: Iterable[int]) -> None:
    """The system's copies of these files in memory are dropped, as far as they are on disk."""
    for descriptor in descriptors:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
