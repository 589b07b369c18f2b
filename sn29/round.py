"""A validator's round, from commitments to weights, as one story.

    plan_round      which block's round is due, and the window of each competition in it
    run_round       admit all -> who claimed what first -> judge each competition -> combine into weights -> keep the record
      admit         read the chain -> select -> inspect metadata
      judge         choose -> draw samples -> measure losses -> score

Everything that decides a score is a function of the round's block: commitments are read as of the block before the
window's seed block, ages are counted to it, samples and groups come from its hash. A round that was opened is kept in
the store and goes on after a crash as it was opened; what was measured is never measured again.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from sn29.corpus import draw
from sn29.errors import Rejected, Unavailable
from sn29.examination import Entrant, Ports, Rules, inspect, measure, outcome_of, put_off, refused, say_refused
from sn29.records import Commitment, Head, Loss, Outcome, Sample, Score, Weights, Window
from sn29.rules.competition import Competition, FixedTokenizer
from sn29.rules.scoring import score, win_matrix
from sn29.rules.selection import Claim, FirstClaims, Inspected, choose, first_claims, next_round, select
from sn29.rules.weights import combine
from sn29.store import Standing
from sn29.telemetry import bug, tell

RECORD_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What a round is about, fixed when it is opened."""

    block: int
    windows: Mapping[str, Window]
    """By competition."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """One competition before a weight is read."""

    competition: Competition
    window: Window
    entrants: tuple[Entrant, ...]
    outcomes: tuple[Outcome, ...]
    """Of those that were refused, or could not be looked at."""
    no_competition: tuple[Outcome, ...]
    """Of commitments that cannot be parsed, or name a competition that is not in force."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What became of the commitments of one competition."""

    outcomes: tuple[Outcome, ...]
    scores: tuple[Score, ...]
    standings: tuple[Standing, ...]
    record: Mapping[str, Any]


# --- planning ---------------------------------------------------------------------------------------------------------


async def plan_round(ports: Ports, rules: Rules, *, catch_up: int) -> Plan | None:
    """The round to work on now: one that was opened and not finished, else the next one due, else None."""
    lengths = {name: c.samples.window_blocks for name, c in rules.competitions.items()}
    finalized = await ports.chain.finalized()
    block = next_round(lengths, finalized.block, ports.store.last_finished(), catch_up)
    if block is None:
        return None
    for opened in ports.store.open_rounds():  # only while it is due, and never under other rules than it was opened under
        if opened.block >= block and opened.plan["rules"] == dict(rules.hashes):
            tell("resumed", f"going on with the round of block {opened.block}", block=opened.block)
            return _plan_from(opened.plan)
    windows = {}
    for name, length in lengths.items():
        index = block // length
        seed = Head(index * length, await ports.chain.block_hash(index * length))
        windows[name] = Window(name, index, seed)
    plan = Plan(block, windows)
    kept = {"block": block, "rules": dict(rules.hashes), "windows": {n: asdict(w) for n, w in windows.items()}}
    ports.store.open_round(block, kept)
    return plan


def _plan_from(kept: Mapping[str, Any]) -> Plan:
    windows = {n: Window(w["competition"], w["index"], Head(**w["seed"])) for n, w in kept["windows"].items()}
    return Plan(kept["block"], windows)


# --- the round --------------------------------------------------------------------------------------------------------


