"""Every command of `sn29`, once: its words, where it is carried out, and its line in --help, in completion and in
docs/commands.md. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GROUPS = {
    "try": "Try it, set it up",
    "operate": "Operate a validator",
    "mine": "Mine: train a model and publish it",
    "rules": "Rules: competitions, scoring, refusals",
    "lab": "Lab: make and compare models",
    "measure": "Measure this machine",
    "help": "Help",
}
"""Title of each group, in the order of --help."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command."""

    group: str
    """A key of GROUPS."""
    place: str
    """MODULE:FUNCTION; it takes the words behind the command's own and returns the exit status."""
    about: str
    """One line, or a little more."""
    takes: str = ""
    """Its positional arguments as they are shown, e.g. `MODEL`."""


COMMANDS: Mapping[tuple[str, ...], Command] = {
    ("demo",): Command(
        "try", "sn29.localnet_commands:demo",
        "a whole subnet on this machine: chain, Hub, miners, validator, and a page at the end",
    ),
    ("localnet", "up"): Command("try", "sn29.localnet_commands:up", "a chain and a Hub on this machine, for rehearsals"),
    ("doctor",): Command(
        "try", "sn29.doctor:main", "is all there that it needs? a line for each check; exit 0 or 1, with what to do",
        "[validator|miner]",
    ),
    ("config",): Command(
        "try", "sn29.help_commands:config", "every setting of a program, its value, and where the value comes from",
        "[PROGRAM] [FLAGS]",
    ),
    ("validator",): Command(
        "operate", "neurons.validator:main", "pull miners' models, check them, measure every sample's loss, set weights"
    ),
    ("report",): Command(
        "operate", "sn29.report_command:report",
        "what a validator does and decided, as pages: one file, or served live beside metrics",
        "[RECORD...]",
    ),
    ("explain",): Command(
        "operate", "sn29.record_commands:explain", "why this weight: refused why, lost to whom by how much, what would win",
        "HOTKEY",
    ),
    ("replay",): Command(
        "operate", "sn29.record_commands:replay",
        "scores and weights again from a round's record; exit 0 when they are the recorded bits", "RECORD",
    ),
    ("audit",): Command(
        "operate", "sn29.record_commands:audit", "where two validators differ, first cause first", "RECORD RECORD"
    ),
    ("store", "check"): Command(
        "operate", "sn29.store_command:check_store", "is a validator's store whole, and does it say what its records say?"
    ),
    ("store", "compact"): Command(
        "operate", "sn29.store_command:compact_store", "a store without the room of what was deleted, and without old rounds"
    ),
    ("store", "export"): Command(
        "operate", "sn29.store_command:export_store", "losses, outcomes, scores, weights and publications as Parquet or CSV"
    ),
    ("miner",): Command(
        "mine", "neurons.miner:main", "train, forecast, publish when it would win, follow up, and again; or publish a folder"
    ),
    ("train",): Command(
        "mine", "sn29.train_command:train",
        "train a model for a competition: fresh, from a checkpoint, the Hub or the crown's holder",
    ),
    ("check",): Command(
        "mine", "sn29.check_command:check",
        "would a validator accept this folder, or this REPO@REVISION? exit 0 or 1, with all reasons", "MODEL",
    ),
    ("forecast",): Command(
        "mine", "sn29.forecast_command:forecast",
        "would it win now, how surely, and what is missing, by a validator's records and rules", "CHECKPOINT",
    ),
    ("data", "stats"): Command(
        "mine", "sn29.data_command:data_stats",
        "how long the documents are, what is in long ones, duplicates, what packing loses", "SOURCE",
    ),
    ("competitions", "check"): Command(
        "rules", "sn29.competition_commands:check",
        "are these competition files valid? exit 0 or 1, with file, field and both values", "[DIR]",
    ),
    ("competitions", "show"): Command(
        "rules", "sn29.competition_commands:show", "the rules in force at a block or a time, and what comes next", "[DIR]"
    ),
    ("competitions", "diff"): Command(
        "rules", "sn29.competition_commands:diff",
        "every field that two files or folders set differently, and from which block on", "OLD NEW",
    ),
    ("competitions", "pin"): Command(
        "rules", "sn29.competition_commands:pin", "write revision and fingerprint of every Hub id into the file", "FILE"
    ),
    ("competitions", "simulate"): Command(
        "rules", "sn29.record_commands:simulate", "what this file would have changed in recorded rounds, per hotkey", "FILE"
    ),
    ("simulate", "incentive"): Command(
        "rules", "sn29.competition_commands:simulate_incentive",
        "attacks and honest progress under each scoring rule: who would be paid",
    ),
    ("simulate", "sequential"): Command(
        "rules", "sn29.competition_commands:simulate_sequential",
        "what stopping hopeless challengers saves, and how often it stops one that would win",
    ),
    ("reasons",): Command(
        "rules", "sn29.check_command:reasons", "every reason for which a model or a setting can be refused, and what to do"
    ),
    ("lab", "grow"): Command(
        "lab", "sn29.lab_commands.grow:grow", "a model with more layers, width, heads or vocabulary, and the same losses", "MODEL"
    ),
    ("lab", "vocab", "stats"): Command(
        "lab", "sn29.lab_commands.vocabulary:stats",
        "which tokens of a vocabulary a text never uses, and the parameters that they hold", "[SOURCE]",
    ),
    ("lab", "vocab", "prune"): Command(
        "lab", "sn29.lab_commands.prune:prune",
        "tokenizer and model without them; the text is cut as before and its loss can only fall", "MODEL",
    ),
    ("lab", "plan"): Command(
        "lab", "sn29.lab_commands.plan:plan",
        "parameters, operations, memory, days and cost of a training, and what longer rows cost", "MODEL",
    ),
    ("lab", "lengths"): Command(
        "lab", "sn29.lab_commands.lengths:lengths",
        "is there enough long text? what a training sees how often, by length of the rows", "SOURCE",
    ),
    ("lab", "gates"): Command(
        "lab", "sn29.lab_commands.gates:gates",
        "which gates of the MLPs carry the model, alone and in sets, and which do nothing", "MODEL",
    ),
    ("lab", "compare"): Command(
        "lab", "sn29.lab_commands.compare:compare", "models of any tokenizer on the same text and tasks, with intervals", "A B"
    ),
    ("study", "packing"): Command(
        "lab", "sn29.study_command:study_packing",
        "what packing samples costs: one model trained in several ways, a table with intervals",
    ),
    ("bench", "score"): Command(
        "measure", "sn29.bench_score_command:bench_score", "how fast a window is scored here, against a plain loop"
    ),
    ("bench", "eval"): Command(
        "measure", "sn29.bench_eval_command:bench_eval",
        "how fast samples are evaluated here, against one by one and padded batches",
    ),
    ("bench", "start"): Command(
        "measure", "sn29.bench_start_command:bench_start", "how soon a model's first loss is there, against a new interpreter"
    ),
    ("bench", "train"): Command(
        "measure", "sn29.bench_train_command:bench_train", "how fast each packing mode trains here, and what each optimizer costs"
    ),
    ("bench", "stream"): Command(
        "measure", "sn29.bench_stream_command:bench_stream", "how fast a model is read layer by layer, against plain reading"
    ),
    ("completion",): Command(
        "help", "sn29.help_commands:completion", "a script that completes these commands and their flags in your shell",
        "bash|zsh|fish",
    ),
    ("reference",): Command(
        "help", "sn29.help_commands:reference", "every command and flag in Markdown: what docs/commands.md is made of"
    ),
}  # fmt: skip
