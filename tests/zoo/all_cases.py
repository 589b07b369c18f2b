"""All cases, by name, and the texts that they are evaluated on."""

from __future__ import annotations

import json
from pathlib import Path

from . import configs, copies, files, tokenizer_files, weights
from .case import Case, content_of
from .honest import controls

TEXTS = (
    "the theatre of the thesis, there and then",
    "Hello World, IT'S A TEST of Upper and lower Case",
    "  two spaces before,  two between, three after   ",
    "tabs\tand\r\nline ends\n\n\n",
    "na\u00efve caf\u00e9 \u00c5ngstr\u00f6m",
    "decomposed: cafe\u0301 \u1e9b\u0323 A\u030angstro\u0308m",
    "decomposed once more: n\u0303 e\u0301 u\u0308",
    "\u0130stanbul \ufb01ne \u2460 \uff21\uff22 \u017ftra\u00dfe",
    "\u65e5\u672c\u8a9e \u4e2d\u6587 \ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "\U0001f469\u200d\U0001f680 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001d4d0",
    "a" * 60,
    "x" * 40 + " " * 40,
    "1234567890 1,000,000.00 \u0663\u0664\u0665",
    "literally <|endoftext|> and </s> and <s> and <unk>",
    "def f(x):\n    return {'a': x**2}  # 100%\n",
    "the quick brown fox jumps over the lazy dog and the theatre",
    "quotes \u201cand\u201d dashes \u2014 and \u2026 \ufeff \u200b",
    "e and E and the e of the theatre, eee",
    "commas, commas, commas, commas, commas, commas",
    "one more plain text about nothing at all, only to have enough of them",
)
PHRASE = TEXTS[15]


def all_cases(canary: Path) -> list[Case]:
    """Controls first. Payloads that are run leave a file in `canary`. Takes some 10 seconds: 65 real models are made."""
    honest = controls()
    base = {case.name: case.files for case in honest}
    act = str(canary / "code-was-run")
    found = [
        *honest,
        *configs.cases(base),
        *weights.cases(base, act),
        *files.cases(base, act),
        *tokenizer_files.cases(base, act, PHRASE),
        *copies.cases(base),
    ]
    names = [case.name for case in found]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return found


def write(cases: list[Case], folder: Path) -> None:
    """FOLDER/repositories/NAME/... and FOLDER/cases.json. Names that a disk does not take stay out, and are said."""
    rows = []
    for case in cases:
        kept = []
        for path, content in case.files.items():
            file = folder / "repositories" / case.name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content_of(content))
            kept.append(path)
        rows.append(
            {
                "name": case.name, "row": case.row, "why": case.why, "competition": case.competition, "block": case.block,
                "expected": [str(each) for each in case.expected], "files": kept, "settings": dict(case.settings),
                "hub_lies": case.lies is not None,
            }
        )  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(rows, indent=1))
