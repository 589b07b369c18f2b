"""`sn29 ...`: parses before it imports anything heavy, so that --help answers at once."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from sn29 import __version__
from sn29.errors import Reason, Rejected, Sn29Error

USAGE = f"""\
sn29 {__version__}: node software of Bittensor subnet 29

  sn29 demo                        a whole subnet on this machine: chain, Hub, miners, validator, and a page at the end
  sn29 validator                   pull miners' models, check them, measure every sample's loss, set weights
  sn29 miner                       train, forecast, publish when it would win, follow up, and again; or publish a folder
  sn29 train                       train a model for a competition: fresh, from a checkpoint, the Hub or the crown's holder
  sn29 doctor [validator|miner]    is all there that it needs? a line for each check; exit 0 or 1, with what to do
  sn29 config [PROGRAM] [FLAGS]    every setting of a program, its value, and where the value comes from
  sn29 check MODEL                 would a validator accept this folder, or this REPO@REVISION? exit 0 or 1, with all reasons
  sn29 reasons                     every reason for which a model or a setting can be refused, and what to do
  sn29 competitions check [DIR]    are these competition files valid? exit 0 or 1, with file, field and both values
  sn29 competitions show [DIR]     the rules in force at a block or a time, and what comes next
  sn29 competitions diff OLD NEW   every field that two files or folders set differently, and from which block on
  sn29 competitions pin FILE       write revision and fingerprint of every Hub id into the file
  sn29 simulate incentive          attacks and honest progress under each scoring rule: who would be paid
  sn29 simulate sequential         what stopping hopeless challengers saves, and how often it stops one that would win
  sn29 data stats SOURCE           how long the documents are, what is in long ones, duplicates, what packing loses
  sn29 lab grow MODEL              a model with more layers, width, heads or vocabulary, and the same losses
  sn29 lab vocab stats [SOURCE]    which tokens of a vocabulary a text never uses, and the parameters that they hold
  sn29 lab vocab prune MODEL       tokenizer and model without them; the text is cut as before and its loss can only fall
  sn29 lab plan MODEL              parameters, operations, memory, days and cost of a training, and what longer rows cost
  sn29 lab lengths SOURCE          is there enough long text? what a training sees how often, by length of the rows
  sn29 lab gates MODEL             which gates of the MLPs carry the model, alone and in sets, and which do nothing
  sn29 lab compare A B             models of any tokenizer on the same text and tasks, with intervals
  sn29 study packing               what packing samples costs: one model trained in several ways, a table with intervals
  sn29 bench score                 how fast a window is scored here, against a plain loop
  sn29 bench eval                  how fast samples are evaluated here, against one by one and padded batches
  sn29 bench start                 how soon a model's first loss is there, against a new interpreter
  sn29 bench train                 how fast each packing mode trains here, and what each optimizer costs
  sn29 bench stream                how fast a model is read layer by layer, against plain reading
  sn29 competitions simulate FILE  what this file would have changed in recorded rounds, per hotkey
  sn29 explain HOTKEY              why this weight: refused why, lost to whom by how much, what would win
  sn29 forecast CHECKPOINT         would it win now, how surely, and what is missing, by a validator's records and rules
  sn29 replay RECORD               scores and weights again from a round's record; exit 0 when they are the recorded bits
  sn29 audit RECORD RECORD         where two validators differ, first cause first
  sn29 localnet up                 a chain and a Hub on this machine, for rehearsals

  sn29 COMMAND --help              the flags of a command
  sn29 --version
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 refused or unavailable (one line on standard error says what), 2 wrong usage."""
    words = sys.argv[1:] if arguments is None else arguments
    for name, command in _COMMANDS.items():
        if words[: len(name)] == list(name):
            return _guarded(name, command, words[len(name) :])
    if words[:1] == ["--version"]:
        print(__version__)
        return 0
    asked = [word for word in words if word not in ("--help", "-h")]
    shown = _usage(asked)
    if shown and (not asked or asked != words):
        print(shown)
        return 0
    print(shown or USAGE, file=sys.stderr)
    print(f"sn29: no command {' '.join(words[:2])!r}", file=sys.stderr)
    return 2


def _usage(words: list[str]) -> str:
    """What there is; behind `sn29 lab`, the lines of that group alone. Empty: no such group."""
    start = "".join(f"{word} " for word in ["  sn29", *words])
    return "\n".join(line for line in USAGE.splitlines() if line.startswith(start)) if words else USAGE


def _guarded(name: tuple[str, ...], command: Callable[[list[str]], int], words: list[str]) -> int:
    try:
        return command(words)
    except Sn29Error as error:
        print(f"sn29 {' '.join(name)}: {error}", file=sys.stderr)
        if isinstance(error, Rejected):
            print(f"  what to do: {error.reason.advice}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever reads (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"sn29 {' '.join(name)}: stopped", file=sys.stderr)
        return 130


def _validator(words: list[str]) -> int:
    from neurons.validator import main as run

    return run(words)


def _miner(words: list[str]) -> int:
    from neurons.miner import main as run

    return run(words)


def _doctor(words: list[str]) -> int:
    from sn29.doctor import main as run

    return run(words)


def _config(words: list[str]) -> int:
    """[PROGRAM] [its flags]: nothing is run."""
    from sn29.settings import programs, read_with_origins, settings_of, shown_value

    kinds = {str(kind.model_config.get("cli_prog_name")).removeprefix("sn29 "): kind for kind in programs()}
    if words[:1] in (["--help"], ["-h"]):
        print("usage: sn29 config [--json] [PROGRAM] [FLAGS]\n")
        print("Every setting of a program (default: validator), its value, and where the value comes from:")
        print(f"a flag, the environment, .env, the YAML file, or the default.\n\nPROGRAM: {', '.join(kinds)}")
        return 0
    as_json = words[:1] == ["--json"]
    words = words[1:] if as_json else words
    name = next((" ".join(words[:n]) for n in (3, 2, 1) if " ".join(words[:n]) in kinds), "")
    if words and not name and not words[0].startswith("-"):
        raise Rejected(Reason.SETTING, words[0], ", ".join(kinds), "sn29 config")
    kind = kinds[name or "validator"]
    settings, origins = read_with_origins(kind, words[len(name.split()) :])
    rows = [(s.names[0], shown_value(s, settings), origins[s.field]) for s in settings_of(kind)]
    if as_json:
        print(json.dumps([dict(zip(("name", "value", "origin"), row, strict=True)) for row in rows], indent=2))
        return 0
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for row in rows:
        print(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}")
    return 0


def _demo(words: list[str]) -> int:
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
    if settings.open_page:
        import webbrowser

        webbrowser.open(page.as_uri())
    return 0


def _competitions_check(words: list[str]) -> int:
    """DIR (default: competitions), the only argument."""
    if words[:1] in (["--help"], ["-h"]):
        print("usage: sn29 competitions check [DIR]\n\nValidates DIR/*.yaml (default: competitions). Exit 1 when one is wrong.")
        return 0
    if len(words) > 1:
        raise Rejected(Reason.SETTING, " ".join(words), "at most one folder", "sn29 competitions check")
    from neurons.adapters import read_competitions

    folder = Path(words[0] if words else "competitions")
    competitions, hall, hashes = read_competitions(folder)
    for name, competition in competitions.items():
        open_pins = f"; not pinned yet: {', '.join(competition.unpinned)}" if competition.unpinned else ""
        limit = f"{competition.limits.parameters:,} parameters"
        print(
            f"{name}  {competition.reward_share:.0%}  {', '.join(competition.families)}  {limit}  {hashes[name][:12]}{open_pins}"
        )
    print(f"{len(competitions)} competitions and {len(hall.entries)} hall of fame entries in {folder} are valid")
    return 0


def _localnet_up(words: list[str]) -> int:
    from sn29.settings import LocalnetSettings, default_cache, read

    settings = read(LocalnetSettings, words)
    from sn29.localnet import text
    from sn29.localnet.network import TRAINING_FILES, prepare

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
        start = "sn29 validator" if validator else f"HF_TOKEN={localnet.hub_token(wallet)} sn29 miner"
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


def _simulate_incentive(words: list[str]) -> int:
    from sn29.settings import IncentiveSettings, read

    settings = read(IncentiveSettings, words)
    from rich.console import Console
    from rich.progress import Progress

    from neurons.adapters import read_competitions
    from neurons.miner import chosen
    from sn29 import incentive

    base = chosen(read_competitions(settings.competitions_dir)[0], settings.competition)
    competitions, scenes = incentive.chosen_rules(base, settings.rule), incentive.chosen_scenes(settings.attack, settings.days)
    plan = incentive.Plan(settings.runs, settings.days, settings.samples, settings.seed, settings.windows_per_day)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{len(scenes)} scenes, {len(competitions)} rules")
        result = incentive.simulate(
            competitions, scenes, plan, settings.workers, lambda done, of: progress.update(task, completed=done, total=of)
        )
    if settings.picture is not None:
        settings.picture.write_text(incentive.picture(result), encoding="utf-8")
    if settings.json_output:
        print(incentive.as_json(result))
    else:
        console = Console()
        for table in incentive.tables(result):
            console.print(table)
    return 0 if all(goal.met for goal in result.goals) else 1


def _of_checks(name: str) -> Callable[[list[str]], int]:
    """A command that says whether a model would be accepted."""

    def run(words: list[str]) -> int:
        from sn29 import check_command

        command: Callable[[list[str]], int] = getattr(check_command, name)
        return command(words)

    return run


def _bench_score(words: list[str]) -> int:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # one core; before numpy is imported
    from sn29.bench_score_command import bench_score

    return bench_score(words)


def _bench_stream(words: list[str]) -> int:
    from sn29.bench_stream_command import bench_stream

    return bench_stream(words)


def _bench_train(words: list[str]) -> int:
    from sn29.bench_train_command import bench_train

    return bench_train(words)


def _bench_start(words: list[str]) -> int:
    from sn29.bench_start_command import bench_start

    return bench_start(words)


def _data_stats(words: list[str]) -> int:
    from sn29.data_command import data_stats

    return data_stats(words)


def _train(words: list[str]) -> int:
    from sn29.train_command import train

    return train(words)


def _study_packing(words: list[str]) -> int:
    from sn29.study_command import study_packing

    return study_packing(words)


def _of_lab(name: str) -> Callable[[list[str]], int]:
    """`lab NAME`: the function NAME of sn29/lab_commands/MODULE.py; `name` is MODULE, or MODULE:NAME where they differ."""

    def run(words: list[str]) -> int:
        from importlib import import_module

        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own: the lab's commands show theirs
        module, _, function = name.partition(":")
        command: Callable[[list[str]], int] = getattr(import_module(f"sn29.lab_commands.{module}"), function or module)
        return command(words)

    return run


def _bench_eval(words: list[str]) -> int:
    from sn29.bench_eval_command import bench_eval

    return bench_eval(words)


def _forecast(words: list[str]) -> int:
    from sn29.forecast_command import forecast

    return forecast(words)


def _of_records(name: str) -> Callable[[list[str]], int]:
    """A command that reads round records."""

    def run(words: list[str]) -> int:
        from sn29 import record_commands

        command: Callable[[list[str]], int] = getattr(record_commands, name)
        return command(words)

    return run


def _of_competitions(name: str) -> Callable[[list[str]], int]:
    """A command that reads competition files."""

    def run(words: list[str]) -> int:
        from sn29 import competition_commands

        command: Callable[[list[str]], int] = getattr(competition_commands, name)
        return command(words)

    return run


_COMMANDS: dict[tuple[str, ...], Callable[[list[str]], int]] = {
    ("demo",): _demo,
    ("validator",): _validator,
    ("miner",): _miner,
    ("train",): _train,
    ("doctor",): _doctor,
    ("config",): _config,
    ("check",): _of_checks("check"),
    ("reasons",): _of_checks("reasons"),
    ("competitions", "check"): _competitions_check,
    ("competitions", "show"): _of_competitions("show"),
    ("competitions", "diff"): _of_competitions("diff"),
    ("competitions", "pin"): _of_competitions("pin"),
    ("competitions", "simulate"): _of_records("simulate"),
    ("explain",): _of_records("explain"),
    ("forecast",): _forecast,
    ("replay",): _of_records("replay"),
    ("audit",): _of_records("audit"),
    ("localnet", "up"): _localnet_up,
    ("simulate", "incentive"): _simulate_incentive,
    ("simulate", "sequential"): _of_competitions("simulate_sequential"),
    ("data", "stats"): _data_stats,
    ("study", "packing"): _study_packing,
    ("lab", "grow"): _of_lab("grow"),
    ("lab", "vocab", "stats"): _of_lab("vocabulary:stats"),
    ("lab", "vocab", "prune"): _of_lab("prune"),
    ("lab", "gates"): _of_lab("gates"),
    ("lab", "compare"): _of_lab("compare"),
    ("lab", "plan"): _of_lab("plan"),
    ("lab", "lengths"): _of_lab("lengths"),
    ("bench", "eval"): _bench_eval,
    ("bench", "score"): _bench_score,
    ("bench", "start"): _bench_start,
    ("bench", "stream"): _bench_stream,
    ("bench", "train"): _bench_train,
}


if __name__ == "__main__":
    sys.exit(main())
