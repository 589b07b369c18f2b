"""A stranger's tokenizer.json as checked parts, written anew: the library never reads what a stranger wrote.

The Rust library panics, aborts or works for minutes on some files, so every part is looked at first: types by allow-list,
fields by name and kind, numbers and texts by range, regular expressions by a small grammar. What has no part in reading
plain text (post-processors, padding, cut-off, chance) is left out. Pure: bytes in, text out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from sn29.errors import Reason, Rejected
from sn29.models.config import strict_json

MAX_ENTRIES = 1 << 18
"""Of a vocabulary; ids are below it. No config may ask for more embedding rows."""
MAX_MERGES = 1_000_000
"""Gemma's 262,144 entries come with 580,604."""
MAX_ADDED = 4096
"""Tokens beside the vocabulary: 256 in Llama 3, some 1,000 at most. 200,000 cost 9 s and 526 MB."""
MAX_ENTRY_BYTES = 1024
"""Of one entry: cl100k has 128 spaces in one, 256 bytes in its alphabet."""
_MAX_STEPS = 16
"""Of a normalizer, splitter or decoder; the longest known has 5."""
_MAX_GROWTH = 16
"""Times that replacing can lengthen a text. Eight steps of a -> aaaaaaaaaa make 10^8 letters of one."""
_MAX_PATTERN = 1000
"""Characters of a regular expression; o200k's has 300."""

_PARTS = {
    "version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model",
}  # fmt: skip

Check = Callable[[Any], bool]
Fields = Mapping[str, Check]


class _Wrong(ValueError):
    """(what was found, what the rule asks for)."""


def checked(data: bytes, where: str = "tokenizer.json") -> str:
    """The file as JSON for the library, built of its checked parts. Raises Rejected(TOKENIZER) for whatever else it holds."""
    content = strict_json(data, Reason.TOKENIZER, where)
    try:
        return json.dumps(_rebuilt(content))
    except _Wrong as wrong:
        got, limit = wrong.args
        raise Rejected(Reason.TOKENIZER, got, limit, where) from None


def _rebuilt(content: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(content.keys() - _PARTS):
        raise _Wrong(f"the field {unknown[0][:80]}", "the fields of a tokenizer.json")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(content.get("added_tokens")),
        "normalizer": _steps(content.get("normalizer"), "normalizer", "normalizers", _NORMALIZERS),
        "pre_tokenizer": _steps(content.get("pre_tokenizer"), "pre_tokenizer", "pretokenizers", _SPLITTERS),
        "post_processor": None,
        "decoder": _steps(content.get("decoder"), "decoder", "decoders", _DECODERS),
        "model": _model(content.get("model")),
    }


# --- kinds of values --------------------------------------------------------------------------------------------------


def _flag(value: Any) -> bool:
    return type(value) is bool


