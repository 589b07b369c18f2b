"""Two published vocabularies written as tokenizer.json: GPT-4's from its ranks, a SentencePiece one from its pieces.

Both have no post-processor: nothing is put before or after a text. Their ids are those of tiktoken and SentencePiece on
every text tried (11,000 strings of all scripts, white space, code and digits, and 15,800 documents).
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sn29.errors import Reason, Rejected

RANKS_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
"""Of cl100k's rank file, unpacked: the hash that tiktoken's own source pins."""

_GPT4_SPECIALS = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}
_GPT4_SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""cl100k's word splitter. Plain repetition throughout: `tokenizers` reads a possessive `{1,3}+` as repeated `{1,3}`,
which joins the groups of three digits of a long number; the other possessive marks save time and change nothing."""


def gpt4(rank_file: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, tokenizer_config.json) from lines of base64 token and rank."""
    if (got := hashlib.sha256(rank_file).hexdigest()) != RANKS_SHA256:
        raise Rejected(Reason.CORRUPT, f"sha256 {got}", f"sha256 {RANKS_SHA256}", "cl100k_base.tiktoken")
    lines = (line.split() for line in rank_file.splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    letter = _byte_letters()
    spelled = {token: "".join(letter[byte] for byte in token) for token in ranks}
    pairs = [_parts(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [_special(token, id_) for token, id_ in _GPT4_SPECIALS.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _GPT4_SPLIT}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(
            # With the special tokens: `tokenizers` numbers those that are missing here itself, from 100256 up.
            {spelled[token]: rank for token, rank in ranks.items()} | _GPT4_SPECIALS,
            [(spelled[left], spelled[right]) for left, right in pairs],
        ),
    }
    return tokenizer, _config("<|endoftext|>", "<|endoftext|>", "<|endoftext|>")


def bytes_alone() -> dict[str, Any]:
    """tokenizer.json of the 256 bytes: for models of random weights, which any vocabulary fits."""
    letters = _byte_letters()
    return {
        "version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe({letters[byte]: byte for byte in range(256)}, []),
    }  # fmt: skip


def _parts(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that were merged into this one: byte pair encoding of its bytes until two parts are left."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _byte_letters() -> dict[int, str]:
    """The visible character that stands for each byte in a byte-level vocabulary: in Latin-1, else from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + n) for n, byte in enumerate(hidden)}


def llama32k(model_file: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, tokenizer_config.json) from a SentencePiece model: spaces as U+2581, one before every text."""
    pieces = [_piece(body) for field, body in _fields(model_file) if field == 1 and isinstance(body, bytes)]
    vocabulary = {text: id_ for id_, (text, _, _) in enumerate(pieces)}
    space = "\u2581"
    tokenizer = {
        "version": "1.0",
        "added_tokens": [_special(token, vocabulary[token]) for token in ("<unk>", "<s>", "</s>")],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": space},
                {"type": "Replace", "pattern": {"String": " "}, "content": space},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": space}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": _bpe(vocabulary, _merges(pieces)) | {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
    }
    return tokenizer, _config("<s>", "</s>", "<unk>")


_NORMAL = 1
"""SentencePiece's type of an ordinary piece; the others are unknown 2, control 3 and byte 6, which no text spells."""


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every way to join two ordinary pieces to a third, best score first, then the longest piece and left part first.

    Only runs of spaces have equal scores; the order joins them from the left, as SentencePiece does.
    """
    score = {text: value for text, value, kind in pieces if kind == _NORMAL}
    ways = []
    for text, value in score.items():
        for cut in range(1, len(text)):
            if text[:cut] in score and text[cut:] in score:
                ways.append((-value, -len(text), text, -cut))
    return [(text[:-cut], text[-cut:]) for _, _, text, cut in sorted(ways)]


def _piece(body: bytes) -> tuple[str, float, int]:
    """(text, score, type) of one entry of a SentencePiece model."""
    text, score, kind = "", 0.0, _NORMAL
    for field, value in _fields(body):
        if field == 1 and isinstance(value, bytes):
            text = value.decode()
        elif field == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif field == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a protobuf message's fields: varints as int, everything else as its bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            number, at = _varint(message, at)
            yield key >> 3, number
            continue
        size, at = _varint(message, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """(number, position after it): seven bits a byte, lowest first, the eighth set while more follow."""
    number = shift = 0
    while message[at] & 0x80:
        number |= (message[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
    return number | message[at] << shift, at + 1


def _bpe(vocabulary: Mapping[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


def _special(token: str, id_: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id_, "content": token, **flags}


def _config(bos: str, eos: str, unk: str) -> dict[str, Any]:
    """As little as transformers needs to load the folder with a fast tokenizer."""
    names = {"bos_token": bos, "eos_token": eos, "unk_token": unk}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}


def write(folder: Path, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