async def run_round(ports: Ports, rules: Rules, plan: Plan) -> Weights:
    """Judges every competition, decides the weights, keeps the record. Raises Unavailable when chain or text do not answer."""
    tell("round", f"round of block {plan.block}", block=plan.block)
    known = {key: Claim(*claim) for key, claim in ports.store.claims().items()}
    admitted = [await _admit(ports, rules, c, plan.windows[name], known) for name, c in rules.competitions.items()]
    no_competition = tuple(dict.fromkeys(o for a in admitted for o in a.no_competition))
    say_refused(no_competition)
    # Copies are looked for across competitions: a model has one owner, wherever it is entered.
    claims = first_claims([_inspected(e) for a in admitted for e in a.entrants], known)
    ports.store.keep_claims({key: (claim.block, claim.hotkey) for key, claim in claims.claims.items()})
    verdicts = {a.competition.name: await _judge(ports, rules, a, claims) for a in admitted}
    registered = {n.hotkey for n in (await ports.chain.metagraph(plan.block)).neurons}
    weights = combine(
        {name: c.reward_share for name, c in rules.competitions.items()},
        {name: v.scores for name, v in verdicts.items()},
        rules.hall_of_fame,
        ports.store.weights(before=plan.block),
        plan.block,
        registered,
    )
    await _wait_for_the_unavailable(ports, rules, plan, verdicts)
    weights = replace(weights, block=plan.block)  # also when the last ones are kept: this round decided so
    record = {
        "schema": RECORD_SCHEMA,
        "block": plan.block,
        "versions": {name: version(name) for name in ("sn29", "torch", "transformers", "tokenizers", "bittensor")},
        "rules": dict(rules.hashes),
        "machine": {"dtype": ports.machine.dtype, "device": ports.machine.device},
        "no_competition": [asdict(o) for o in no_competition],
        "competitions": {name: v.record for name, v in verdicts.items()},
        "weights": dict(weights.by_hotkey),
    }
    ports.store.finish_round(plan.block, record, weights, (x for v in verdicts.values() for x in v.standings))
    _forget_models(ports, {e.facts.content_id for a in admitted for e in a.entrants})
    tell("weights", f"round of block {plan.block} decided", **{h: f"{w:.4f}" for h, w in weights.by_hotkey.items()})
    return weights


async def _wait_for_the_unavailable(ports: Ports, rules: Rules, plan: Plan, verdicts: Mapping[str, Verdicts]) -> None:
    """A round is not closed over the head of a miner whose repository did not answer, until a quarter of the window is over.

    Raises Unavailable: the round is tried again, and what was measured is known by then.
    """
    missing = [o.hotkey for v in verdicts.values() for o in v.outcomes if o.status == "unavailable"]
    patience = min(c.samples.window_blocks for c in rules.competitions.values()) // 4
    if missing and (await ports.chain.finalized()).block < plan.block + patience:
        raise Unavailable(
            "round",
            f"{len(missing)} models could not be looked at ({missing[0]}...); tried again until block {plan.block + patience}",
        )


def _forget_models(ports: Ports, wanted: set[str]) -> None:
    """Deletes checkpoints that no commitment of this round names, so that the disk holds one window's models."""
    folder = ports.machine.models_dir
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.removesuffix(".part") not in wanted:
            shutil.rmtree(path)
            tell("deleted", "a checkpoint that nobody commits to any more", content=path.name)


async def _admit(ports: Ports, rules: Rules, competition: Competition, window: Window, known: Mapping[str, Claim]) -> Admitted:
    """The commitments made before the window's seed block, as far as chain and metadata can judge them."""
    name = competition.name
    fixed = competition.tokenizer if isinstance(competition.tokenizer, FixedTokenizer) else None
    try:
        largest_id = (await asyncio.to_thread(ports.tokenizer, fixed))[1] if fixed else None  # the first call fetches it
    except Rejected as error:  # the competition's own repository, no miner's: nothing can be judged until it is mended
        raise Unavailable(f"tokenizer of {name}", str(error)) from None
    commitments, entrants = [], []
    outcomes: list[Outcome] = []
    no_competition: list[Outcome] = []
    for raw in await ports.chain.commitments(window.seed.block - 1):
        try:
            commitments.append(Commitment.parse(raw.hotkey, raw.block, raw.data))
        except Rejected as error:
            no_competition.append(refused(raw.hotkey, "", raw.block, "", error))
    selection = select(commitments, rules.competitions, known)
    for refusal in selection.refused:
        foreign = refusal.commitment.competition not in rules.competitions
        if foreign or refusal.commitment.competition == name:
            (no_competition if foreign else outcomes).append(outcome_of(refusal))
    for commitment in selection.by_competition[name]:
        try:
            entrant = await inspect(ports, rules, competition, commitment, largest_id)
        except Exception as error:  # noqa: BLE001 - a bug that one stranger's files bring up must not stop all the others
            bug(f"looking at {commitment.hotkey} failed")
            entrant = put_off(commitment, Unavailable("inspection", f"{type(error).__name__}"))
        if isinstance(entrant, Outcome):
            outcomes.append(entrant)
        else:
            entrants.append(entrant)
    return Admitted(competition, window, tuple(entrants), tuple(outcomes), tuple(no_competition))