def _whole(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _text(longest: int, shortest: int = 0) -> Check:
    return lambda value: isinstance(value, str) and shortest <= _num_bytes(value) <= longest


def _one_of(*values: str) -> Check:
    return lambda value: isinstance(value, str) and value in values


def _character(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 1 and _num_bytes(value) > 0


def _num_bytes(text: str) -> int:
    """In UTF-8. Raises _Wrong for half a character, which JSON can name and no text holds."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise _Wrong("half of a surrogate pair", "texts of whole characters") from None


def _string_pattern(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"String"} and _text(64, 1)(value["String"])


def _pattern(value: Any) -> bool:
    is_regex = isinstance(value, dict) and value.keys() == {"Regex"} and isinstance(value["Regex"], str)
    return _string_pattern(value) or (is_regex and is_plain_regex(value["Regex"]))


# --- steps ------------------------------------------------------------------------------------------------------------

_BEHAVIOR = _one_of("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_BYTE_LEVEL = {"add_prefix_space": _flag, "trim_offsets": _flag, "use_regex": _flag}
_METASPACE = {
    "replacement": _character, "str_rep": _character, "prepend_scheme": _one_of("always", "never", "first"),
    "add_prefix_space": _flag, "split": _flag,
}  # fmt: skip
_REPLACE = {"pattern": _string_pattern, "content": _text(64)}
_NORMALIZERS: Mapping[str, Fields] = {
    "Prepend": {"prepend": _text(64, 1)},
    "Replace": _REPLACE,
    "NFC": {},
    "NFD": {},
    "NFKC": {},
    "NFKD": {},
    "Lowercase": {},
    "StripAccents": {},
    "Strip": {"strip_left": _flag, "strip_right": _flag},
}
_SPLITTERS: Mapping[str, Fields] = {
    "ByteLevel": _BYTE_LEVEL,
    "Metaspace": _METASPACE,
    "Split": {"pattern": _pattern, "behavior": _BEHAVIOR, "invert": _flag},
    "Digits": {"individual_digits": _flag},
    "Punctuation": {"behavior": _BEHAVIOR},
    "UnicodeScripts": {},
}
_DECODERS: Mapping[str, Fields] = {
    "ByteLevel": _BYTE_LEVEL,
    "Metaspace": _METASPACE,
    "Replace": _REPLACE,
    "ByteFallback": {},
    "Fuse": {},
    "Strip": {"content": _character, "start": _whole(0, 1), "stop": _whole(0, 0)},  # from the end of nothing: a panic
}


def _steps(part: Any, what: str, inner: str, kinds: Mapping[str, Fields]) -> dict[str, Any] | None:
    """One normalizer, splitter or decoder, Sequences laid flat. Raises _Wrong."""
    if part is None:
        return None
    steps = [_step(step, what, kinds) for step in _flat(part, what, inner)]
    if len(steps) > _MAX_STEPS:
        raise _Wrong(f"{len(steps)} steps in the {what}", f"at most {_MAX_STEPS}")
    replacing = [step for step in steps if step["type"] == "Replace"]
    growth = math.prod(max(1.0, _num_bytes(step["content"]) / _num_bytes(step["pattern"]["String"])) for step in replacing)
    if growth > _MAX_GROWTH:
        raise _Wrong(f"a {what} that makes {growth:.3g} letters of one", f"at most {_MAX_GROWTH}")
    return {"type": "Sequence", inner: steps}


def _flat(part: Any, what: str, inner: str) -> list[Any]:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise _Wrong(f"{what}: {str(part)[:80]}", "an object with its type")
    if part["type"] != "Sequence":
        return [part]
    if part.keys() != {"type", inner} or not isinstance(part[inner], list):
        raise _Wrong(f"{what}: a Sequence of {', '.join(sorted(part))[:80]}", f"a list named {inner}")
    return [step for child in part[inner] for step in _flat(child, what, inner)]


def _step(step: dict[str, Any], what: str, kinds: Mapping[str, Fields]) -> dict[str, Any]:
    fields = kinds.get(step["type"])
    if fields is None:
        raise _Wrong(f"{what} {step['type'][:80]}", f"one of {', '.join(sorted(kinds))}")
    for name, value in step.items():
        if name != "type" and (name not in fields or not fields[name](value)):
            raise _Wrong(f"{what} {step['type']}: {name[:40]} {str(value)[:160]}", "a known field with a value in its range")
    if step["type"] == "Replace" and (missing := sorted(_REPLACE.keys() - step.keys())):
        raise _Wrong(f"{what} Replace without {', '.join(missing)}", "a Replace with pattern and content")
    return step


# --- entries ----------------------------------------------------------------------------------------------------------

_is_id = _whole(0, MAX_ENTRIES - 1)
_is_entry = _text(MAX_ENTRY_BYTES)


def _model(model: Any) -> dict[str, Any]:
    if not isinstance(model, dict):
        raise _Wrong(f"a model of {str(model)[:80]}", "an object")
    kind = model.get("type", "BPE" if "merges" in model else None)  # files of the first years do not name it
    if kind == "BPE":
        return _bpe(model)
    if kind == "Unigram":
        return _unigram(model)
    raise _Wrong(f"a model of type {str(kind)[:80]}", "BPE or Unigram: others cannot give every text back")


def _fields(model: dict[str, Any], fields: Fields) -> None:
    for name, value in model.items():
        if name != "type" and (name not in fields or not fields[name](value)):
            raise _Wrong(f"{model.get('type', 'BPE')}: {name[:40]} {str(value)[:80]}", "a known field with a value in its range")


def _no_text(value: Any) -> bool:
    """Marks inside or at the end of words cut entries at bytes, and panic inside a character."""
    return value is None or value == ""


def _optional_entry(value: Any) -> bool:
    return value is None or _is_entry(value)


def _bpe(model: dict[str, Any]) -> dict[str, Any]:
    _fields(model, {
        "dropout": lambda value: value is None or (type(value) in (int, float) and 0 <= value <= 1),
        "unk_token": _optional_entry, "continuing_subword_prefix": _no_text, "end_of_word_suffix": _no_text,
        "fuse_unk": _flag, "byte_fallback": _flag, "ignore_merges": _flag,
        "vocab": lambda value: isinstance(value, dict), "merges": lambda value: isinstance(value, list),
    })  # fmt: skip
    vocab, merges = model.get("vocab", {}), model.get("merges", [])
    _check_entries(vocab)
    if not all(map(_is_id, vocab.values())):
        wrong = next(entry for entry, id_ in vocab.items() if not _is_id(id_))
        raise _Wrong(f"{wrong[:80]!r} with the id {str(vocab[wrong])[:40]}", f"whole numbers from 0 to {MAX_ENTRIES - 1}")
    if len(set(vocab.values())) != len(vocab):
        raise _Wrong("two entries with one id", "an id of its own for each entry")
    if len(merges) > MAX_MERGES:
        raise _Wrong(f"{len(merges)} merges", f"at most {MAX_MERGES}")
    return model | {"type": "BPE", "dropout": None, "merges": [_merge(merge, vocab) for merge in merges]}


def _merge(merge: Any, vocab: Mapping[str, int]) -> list[str]:
    """[left, right]: entries both, whose join is an entry. Raises _Wrong."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str):
        left, right = pair
        if left and right and left in vocab and right in vocab and left + right in vocab:
            return [left, right]
    raise _Wrong(f"the merge {str(merge)[:80]}", "two entries whose join is an entry")


def _unigram(model: dict[str, Any]) -> dict[str, Any]:
    _fields(model, {
        "unk_id": lambda value: value is None or _is_id(value), "byte_fallback": _flag,
        "vocab": lambda value: isinstance(value, list),
    })  # fmt: skip
    vocab, unknown = model.get("vocab", []), model.get("unk_id")
    for piece in vocab:
        good = isinstance(piece, list) and len(piece) == 2 and isinstance(piece[0], str) and type(piece[1]) in (int, float)
        if not good or not piece[0] or not abs(piece[1]) <= 1e6:
            raise _Wrong(f"the piece {str(piece)[:80]}", "a text and its score, between -10^6 and 10^6")
    _check_entries([piece[0] for piece in vocab])
    if unknown is not None and unknown >= len(vocab):
        raise _Wrong(f"unk_id {unknown}", f"below the {len(vocab)} pieces")
    return model


def _check_entries(entries: Mapping[str, int] | list[str]) -> None:
    if not 1 <= len(entries) <= MAX_ENTRIES:
        raise _Wrong(f"{len(entries)} entries" if entries else "an empty vocabulary", f"1 to {MAX_ENTRIES}")
    for entry in entries:
        if not _is_entry(entry):
            raise _Wrong(f"an entry of {len(entry.encode())} bytes", f"at most {MAX_ENTRY_BYTES} bytes")


def _added(tokens: Any) -> list[dict[str, Any]]:
    """Tokens beside the vocabulary. None of them takes spaces around it or asks for a word of its own: a text would lose them."""
    fields = {
        "id": _is_id, "content": _text(MAX_ENTRY_BYTES, 1), "single_word": _flag, "lstrip": _flag, "rstrip": _flag,
        "normalized": _flag, "special": _flag,
    }  # fmt: skip
    if tokens is None:
        return []
    if not isinstance(tokens, list) or len(tokens) > MAX_ADDED:
        raise _Wrong(
            f"{len(tokens) if isinstance(tokens, list) else type(tokens).__name__} added tokens", f"a list of at most {MAX_ADDED}"
        )
    for token in tokens:
        good = (
            isinstance(token, dict)
            and token.keys() == fields.keys()
            and all(fields[name](value) for name, value in token.items())
        )
        if not good:
            raise _Wrong(f"the added token {str(token)[:80]}", f"{', '.join(fields)}, each in its range")
    return [token | {"single_word": False, "lstrip": False, "rstrip": False} for token in tokens]


# --- regular expressions ----------------------------------------------------------------------------------------------

_CLASS = r"\\[sSdDwWrnt]|\\p\{\^?[A-Z][a-z]?\}|\\P\{[A-Z][a-z]?\}"
_PLAIN = r"[^\\\[\](){}|?*+.^$]|\\[^A-Za-z0-9]"
_ATOM = rf"(?:{_CLASS}|{_PLAIN}|\[\^?(?:{_CLASS}|\\[^A-Za-z0-9]|[^\\\[\]&]|&(?!&))+\])"
_COUNT = r"(?:[?*+]\+?|\{[0-9]{1,2}(?:,[0-9]{1,2})?\}\+?)?"
_WORDS = rf"\(\?i?:(?:{_PLAIN}|\||\[[a-z]+\])+\)\??"
_ITEM = re.compile(rf"(?P<atom>{_ATOM})(?P<count>{_COUNT})|(?P<words>{_WORDS})|(?P<ahead>\(\?!{_ATOM}\))|(?P<end>\$)")
# In the tokenizers of BLOOM: brackets inside brackets, which the grammar leaves out.
_KNOWN_REGEXES = frozenset({" ?[^(\\s|[.,!?…。，、।۔،])]+"})


def is_plain_regex(pattern: str) -> bool:
    r"""Whether a regular expression is one that splits text at a small cost: alternatives of characters and classes in a row.

    All known splitters are (GPT-2, cl100k, o200k, Llama 3, DeepSeek, Qwen, Falcon). A character, a class or `[...]` may have
    a count, words like `(?i:'s|'t)` may be optional, an alternative may end with `(?!\S)` or `$`. Nothing repeats a
    group, looks behind, looks further ahead than one character, or remembers; no alternative matches nothing, has more than
    four counts that can vary, or needs something behind a second open one. So a place in the text costs at most a pass over
    it: `(a+a+)+b` takes 2^n steps on n letters, `\s*\s*x` n^2 at each of n places, and `\A\w(?=.*z)` tells at the start of a
    text how it ends.
    """
    if pattern in _KNOWN_REGEXES:
        return True
    if len(pattern) > _MAX_PATTERN:
        return False
    return all(_is_plain_alternative(alternative) for alternative in _alternatives(pattern))


def _alternatives(pattern: str) -> list[list[re.Match[str]] | None]:
    """The items of each alternative; None in the place of what is no item."""
    found: list[list[re.Match[str]] | None] = [[]]
    at = 0
    while at < len(pattern):
        if pattern[at] == "|":
            found.append([])
            at += 1
            continue
        item = _ITEM.match(pattern, at)
        if item is None:
            return [None]
        assert found[-1] is not None
        found[-1].append(item)
        at = item.end()
    return found


def _is_plain_alternative(items: list[re.Match[str]] | None) -> bool:
    varying = opened = 0
    needed = closed = False
    for item in items or ():
        count, words = item["count"] or "", item["words"] or ""
        optional = words.endswith("?") or count.startswith(("?", "*", "{0")) or not (item["atom"] or words)
        if closed or (opened > 1 and not optional):
            return False
        varying += count[:1] in ("?", "*", "+") or "," in count or words.endswith("?")
        opened += count[:1] in ("*", "+") or (len(count) > 5 and "," in count)  # {10,99} is as good as open
        needed |= not optional
        closed = item["ahead"] is not None or item["end"] is not None or count.endswith("}+")  # that is a group's count here
    return needed and varying <= 4
