"""The plan of the house, kept by machine: who may import whom, who owns which library, how long a function may be.

Everything is read with `ast`, so that a file is checked without being run. A failure names file and line.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = sorted(p.relative_to(REPOSITORY) for top in ("sn29", "neurons") for p in (REPOSITORY / top).rglob("*.py"))

# Every module belongs to one part of the house, by the longest of these prefixes.
PARTS = {
    "sn29": "package",
    "sn29.records": "words",
    "sn29.errors": "words",
    "sn29.round_record": "words",
    "sn29.weight_row": "words",
    "sn29.rules": "rules",
    "sn29.chain": "chain",
    "sn29.chain_state": "chain",
    "sn29.endpoints": "chain",
    "sn29.hub": "hub",
    "sn29.corpus": "corpus",
    "sn29.store": "store",
    "sn29.record_files": "record_files",
    "sn29.telemetry": "telemetry",
    "sn29.concealment": "telemetry",
    "sn29.settings": "settings",
    "sn29.lab_settings": "settings",
    "sn29.models": "numbers",
    "sn29.evaluation": "numbers",
    "sn29.training": "numbers",
    "sn29.lab": "numbers",
    "sn29.examination": "stories",
    "sn29.measurement": "stories",
    "sn29.round": "stories",
    "sn29.changeover": "stories",
    "sn29.warm_start": "stories",
    "sn29.publication": "stories",
    "sn29.replay": "stories",
    "sn29.audit": "stories",
    "sn29.explain": "stories",
    "sn29.submission": "stories",
    "sn29.mining": "stories",
    "sn29.incentive": "stories",
    "sn29.stopping": "stories",
    "sn29.chances": "stories",
    "sn29.forecast": "stories",
    "sn29.step_log": "stories",
    "sn29.localnet": "localnet",
    "sn29.report": "report",
    "sn29.cli": "cli",
    "sn29.command_table": "cli",
    "sn29.completion": "cli",
    "sn29.help_commands": "cli",
    "sn29.localnet_commands": "cli",
    "sn29.record_commands": "cli",
    "sn29.store_command": "cli",
    "sn29.doctor": "cli",
    "sn29.report_command": "cli",
    "sn29.competition_commands": "cli",
    "sn29.check_command": "cli",
    "sn29.train_command": "cli",
    "sn29.forecast_command": "cli",
    "sn29.bench_eval_command": "cli",
    "sn29.bench_score_command": "cli",
    "sn29.bench_start_command": "cli",
    "sn29.bench_stream_command": "cli",
    "sn29.bench_train_command": "cli",
    "sn29.data_command": "cli",
    "sn29.study_command": "cli",
    "sn29.lab_commands": "cli",
    "sn29.__main__": "cli",
    "neurons": "neurons",
}
ADAPTERS = {"chain", "hub", "corpus", "store", "record_files", "telemetry"}
BELOW_STORIES = {"package", "words", "rules", "numbers"} | ADAPTERS

# What each part may import besides itself. Adapters never import each other; settings are for programs only.
MAY_IMPORT = {
    "package": set(),
    "words": {"package"},
    "rules": {"package", "words"},
    **{adapter: {"package", "words"} for adapter in ADAPTERS},
    "settings": {"package", "words", "rules"},
    "numbers": {"package", "words"},
    "stories": BELOW_STORIES,
    "localnet": BELOW_STORIES | {"stories", "settings", "neurons"},
    "report": BELOW_STORIES | {"stories"},  # it tells what `explain` and `replay` find
    "neurons": BELOW_STORIES | {"stories", "settings", "localnet"},
    "cli": BELOW_STORIES | {"stories", "settings", "localnet", "neurons", "report"},
}

# Outside libraries with owners: nobody else in sn29/ and neurons/ imports them.
OWNERS = {
    "bittensor": {"sn29/chain.py", "sn29/chain_state.py", "sn29/endpoints.py", "sn29/localnet/ledger.py"},
    "bittensor_core": {"sn29/chain.py", "sn29/localnet/ledger.py"},
    "bittensor_wallet": {"sn29/chain.py", "sn29/localnet/ledger.py"},
    "huggingface_hub": {"sn29/hub.py"},
    "sqlite3": {"sn29/store.py", "sn29/localnet/ledger.py"},
    "yaml": {"sn29/rules/yaml_text.py"},
    "datasets": {"sn29/corpus.py", "sn29/lab/tasks.py"},
    "lm_eval": {"sn29/lab/tasks.py"},
    "pyarrow": {"sn29/corpus.py", "sn29/localnet/text.py"},
    "tokenizers": {"sn29/models/tokenizer.py"},
    "safetensors": {"sn29/models/checkpoint.py", "sn29/training/trainer.py", "sn29/localnet/mischief.py"},
    "loguru": {"sn29/telemetry.py"},
    "wandb": {"sn29/telemetry.py"},
    "pydantic_settings": {"sn29/settings.py", "sn29/lab_settings.py", "sn29/localnet/mischief.py"},
    "httpx2": {"sn29/hub.py"},
    "ray": {"sn29/evaluation/fleet.py"},
    "prometheus_client": {"sn29/report/metrics.py"},
    "matplotlib": {"sn29/report/pictures.py", "sn29/incentive.py"},
}

# Rules are pure: what they may import from outside. No I/O, no clock, no randomness.
RULES_MAY_IMPORT = {
    "__future__", "collections", "dataclasses", "enum", "functools", "hashlib", "itertools", "math", "re", "types",
    "typing", "numpy", "pydantic", "pydantic_core", "yaml", "sn29",
}  # fmt: skip

MAX_LINES = 60
# Longer functions, with the reason why they are better whole: "file:function" -> reason.
LONG_FUNCTIONS: dict[str, str] = {}

# Places that may catch everything: the outermost loops of the two programs, the child process that runs strangers' models, and
# the thread that wandb works in, whose errors have no common root.
MAY_CATCH_ALL = {"neurons/validator.py", "sn29/round.py", "sn29/evaluation/forkserver.py", "sn29/telemetry.py"}


@dataclass(frozen=True)
class Import:
    """`module` is what a statement in `importer` names; `name` is what it takes from there, if anything."""

    importer: str
    module: str
    name: str
    file: Path
    line: int
    at_start: bool
    """Runs when the importer is imported: not inside a function, not for type checkers only."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}{'.' + self.name if self.name else ''}"