async def _judge(ports: Ports, rules: Rules, admitted: Admitted, claims: FirstClaims) -> Verdicts:
    """Choice, losses and scores of one competition."""
    store, competition, window = ports.store, admitted.competition, admitted.window
    mine = {e.commitment: e for e in admitted.entrants}
    outcomes = [*admitted.outcomes, *(outcome_of(r) for r in claims.refused if r.commitment in mine)]
    owners = [c for c in claims.owners if c in mine]
    standing = store.last_standing(competition.name, before=window.seed.block)
    choice = choose(owners, competition.pool, standing, store.last_evaluated(competition.name))
    outcomes += [_waiting(c) for c in choice.waiting]
    say_refused(outcomes)
    samples = await asyncio.to_thread(_draw, ports, competition, window)
    tell("samples", f"{competition.name}: {len(samples)} samples drawn by the hash of block {window.seed.block}")
    losses = {}
    for commitment in choice.chosen:
        outcome, found = await measure(ports, rules, competition, mine[commitment], samples)
        outcomes.append(outcome)
        losses.update({commitment.hotkey: found} if found else {})
    return _score(competition, window, samples, tuple(outcomes), losses)


def _draw(ports: Ports, competition: Competition, window: Window) -> tuple[Sample, ...]:
    return draw(
        ports.dataset(competition),
        competition.dataset.files,
        competition.dataset.column,
        competition.samples.count,
        competition.limits.max_chars,
        block_hash=window.seed.hash,
        competition=competition.name,
        window=window.index,
    )


def _inspected(entrant: Entrant) -> Inspected:
    return Inspected(entrant.commitment, entrant.facts.content_id, (entrant.facts.weights_id,))


def _waiting(c: Commitment) -> Outcome:
    why = "no place under evaluation in this round"
    return Outcome(c.hotkey, c.competition, c.block, "waiting", str(c.model), reason="waiting", detail=why)


# --- scores -----------------------------------------------------------------------------------------------------------


def _score(
    competition: Competition,
    window: Window,
    samples: tuple[Sample, ...],
    outcomes: tuple[Outcome, ...],
    losses: Mapping[str, tuple[Loss, ...]],
) -> Verdicts:
    """Scores, and all that they depend on, written down."""
    blocks = {o.hotkey: o.block for o in outcomes if o.status == "evaluated"}
    table = {hotkey: tuple(x.nats for x in row) for hotkey, row in losses.items()}
    seed = hashlib.sha256(f"{window.seed.hash} {competition.name} {window.index} groups".encode()).digest()
    scores = score(competition, table, blocks, window.seed.block, seed)
    matrix = win_matrix(table, blocks, window.seed.block, competition.scoring.advantage)
    record = {
        "window": asdict(window),
        "samples": [{"id": s.id, "bytes": s.num_bytes} for s in samples],
        "outcomes": [asdict(o) for o in sorted(outcomes, key=lambda o: (o.block, o.hotkey))],
        "losses": {
            hotkey: [[x.nats if x.nats < float("inf") else None, x.num_tokens, x.reason] for x in row]
            for hotkey, row in losses.items()
        },
        "scores": [asdict(s) for s in scores],
        "win_matrix": {
            "hotkeys": list(matrix.hotkeys),
            "wins": matrix.wins,
            "wins_with_advantage": matrix.wins_with_advantage,
        },
    }
    for s in sorted(scores, key=lambda s: -s.weight):
        mean = sum(table[s.hotkey]) / max(1, len(samples))
        tell(
            "scored", f"{competition.name}: {s.wins:g} wins", hotkey=s.hotkey, competition=competition.name,
            loss_per_sample=f"{mean:.2f}", win_rate=f"{s.win_rate:.3f}", weight=f"{s.weight:.3f}",
        )  # fmt: skip
    model_of = {o.hotkey: o.model for o in outcomes if o.status == "evaluated"}
    standings = tuple(Standing(competition.name, model_of[s.hotkey], s.hotkey, s.weight) for s in scores)
    return Verdicts(outcomes, scores, standings, record)