def tree_of(file: Path) -> ast.Module:
    return ast.parse((REPOSITORY / file).read_text(encoding="utf-8"), filename=str(file))


def module_of(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, tree: ast.Module) -> Iterator[Import]:
    importer = module_of(file)
    package = importer if file.name == "__init__.py" else importer.rpartition(".")[0]

    def visit(node: ast.AST, at_start: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(importer, alias.name, "", file, child.lineno, at_start)
            elif isinstance(child, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                for alias in child.names:
                    yield Import(importer, module, alias.name, file, child.lineno, at_start)
            else:
                is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from visit(child, at_start and not is_function and not for_types)

    yield from visit(tree, True)


def part_of(module: str) -> str:
    """Raises KeyError for a module of ours that has no place in the house."""
    prefix = module
    while prefix:
        if prefix in PARTS and (prefix == module or prefix != "sn29"):
            return PARTS[prefix]
        prefix = prefix.rpartition(".")[0]
    raise KeyError(module)


def target_of(found: Import, modules: set[str]) -> str | None:
    """The module of ours that an import statement runs, if it is one of ours."""
    if found.module.split(".")[0] not in ("sn29", "neurons"):
        return None
    inner = f"{found.module}.{found.name}" if found.name else found.module
    return inner if inner in modules else found.module


def wrong_directions(found: list[Import], modules: set[str]) -> list[str]:
    wrong = []
    for each in found:
        target = target_of(each, modules)
        if target is None:
            continue
        mine, theirs = part_of(each.importer), part_of(target)
        if mine != theirs and theirs not in MAY_IMPORT[mine]:
            wrong.append(f"{each}: {mine} may not import {theirs}")
    return wrong


def wrong_owners(found: list[Import]) -> list[str]:
    return [
        f"{each}: {top} belongs to {', '.join(sorted(OWNERS[top]))}"
        for each in found
        if (top := each.module.split(".")[0]) in OWNERS and each.file.as_posix() not in OWNERS[top]
    ]


def impure_rules(found: list[Import]) -> list[str]:
    return [
        f"{each}: rules are pure"
        for each in found
        if part_of(each.importer) == "rules" and each.module.split(".")[0] not in RULES_MAY_IMPORT
    ]


def cycles(found: list[Import], modules: set[str]) -> list[str]:
    """One line for each import that closes a circle of imports that run at start."""
    graph: dict[str, dict[str, Import]] = {}
    for each in found:
        target = target_of(each, modules)
        if each.at_start and target in modules and target != each.importer:
            graph.setdefault(each.importer, {})[target] = each
    closed, finished = [], set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        if module in finished:
            return
        for target, each in graph.get(module, {}).items():
            if target in path:
                closed.append(f"{each} and closes {' -> '.join([*path[path.index(target) :], target])}")
            else:
                walk(target, (*path, target))
        finished.add(module)

    for module in sorted(graph):
        walk(module, (module,))
    return closed


def functions_of(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        inner = prefix
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{prefix}.{node.name}" if prefix else node.name
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield inner, node
        yield from functions_of(node, inner)


def long_functions(file: Path, tree: ast.Module) -> list[str]:
    return [
        f"{file}:{node.lineno} {name} has {lines} lines, more than {MAX_LINES}"
        for name, node in functions_of(tree)
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_LINES and f"{file.as_posix()}:{name}" not in LONG_FUNCTIONS
    ]


def swallowed(file: Path, tree: ast.Module) -> list[str]:
    """Handlers for everything that do not end in a raise, and `suppress` of everything."""
    if file.as_posix() in MAY_CATCH_ALL:
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and _is_broad(node.type):
            raises = any(isinstance(inner, ast.Raise) for statement in node.body for inner in ast.walk(statement))
            if not raises:
                found.append(f"{file}:{node.lineno} catches everything and swallows it")
        suppresses = isinstance(node, ast.Call) and ast.unparse(node.func) in ("suppress", "contextlib.suppress")
        if suppresses and any(_is_broad(argument) for argument in node.args):
            found.append(f"{file}:{node.lineno} suppresses everything")
    return found


def _is_broad(kind: ast.expr | None) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(k is None or ast.unparse(k).split(".")[-1] in ("Exception", "BaseException") for k in kinds)


# ---- the house as it stands ------------------------------------------------------------------------------------------

TREES = {file: tree_of(file) for file in FILES}
IMPORTS = [found for file, tree in TREES.items() for found in imports_of(file, tree)]
MODULES = {module_of(file) for file in FILES}


def listed(wrong: list[str]) -> str:
    return "\n" + "\n".join(wrong)


def test_every_module_has_its_place():
    homeless = []
    for file in FILES:
        try:
            part_of(module_of(file))
        except KeyError:
            homeless.append(f"{file}: no part of the house; give it a place in PARTS")
    assert homeless == [], listed(homeless)


def test_imports_go_in_the_directions_of_the_plan():
    wrong = wrong_directions(IMPORTS, MODULES)
    assert wrong == [], listed(wrong)


def test_outside_libraries_are_imported_by_their_owners_only():
    wrong = wrong_owners(IMPORTS)
    assert wrong == [], listed(wrong)


def test_rules_import_nothing_that_has_effects():
    wrong = impure_rules(IMPORTS)
    assert wrong == [], listed(wrong)


def test_there_are_no_circles():
    wrong = cycles(IMPORTS, MODULES)
    assert wrong == [], listed(wrong)


def test_functions_fit_on_a_screen():
    wrong = [line for file, tree in TREES.items() for line in long_functions(file, tree)]
    assert wrong == [], listed(wrong)


def test_the_exceptions_for_long_functions_are_still_needed():
    lengths = {
        f"{file.as_posix()}:{name}": (node.end_lineno or 0) - node.lineno + 1
        for file, tree in TREES.items()
        for name, node in functions_of(tree)
    }
    needless = [entry for entry in LONG_FUNCTIONS if lengths.get(entry, 0) <= MAX_LINES]
    assert needless == [], f"take them off the list: {needless}"
    assert all(LONG_FUNCTIONS.values()), "every entry says why"


def test_nothing_swallows_what_it_did_not_expect():
    wrong = [line for file, tree in TREES.items() for line in swallowed(file, tree)]
    assert wrong == [], listed(wrong)


def test_rules_can_be_imported_without_the_heavy_libraries():
    rules = sorted(module for module in MODULES if part_of(module) == "rules")
    heavy = ("torch", "transformers", "bittensor", "bittensor_core", "datasets", "huggingface_hub", "tokenizers")
    code = f"import sys, {', '.join(rules)}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# ---- the checks themselves find what they look for -------------------------------------------------------------------


def read(file: str, text: str) -> tuple[Path, ast.Module, list[Import]]:
    path, tree = Path(file), ast.parse(text)
    return path, tree, list(imports_of(path, tree))


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("sn29/chain.py", "from sn29.hub import x", "sn29/chain.py:1 imports sn29.hub.x: chain may not import hub"),
        ("sn29/chain.py", "from sn29 import hub", "chain may not import hub"),
        ("sn29/chain.py", "from . import hub", "chain may not import hub"),
        ("sn29/models/fetch.py", "def f():\n    from ..hub import x", "sn29/models/fetch.py:2"),
        ("sn29/rules/scoring.py", "import sn29.models.checkpoint", "rules may not import numbers"),
        ("sn29/round.py", "from sn29.settings import x", "stories may not import settings"),
        ("sn29/localnet/network.py", "from sn29.cli import main", "localnet may not import cli"),
        ("sn29/records.py", "import sn29.rules", "words may not import rules"),
    ],
)
def test_a_wrong_direction_is_found(file, text, complaint):
    (wrong,) = wrong_directions(read(file, text)[2], {"sn29.hub", "sn29.chain"})
    assert complaint in wrong


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("sn29/round.py", "from sn29 import chain, hub\nfrom sn29.rules.scoring import score"),
        (
            "sn29/models/fetch.py",
            "from sn29.models.checkpoint import x\nfrom sn29.errors import Rejected\nimport torch",
        ),
        ("neurons/validator.py", "from sn29.settings import x\nfrom sn29.localnet.network import y"),
    ],
)
def test_a_right_direction_is_none_of_our_business(file, text):
    found = read(file, text)[2]
    assert wrong_directions(found, {"sn29.chain", "sn29.hub"}) == []
    assert wrong_owners(found) == []


def test_a_module_without_a_place_is_found():
    with pytest.raises(KeyError, match="utils"):
        part_of("sn29.utils")


def test_a_library_in_the_wrong_file_is_found():
    text = "import os\ndef f():\n    import sqlite3\n    from datasets.arrow import x"
    assert [line.split(" imports ")[0] for line in wrong_owners(read("sn29/round.py", text)[2])] == [
        "sn29/round.py:3",
        "sn29/round.py:4",
    ]


def test_effects_in_rules_are_found():
    found = read("sn29/rules/scoring.py", "import math\nimport time\nfrom random import random\nimport os.path")[2]
    assert [each.split()[0] for each in impure_rules(found)] == [f"sn29/rules/scoring.py:{n}" for n in (2, 3, 4)]


def test_a_circle_is_found_unless_it_closes_later():
    modules = {"sn29.a", "sn29.b", "sn29.c"}
    there = read("sn29/a.py", "from sn29.b import x")[2] + read("sn29/b.py", "from sn29 import c")[2]
    back = read("sn29/c.py", "import os\nimport sn29.a")[2]
    (closed,) = cycles(there + back, modules)
    assert closed == "sn29/c.py:2 imports sn29.a and closes sn29.a -> sn29.b -> sn29.c -> sn29.a"
    later = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sn29.a\ndef f():\n    import sn29.a"
    assert cycles(there + read("sn29/c.py", later)[2], modules) == []


def test_a_long_function_is_found():
    text = "class A:\n    def f(self):\n" + "        x = 1\n" * MAX_LINES + "def g():\n" + "    x = 1\n" * (MAX_LINES - 1)
    path, tree, _ = read("sn29/round.py", text)
    assert long_functions(path, tree) == [f"sn29/round.py:2 A.f has {MAX_LINES + 1} lines, more than {MAX_LINES}"]


@pytest.mark.parametrize(
    ("handler", "is_found"),
    [
        ("except Exception:\n    pass", True),
        ("except BaseException as e:\n    print(e)", True),
        ("except:\n    pass", True),
        ("except (ValueError, builtins.Exception):\n    pass", True),
        ("except Exception:\n    close()\n    raise", False),
        ("except Exception as e:\n    raise ValueError from e", False),
        ("except ValueError:\n    pass", False),
        ("finally:\n    contextlib.suppress(Exception)", True),
        ("finally:\n    suppress(OSError)", False),
    ],
)
def test_a_swallowed_exception_is_found(handler, is_found):
    path, tree, _ = read("sn29/hub.py", f"try:\n    x()\n{handler}")
    assert bool(swallowed(path, tree)) == is_found
    assert swallowed(Path("neurons/validator.py"), tree) == []


def test_every_test_file_has_a_name_of_its_own():
    """pytest imports them by that name: of two alike, one is not collected when both are in one process."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
