"""A validator's round, from commitments to weights, as one story.

    begin_with      a late start from another validator's record
    plan_round      which block's round is due, and the window of each competition in it
    run_round       admit all -> who claimed what first -> measure each competition -> whose weights are whose -> decide
                    weights -> keep the record
      admit         read the chain -> select -> inspect metadata
      measure       choose -> draw samples -> measure losses

A copy that was packed otherwise is known by its tensors, and only once both were evaluated. Which of them was evaluated
first decides nothing: a digest belongs to the oldest claim, as a content does; copies are refused when everything of the
round has been measured, and with everything that was ever measured, by whoever waits or was refused too. Who gets a place
is decided by what was known before the round, so that a round that is tried again has the same places. All of it is in the
record, so that a validator that begins with one knows what the others know.

Everything that decides a score is a function of the round's block: commitments are read as of the block before the
window's seed block, ages are counted to it, samples and groups come from its hash. A round that was opened is kept in
the store and goes on after a crash as it was opened; what was measured is never measured again.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from sn29 import record_files
from sn29.corpus import DataFiles, draw
from sn29.errors import Reason, Rejected, Unavailable
from sn29.evaluation.worker import sweep
from sn29.examination import (
    EXCUSED_BLOCKS,
    SOFTWARE,
    Entrant,
    Ports,
    Rules,
    inspect,
    outcome_of,
    put_off,
    refused,
    say_outcomes,
)
from sn29.measurement import Against, Measured, Turn, measure, tokenizer_id_of
from sn29.models import fingerprint
from sn29.models.checkpoint import digest
from sn29.models.disk import Disk
from sn29.records import Commitment, Entry, Head, Metagraph, ModelId, Outcome, RawCommitment, Sample, Sealed, Weights, Window
from sn29.replay import compare, competition_record, memory_for, recompute
from sn29.round_record import CompetitionRecord, ModelRecord, RoundRecord, SampleRecord
from sn29.rules.champion import Duel, Memory, known_copies, open_duels
from sn29.rules.competition import Competition, HubDataset, samples_per_dataset, tokenizer_for
from sn29.rules.decision import Contest, decide
from sn29.rules.scoring import Scored
from sn29.rules.scoring_fields import Champion
from sn29.rules.selection import (
    Claim,
    FirstClaims,
    Inspected,
    Refusal,
    choose,
    claimed_since,
    first_claims,
    large_validators,
    next_round,
    out_of_reach,
    select,
    top_miners,
)
from sn29.rules.sequential import Bar, bar_of, measuring_order, settled_before
from sn29.store import LossesOfAnother, Standing, Unanswered
from sn29.telemetry import about, bug, note, stage, tell, warn

WAITS = 2
"""Rounds of a week that one hotkey may hold up, and places that one model may have in vain before it waits behind others."""

_AHEAD_BLOCKS = 7_200
"""A day of 12 s blocks: a record of a later block than that is waited for no more, as of a node that lags."""


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
    copies: tuple[Inspected, ...]
    """Of those that claim what was claimed before: not looked at any further."""
    outcomes: tuple[Outcome, ...]
    """Of those that were refused, or could not be looked at."""
    no_competition: tuple[Outcome, ...]
    """Of commitments that cannot be parsed, or name a competition that is not in force."""
    since: Mapping[Commitment, int]
    """The block from which each commitment claims its model, where an earlier one of the same digest was seen."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One competition, measured, while it is not known yet which of its models are copies of others."""

    admitted: Admitted
    memory: Memory
    samples: tuple[Sample, ...]
    datasets: Mapping[str, str]
    """Data set -> the revision that samples were drawn from."""
    measured: Mapping[Commitment, Measured]
    waiting: Mapping[Commitment, Outcome]
    """Those for whom there was no place."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the models of all competitions when everything was measured."""

    claims: FirstClaims
    copies: Mapping[str, Refusal]
    """By hotkey: those that are refused as copies, by their files or by their tensors."""
    tensor_digests: Mapping[str, str]
    """By content id."""
    resembles: Mapping[str, str]
    """Hotkey -> hotkey of the earlier model whose weights its own look like."""

    def refused_of(self, competition: Competition) -> list[Refusal]:
        return [r for r in self.copies.values() if r.commitment.competition == competition.name]


@dataclass(frozen=True, slots=True)
class Judged:
    """One competition, measured and not yet scored."""

    contest: Contest
    samples: tuple[Sample, ...]
    datasets: Mapping[str, str]
    """Data set -> the revision that samples were drawn from."""
    models: tuple[ModelRecord, ...]
    """Every commitment to the competition."""


# --- planning ---------------------------------------------------------------------------------------------------------


async def plan_round(ports: Ports, rules: Rules, *, catch_up: int, since: int = 0, last: int | None = None) -> Plan | None:
    """The round to work on now: one that was opened and not finished, else the next one due, else None. Only rounds from block
    `since` on, and none after `last`: others are judged by other rules."""
    lengths = {name: rules.at(name, 0).samples.window_blocks for name in rules.files}  # the same at every block
    finalized = await ports.chain.finalized()
    note(next_window=min((finalized.block // length + 1) * length for length in lengths.values()))
    done = ports.store.last_finished()
    # catch_up counts from the chain's own block: what it leaves out is not brought back by being judged by other rules
    block = next_round(lengths, finalized.block, max(done or 0, since - 1) if since else done, catch_up)
    if block is None or (last is not None and block > last):
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


async def begin_with(ports: Ports, record: RoundRecord, losses: LossesOfAnother | None = None) -> bool:
    """Goes on from another validator's record as if its round had been judged here; False where rounds were judged already.

    What a scoring rule remembers and the last weights come from it, without which a validator that starts late judges near
    equals by the windows it has seen itself. Both are taken on trust, so the operator chooses whose record it is; checked is
    that the record replays to its own bits and that its blocks are this chain's. What would refuse a miner for good is not:
    claims are those that the chain shows, tensors those that were read here. Its weights are not set on chain: the first own
    round's are. Raises Rejected(RECORD), Unavailable.

    losses: of the record's next round, kept in the same step.
    """
    if ports.store.last_finished() is not None:
        return False
    await check_record(ports, record)
    claims, seen = await _claims_on_chain(ports, record)
    record_files.write(ports.machine.records_dir, record)
    ports.store.begin(record, _standings(record), claims, seen, losses)
    tell("begun", f"goes on from the record of block {record.head.block}", block=record.head.block)
    return True


async def check_record(ports: Ports, record: RoundRecord) -> None:
    """That a record is of this chain, and gives its own bits. Raises Rejected(RECORD), Unavailable."""
    where = f"record of block {record.head.block}"
    final = (await ports.chain.finalized()).block
    if record.head.block > final + _AHEAD_BLOCKS:
        limit = f"at most {final + _AHEAD_BLOCKS}, a day ahead of the node: is the record of this network, the node up to date?"
        raise Rejected(Reason.RECORD, f"block {record.head.block}", limit, where)
    for seed in (record.head, *(kept.window.seed for kept in record.competitions.values())):
        if seed.block > record.head.block:
            raise Rejected(Reason.RECORD, f"a window of block {seed.block}", f"at most {record.head.block}", where)
        if (on_chain := await ports.chain.block_hash(seed.block)) != seed.hash:
            raise Rejected(Reason.RECORD, seed.hash, f"{on_chain}, the hash of block {seed.block} on this chain", where)
    difference = compare(record, recompute(record))
    if difference is not None:
        raise Rejected(Reason.RECORD, difference.first, f"{difference.second}, computed again", f"{where}: {difference.what}")


async def commitments_at(ports: Ports, block: int) -> dict[str, Commitment | Sealed]:
    """By hotkey, of those that are registered: what stands on chain at a block and can be parsed. Raises Unavailable."""
    found = (_parsed(raw) for raw in await ports.chain.commitments(block))
    return {c.hotkey: c for c in found if not isinstance(c, Outcome)}


async def _claims_on_chain(ports: Ports, record: RoundRecord) -> tuple[dict[str, tuple[int, str]], dict[tuple[str, str], int]]:
    """Who claims what since when (model id or content id -> block, hotkey), and the same by (hotkey, digest): of a record's
    entries those that the chain shows.

    A commitment that stands now, with the digest of the entry's content, counts from its own block; from the entry's, if that
    is earlier, when the chain shows the same digest there. A model id that another one committed to as well belongs to whoever
    the Hub shows it to in the first round. Raises Unavailable: an archive that is away for a moment must cost nobody an age.

    Where the nodes have forgotten the entry's block, its age is the record's word, but only if the digest that stands now is of
    its content. Counting from the later commitment would give the model of anybody who committed to it twice to any stranger
    who copied it between; the word can make a friend's copy older only for whom the operator trusts with the crowns as well.
    """
    finalized = (await ports.chain.finalized()).block
    shown = {finalized: await commitments_at(ports, finalized)}
    named = Counter(str(c.model) for c in shown[finalized].values() if isinstance(c, Commitment))
    entries = [(m, m.entry) for kept in record.competitions.values() for m in kept.models if m.entry is not None]
    claims: dict[str, tuple[int, str]] = {}
    seen: dict[tuple[str, str], int] = {}
    forgotten = on_word = lost = 0  # forgotten: a block; the older ones are so too, and are not asked for
    for model, entry in sorted(entries, key=lambda one: -one[1].block):
        hotkey, name, mine = model.hotkey, model.outcome.model, digest(entry.content_id, model.hotkey)
        now = shown[finalized].get(hotkey)
        if now is None:
            continue
        block = now.block if now.digest == mine else None
        if 0 < entry.block < now.block:
            if entry.block > forgotten and entry.block not in shown:
                try:
                    shown[entry.block] = await commitments_at(ports, entry.block)
                except Unavailable as error:
                    if not error.forgotten:
                        how = "it is asked again; --subtensor.archives none takes the record's word for its claims"
                        raise Unavailable(f"block {entry.block} of the record", f"{error}: {how}") from error
                    forgotten = entry.block
            then = shown[entry.block].get(hotkey) if entry.block > forgotten else None
            if entry.block <= forgotten and block is not None:
                tell("claims", f"that it claims {name} since block {entry.block} is the record's word", hotkey=hotkey)
                block, on_word = entry.block, on_word + 1
            elif entry.block <= forgotten:
                lost += 1
            elif then and (then.block, then.digest) == (entry.block, mine):
                block = entry.block
        if block is not None:
            seen[hotkey, mine] = block
            claims[entry.content_id] = min((block, hotkey), claims.get(entry.content_id, (block, hotkey)))
            if isinstance(now, Commitment) and (now.digest, str(now.model), named[name]) == (mine, name, 1):
                claims[name] = (block, hotkey)
    shows = "" if forgotten else ", which the chain shows"
    tell("claims", f"{len(seen)} of the record's {len(entries)} claims are taken over{shows}")
    if forgotten:
        what = f"no node that was asked keeps the state of block {forgotten} and before: since when {on_word} models are claimed"
        how = f"is the record's word alone, and {lost} claims are left out"
        warn("claims", f"{what} {how}. To have both shown start with --subtensor.archives, and with a new --state.dir")
    return claims, seen


# --- the round --------------------------------------------------------------------------------------------------------


async def run_round(ports: Ports, rules: Rules, plan: Plan) -> Mapping[int, Weights]:
    """Judges every competition, decides the weights by mechanism, keeps the record.

    Raises Unavailable when chain or text do not answer.
    """
    tell("round", f"round of block {plan.block}", block=plan.block)
    note(round=plan.block)
    stage("reading", detail="commitments, from the chain")
    sweep(ports.machine.work_dir)  # of a validator that was killed; nothing is evaluated yet
    known = {key: Claim(*claim) for key, claim in ports.store.claims().items()}
    claimed = await _claimed(ports, {window.seed.block - 1 for window in plan.windows.values()})
    admitted = [await _admit(ports, rules, plan, w, claimed[w.seed.block - 1], known) for w in plan.windows.values()]
    no_competition = tuple(dict.fromkeys(o for a in admitted for o in a.no_competition))
    say_outcomes(no_competition)
    # Copies are looked for across competitions: a model has one owner, wherever it is entered.
    by_files = first_claims([i for a in admitted for i in (*a.copies, *_inspected(a))], known)
    _keep_claims(ports, by_files)
    resembles = _resembling(ports, admitted, by_files)
    before = ports.store.last_record(before=plan.block)
    graph = await ports.chain.metagraph(plan.block)
    favoured = await _favoured(ports, graph, {a.competition.mechanism for a in admitted})
    known_before = _know(admitted, by_files, ports.store.tensor_digests(before=plan.block), resembles)
    tried = [await _try(ports, plan, a, known_before, before, favoured[a.competition.mechanism]) for a in admitted]
    stage("deciding")
    known_now = _know(admitted, by_files, ports.store.tensor_digests(), resembles)
    say_outcomes(outcome_of(r) for hotkey, r in known_now.copies.items() if hotkey not in known_before.copies)
    _keep_claims(ports, known_now.claims)
    judged = {t.admitted.competition.name: _judge(t, known_now) for t in tried}
    await _wait_for_the_unavailable(ports, plan, tried, judged)
    registered = sorted(n.hotkey for n in graph.neurons)
    last = ports.store.weights(before=plan.block)
    decision = decide({n: j.contest for n, j in judged.items()}, rules.hall_of_fame, last, plan.block, registered)
    record = RoundRecord(
        head=next(w.seed for w in plan.windows.values() if w.seed.block == plan.block),
        competitions={n: _recorded(rules, j, decision.scored[n]) for n, j in judged.items()},
        no_competition=no_competition,
        hall_of_fame=rules.hall_of_fame.model_dump(mode="json"),
        registered=tuple(registered),
        last_weights=last,
        weights=decision.weights,
        versions={name: version(name) for name in ("sn29", "torch", "transformers", "tokenizers", "bittensor", "numpy")},
        machine={"dtype": ports.machine.dtype, "device": ports.machine.device},
    )
    path = record_files.write(ports.machine.records_dir, record)
    ports.store.finish_round(plan.block, record, decision.weights, _standings(record))
    record_files.keep_only(path)  # one that a crash left between the two lines may tell of another state of the Hub
    await asyncio.to_thread(_forget_models, ports, _wanted(ports, admitted))
    _say_scores(record)
    return decision.weights


async def _favoured(ports: Ports, graph: Metagraph, mechanisms: Collection[int]) -> dict[int, frozenset[str]]:
    """By mechanism: whom the large validators reward, as the chain has it at the metagraph's block."""
    validators = large_validators(graph)
    return {
        mechanism: top_miners([await ports.chain.weights(hotkey, graph.block, mechid=mechanism) for hotkey in validators])
        for mechanism in sorted(mechanisms)
    }


def _recorded(rules: Rules, judged: Judged, scored: Scored) -> CompetitionRecord:
    return competition_record(
        judged.contest,
        scored,
        file_sha256=rules.hashes[judged.contest.competition.name],
        datasets=judged.datasets,
        samples=[SampleRecord(s.id, s.num_bytes) for s in judged.samples],
        models=judged.models,
    )


def _standings(record: RoundRecord) -> tuple[Standing, ...]:
    return tuple(
        Standing(name, model.outcome.model, s.hotkey, s.weight)
        for name, kept in record.competitions.items()
        for s in kept.scores
        if (model := kept.model(s.hotkey)) is not None
    )


def _say_scores(record: RoundRecord) -> None:
    for name, kept in record.competitions.items():
        for s in sorted(kept.scores, key=lambda s: (-s.weight, s.hotkey)):
            losses = kept.losses.get(s.hotkey, ())
            mean = f"{sum(losses) / len(losses):.2f}" if losses else "-"
            tell(
                "scored", f"{name}: {s.wins:g} wins", hotkey=s.hotkey, competition=name,
                loss_per_sample=mean, win_rate=f"{s.win_rate:.3f}", weight=f"{s.weight:.3f}",
            )  # fmt: skip
    for mechanism, weights in record.weights.items():
        shares = {hotkey: f"{weight:.4f}" for hotkey, weight in weights.by_hotkey.items()}
        what = f"round of block {record.head.block} decided{f' for mechanism {mechanism}' if mechanism else ''}"
        what += "" if shares else ": there is nobody to pay, so nothing is set on chain"
        tell("weights", what, **shares)


async def _wait_for_the_unavailable(ports: Ports, plan: Plan, tried: Sequence[Tried], judged: Mapping[str, Judged]) -> None:
    """A round is not closed over the head of a miner whose repository did not answer, until a quarter of the window is over.

    But each hotkey may hold up WAITS rounds in a week, because anybody can publish what never answers; and nobody waits for
    a model that is tried again in the next round only. Raises Unavailable: the round is tried again, and what was measured
    is known by then.
    """
    missing = {m.hotkey: m.outcome.model for j in judged.values() for m in j.models if m.outcome.status == "unavailable"}
    measured = {c.hotkey: m for t in tried for c, m in t.measured.items() if m.outcome.status != "evaluated"}
    models = missing | {hotkey: m.outcome.model for hotkey, m in measured.items()}
    before = _unanswered(ports, plan)
    found = [Unanswered(hotkey, model, plan.block, placed=hotkey in measured) for hotkey, model in models.items()]
    ports.store.keep_unanswered(found, forget_before=plan.block - EXCUSED_BLOCKS)
    rounds = Counter(hotkey for hotkey, _ in {(row.hotkey, row.round) for row in before})
    over = {hotkey for hotkey, m in measured.items() if m.is_over}
    waited = [hotkey for hotkey in missing if hotkey not in over and rounds[hotkey] < WAITS]
    patience = min(j.contest.competition.samples.window_blocks for j in judged.values()) // 4
    if waited and (await ports.chain.finalized()).block < plan.block + patience:
        until = f"tried again until block {plan.block + patience}"
        raise Unavailable("round", f"{len(waited)} models could not be looked at ({waited[0]}...); {until}")


def _unanswered(ports: Ports, plan: Plan) -> tuple[Unanswered, ...]:
    """Of the rounds before this one: what a try of it finds must not change what the next try of it does."""
    return ports.store.unanswered(since=plan.block - EXCUSED_BLOCKS, before=plan.block)


def _last_tried(ports: Ports, plan: Plan, competition: str) -> dict[str, int]:
    """Model id -> block of the newest round that evaluated it, or had a place for it in vain more than once.

    What never ends in a result stays new for ever, and would keep one of the places for new models.
    """
    found = ports.store.last_evaluated(competition)
    in_vain: dict[str, list[int]] = {}
    for row in _unanswered(ports, plan):
        if row.placed:
            in_vain.setdefault(row.model, []).append(row.round)
    tired = {model: max(*rounds, found.get(model, 0)) for model, rounds in in_vain.items() if len(rounds) >= WAITS}
    return found | tired


def _wanted(ports: Ports, admitted: Sequence[Admitted]) -> set[str]:
    """Contents that somebody commits to, though the Hub may not have answered for them in this round."""
    contents = {e.facts.content_id for a in admitted for e in a.entrants}
    for outcome in (o for a in admitted for o in a.outcomes if o.status == "unavailable"):
        kept = ports.store.repository(ModelId.parse(outcome.model), read_by=SOFTWARE)
        contents.update({kept.facts.content_id} if kept and kept.facts else ())
    return contents


def _forget_models(ports: Ports, wanted: set[str]) -> None:
    """Deletes checkpoints that no commitment of this round names, so that the disk holds one window's models."""
    for content in Disk(ports.machine.models_dir).keep_only(wanted):
        tell("deleted", "a checkpoint that nobody commits to any more", content=content)


# --- who claims what --------------------------------------------------------------------------------------------------


def _inspected(admitted: Admitted) -> list[Inspected]:
    return [
        Inspected(e.commitment, e.facts.content_id, (e.facts.weights_id,), admitted.since.get(e.commitment))
        for e in admitted.entrants
    ]


def _keep_claims(ports: Ports, claims: FirstClaims) -> None:
    ports.store.keep_claims({key: (claim.block, claim.hotkey) for key, claim in claims.claims.items()})


def _know(admitted: Sequence[Admitted], by_files: FirstClaims, digests: Mapping[str, str], resembles: Mapping[str, str]) -> Known:
    """Who owns what by the files, and among them by the tensors; `digests` by content id."""
    by_file = set(by_files.owners)
    evaluated = [
        replace(i, content_id=digests[i.content_id], weight_oids=())
        for a in admitted
        for i in _inspected(a)
        if i.commitment in by_file and i.content_id in digests
    ]
    claims = first_claims(evaluated, by_files.claims)
    copies = {r.commitment.hotkey: r for r in by_files.refused}
    for r in claims.refused:
        got = f"the same tensors, digest {r.failure.got}"
        copies[r.commitment.hotkey] = Refusal(r.commitment, Rejected(Reason.COPY, got, r.failure.limit, r.failure.where))
    out = {r.commitment for r in copies.values()}
    owners = tuple(c for c in by_files.owners if c not in out)
    return Known(FirstClaims(owners, tuple(copies.values()), claims.claims), copies, digests, resembles)


def _resembling(ports: Ports, admitted: Sequence[Admitted], claims: FirstClaims) -> dict[str, str]:
    """Hotkey -> hotkey of the earlier model whose weights its own look like; each is told of, and nothing else happens."""
    owners = set(claims.owners)
    inspected = sorted((i for a in admitted for i in _inspected(a) if i.commitment in owners), key=lambda i: i.claim)
    texts = [ports.store.fingerprint(i.content_id) for i in inspected]
    taken = [(i, fingerprint.decode(text)) for i, text in zip(inspected, texts, strict=True) if text]
    found = {}
    for (i, _), likeness in zip(taken, fingerprint.likenesses([one for _, one in taken]), strict=True):
        if likeness is not None and (earlier := taken[likeness.earlier][0].claim).hotkey != i.commitment.hotkey:
            found[i.commitment.hotkey] = earlier.hotkey
            what = f"its weights resemble those that {earlier} claims: {likeness}; the losses decide"
            tell("suspect", what, hotkey=i.commitment.hotkey, competition=i.commitment.competition, resembles=earlier.hotkey)
    return found


# --- one competition --------------------------------------------------------------------------------------------------


async def _claimed(ports: Ports, blocks: Collection[int]) -> dict[int, tuple[Commitment | Sealed | Outcome, ...]]:
    """By block: what stood on chain there, with an outcome for everything that cannot be parsed.

    Every digest's first block is kept: a commitment that takes the place of another erases it from the chain.
    """
    found: dict[int, tuple[Commitment | Sealed | Outcome, ...]] = {}
    for block in sorted(blocks):
        found[block] = tuple(_parsed(raw) for raw in await ports.chain.commitments(block))
        ports.store.keep_first_seen({(c.hotkey, c.digest): c.block for c in found[block] if not isinstance(c, Outcome)})
    return found


def _parsed(raw: RawCommitment) -> Commitment | Sealed | Outcome:
    try:
        return Sealed.parse(raw.hotkey, raw.block, raw.data) or Commitment.parse(raw.hotkey, raw.block, raw.data)
    except Rejected as error:
        return refused(raw.hotkey, "", raw.block, "", error)


async def _admit(
    ports: Ports,
    rules: Rules,
    plan: Plan,
    window: Window,
    claimed: Sequence[Commitment | Sealed | Outcome],
    known: Mapping[str, Claim],
) -> Admitted:
    """The commitments made before the window's seed block, as far as chain and metadata can judge them."""
    name = window.competition
    competition = rules.at(name, window.seed.block)
    shared = tokenizer_for(competition, has_own=False)
    try:
        # the first call fetches it
        largest_id = (await asyncio.to_thread(ports.tokenizer, shared)).largest_id if shared else None
    except Rejected as error:  # the competition's own repository, no miner's: nothing can be judged until it is mended
        raise Unavailable(f"tokenizer of {name}", str(error)) from None
    commitments, outcomes, no_competition = _sorted_out(rules, window, claimed)
    since = _since(ports, commitments, competition.samples.window_blocks)
    entrants, copies = [], []
    selection = select(commitments, rules.files, known, since)
    for refusal in selection.refused:
        foreign = refusal.commitment.competition not in rules.files
        if foreign or refusal.commitment.competition == name:
            (no_competition if foreign else outcomes).append(outcome_of(refusal))
    earlier = dict(known)
    for done, commitment in enumerate(selection.by_competition[name]):
        stage("inspecting", done, len(selection.by_competition[name]), f"{name}: {commitment.hotkey}")
        try:
            with about(commitment.hotkey):
                found = await inspect(
                    ports, rules, competition, window, commitment, largest_id,
                    since=since.get(commitment), earlier=earlier, block=plan.block,
                )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - a bug that one stranger's files bring up must not stop all the others
            bug(f"looking at {commitment.hotkey} failed")
            found = put_off(commitment, Unavailable("inspection", f"{type(error).__name__}"))
        if isinstance(found, Entrant):
            entrants.append(found)
            mine = Claim(since.get(commitment, commitment.block), commitment.hotkey)
            earlier.update({k: min(mine, earlier.get(k, mine)) for k in (found.facts.content_id, found.facts.weights_id)})
        elif isinstance(found, Inspected):
            copies.append(found)
        else:
            outcomes.append(found)
    return Admitted(competition, window, tuple(entrants), tuple(copies), tuple(outcomes), tuple(no_competition), since)


def _sorted_out(
    rules: Rules, window: Window, claimed: Sequence[Commitment | Sealed | Outcome]
) -> tuple[list[Commitment], list[Outcome], list[Outcome]]:
    """Commitments that say where the model is; outcomes of this competition's sealed ones, and of those of no competition."""
    commitments = [claim for claim in claimed if isinstance(claim, Commitment)]
    no_competition = [claim for claim in claimed if isinstance(claim, Outcome)]
    sealed = []
    for claim in claimed:
        if isinstance(claim, Sealed) and claim.competition == window.competition:
            sealed.append(_sealed(claim))
        elif isinstance(claim, Sealed) and claim.competition not in rules.files:
            unknown = Rejected(Reason.UNKNOWN_COMPETITION, claim.competition, ", ".join(rules.files), claim.hotkey)
            no_competition.append(refused(claim.hotkey, claim.competition, claim.block, "", unknown))
    return commitments, sealed, no_competition


def _since(ports: Ports, commitments: Sequence[Commitment], window_blocks: int) -> dict[Commitment, int]:
    """See `Admitted.since`."""
    seen = ports.store.first_seen((c.hotkey, c.digest) for c in commitments)
    since = {c: claimed_since(c, seen.get((c.hotkey, c.digest), c.block), window_blocks) for c in commitments}
    return {c: block for c, block in since.items() if block != c.block}


async def _try(
    ports: Ports, plan: Plan, admitted: Admitted, known: Known, before: RoundRecord | None, favoured: frozenset[str]
) -> Tried:
    """Choice, samples and losses of one competition."""
    store, competition, window = ports.store, admitted.competition, admitted.window
    mine = {e.commitment: e for e in admitted.entrants}
    owners = [c for c in known.claims.owners if c in mine]
    memory = memory_for(competition, window, before)
    entries = {c.hotkey: _entry(c, mine[c], known.claims) for c in owners}
    duels = _open_duels(competition, window, memory, entries)
    needed = {d.holder: d.needed for d in duels}
    copies, far = known_copies(memory, entries), out_of_reach(duels, entries, needed)
    bar = _bar(competition, window, memory, entries)
    settled = settled_before(bar, entries, sum(samples_per_dataset(competition))) if bar else {}
    choice = choose(
        owners,
        competition.pool,
        store.last_standing(competition.name, before=window.seed.block),
        _last_tried(ports, plan, competition.name),
        challenging=[d.challenger for d in sorted(duels, key=lambda d: (d.high, d.challenger))],
        favoured=favoured,
        resting=far | copies.keys() | settled.keys(),
    )
    say_outcomes([*admitted.outcomes, *(outcome_of(r) for r in known.refused_of(competition))])
    stage("reading", detail=f"{competition.name}: samples, from the data set")
    samples, revisions = await asyncio.to_thread(window_samples, ports.dataset, competition, window)
    tell("samples", f"{competition.name}: {len(samples)} samples drawn by the hash of block {window.seed.block}")
    chosen = [mine[c] for c in choice.chosen]
    measured = await _measure_all(ports, plan, admitted, chosen, samples, _paid(before), bar)
    why = {h: str(stop) for h, stop in settled.items()} | dict.fromkeys(far, _OUT_OF_REACH)
    waiting = {c: _waiting(c, copies.get(c.hotkey), why.get(c.hotkey, "")) for c in choice.waiting}
    say_outcomes(waiting.values())
    return Tried(admitted, memory, samples, revisions, measured, waiting)


async def _measure_all(
    ports: Ports,
    plan: Plan,
    admitted: Admitted,
    entrants: Sequence[Entrant],
    samples: tuple[Sample, ...],
    paid: Collection[str],
    bar: Bar | None,
) -> dict[Commitment, Measured]:
    """The crown's holder first, and the others against it; without its losses everybody is measured in full."""
    turn, against = Turn.of(ports.evaluator.slots, len(entrants)), None

    async def one(entrant: Entrant) -> Measured:
        with about(entrant.commitment.hotkey):
            measured = await _measure(ports, admitted.competition, entrant, samples, plan.block, paid, against, turn)
        turn.done.add(entrant.commitment.hotkey)
        turn.tell_stage()
        return measured

    found = {}
    holder = next((e for e in entrants if bar and e.commitment.hotkey == bar.holder), None)
    if bar is not None and holder is not None:
        found[holder.commitment] = measured = await one(holder)
        if len(measured.losses) == len(samples):
            against = Against(bar, tuple(loss.nats for loss in measured.losses))
    others = [e for e in entrants if e is not holder]
    found |= dict(zip([e.commitment for e in others], await asyncio.gather(*map(one, others)), strict=True))
    return {e.commitment: found[e.commitment] for e in entrants}


async def _measure(
    ports: Ports,
    competition: Competition,
    entrant: Entrant,
    samples: tuple[Sample, ...],
    block: int,
    paid: Collection[str],
    against: Against | None,
    turn: Turn,
) -> Measured:
    """`measure`; a bug that one stranger's model brings up must not stop all the others."""
    try:
        return await measure(ports, competition, entrant, samples, block, paid, against, turn)
    except Exception as error:  # noqa: BLE001
        bug(f"measuring {entrant.commitment.hotkey} failed")
        return Measured(put_off(entrant.commitment, Unavailable("evaluation", type(error).__name__)))


def _paid(before: RoundRecord | None) -> frozenset[str]:
    """Contents that earned something in the round before, in whatever competition."""
    competitions = before.competitions.values() if before is not None else ()
    models = (kept.model(s.hotkey) for kept in competitions for s in kept.scores if s.weight > 0)
    return frozenset(m.entry.content_id for m in models if m is not None and m.entry is not None)


def _judge(tried: Tried, known: Known) -> Judged:
    """What is scored of a competition's models, now that it is known which of them are copies."""
    admitted, competition = tried.admitted, tried.admitted.competition
    holder = tried.memory.holder
    if holder and holder.hotkey in known.copies and any(m.stopped for m in tried.measured.values()):
        raise Unavailable(competition.name, "models were stopped against a holder that turned out to be a copy: judged again")
    mine = {e.commitment: e for e in admitted.entrants}
    outcomes = [*admitted.outcomes, *(outcome_of(r) for r in known.refused_of(competition))]
    unclear = Unavailable("inspection", "claimed before by somebody who lost the claim: looked at again")
    outcomes += [put_off(i.commitment, unclear) for i in admitted.copies if i.commitment.hotkey not in known.copies]
    models = [ModelRecord(outcome) for outcome in outcomes]
    table = {}
    for c, measured in tried.measured.items():
        if c.hotkey not in known.copies:
            models.append(_model_record(competition, mine[c], measured))
            table.update({c.hotkey: models[-1].losses} if measured.losses else {})
    models += [ModelRecord(outcome) for c, outcome in tried.waiting.items() if c.hotkey not in known.copies]
    entrants = {e.commitment.hotkey: e for e in admitted.entrants}
    models = [_with_what_is_known(m, entrants.get(m.hotkey), known) for m in models]
    entries = _entries(tried.memory, mine, models, known.claims)
    outage = any(m.outcome.status == "unavailable" for m in models)
    contest = Contest(competition, admitted.window, table, entries, tried.memory, outage)
    return Judged(contest, tried.samples, tried.datasets, tuple(models))


def _with_what_is_known(model: ModelRecord, entrant: Entrant | None, known: Known) -> ModelRecord:
    if entrant is None:
        return model
    digest = known.tensor_digests.get(entrant.facts.content_id, "")
    return replace(model, facts=entrant.facts, tensor_digest=digest, resembles=known.resembles.get(model.hotkey, ""))


def _open_duels(competition: Competition, window: Window, memory: Memory, entries: Mapping[str, Entry]) -> tuple[Duel, ...]:
    """What is known at this block of the crown's challengers; nothing under a rule without a crown."""
    rule = competition.scoring
    return open_duels(rule, memory, entries, window.seed.block) if isinstance(rule, Champion) else ()


def _bar(competition: Competition, window: Window, memory: Memory, entries: Mapping[str, Entry]) -> Bar | None:
    """What the crown's challengers are held against in this window; nothing under a rule without a crown."""
    rule = competition.scoring
    return bar_of(rule, memory, entries, window.seed.block) if isinstance(rule, Champion) else None


def _entry(commitment: Commitment, entrant: Entrant, claims: FirstClaims) -> Entry:
    """Since when the hotkey claims this content: committing to the same content again makes nobody younger."""
    content = entrant.facts.content_id
    claim = claims.claims.get(content)
    since = min(claim.block, commitment.block) if claim and claim.hotkey == commitment.hotkey else commitment.block
    return Entry(content, since)


def _model_record(competition: Competition, entrant: Entrant, measured: Measured) -> ModelRecord:
    losses = measured.losses
    if not losses:
        return ModelRecord(measured.outcome)
    return ModelRecord(
        measured.outcome,
        tokenizer_id=tokenizer_id_of(competition, entrant),
        num_tokens=sum(x.num_tokens for x in losses if math.isfinite(x.nats)),
        losses=tuple(x.nats for x in losses),
        stopped=measured.stopped,
        unscored=tuple(x.reason for x in losses if not math.isfinite(x.nats)),
    )


def _entries(
    memory: Memory, mine: Mapping[Commitment, Entrant], models: Sequence[ModelRecord], claims: FirstClaims
) -> dict[str, Entry]:
    """Who was evaluated, who was left out by our own choice, and the crown's holder though it did not answer.

    An outage must not take a crown; but a challenger that could choose when to be seen could choose what it is judged on.
    """
    valid = {m.hotkey for m in models if m.outcome.status in ("evaluated", "waiting")}
    entries = {c.hotkey: _entry(c, e, claims) for c, e in mine.items() if c.hotkey in valid}
    holder = memory.holder
    for outcome in (m.outcome for m in models if holder and m.hotkey == holder.hotkey):
        claim = claims.claims.get(outcome.model)  # the same model id is the same content
        if holder and outcome.status == "unavailable" and claim and claim.hotkey == holder.hotkey:
            entries[holder.hotkey] = Entry(holder.content_id, min(claim.block, outcome.block))
    return entries


def window_samples(
    dataset: Callable[[Competition, int], DataFiles], competition: Competition, window: Window
) -> tuple[tuple[Sample, ...], dict[str, str]]:
    """The window's samples in the order in which they are measured, and the revision of each data set that they are from.

    `dataset` opens a competition's data set of an index. Raises what `draw` raises.
    """
    found: dict[str, Sample] = {}
    revisions = {}
    for index, count in enumerate(samples_per_dataset(competition)):
        source, data = competition.datasets[index], dataset(competition, index)
        name = f"{competition.name} {index}" if index else competition.name
        drawn = draw(
            data, source.files, source.column, count, competition.limits.max_chars,
            block_hash=window.seed.hash, competition=name, window=window.index,
        )  # fmt: skip
        found.update({s.id: s for s in drawn})
        revisions[f"{index} {source.hub if isinstance(source, HubDataset) else source.folder}"] = data.revision
    rule, drawn_order = competition.scoring, tuple(found.values())
    if not isinstance(rule, Champion) or rule.stop_error_rate == 0:
        return drawn_order, revisions
    return tuple(drawn_order[place] for place in measuring_order(window, len(drawn_order))), revisions


_OUT_OF_REACH = "no further sample could win today; measured again when the holder's advantage has decayed"


def _waiting(c: Commitment, copy_of: str | None, no_use: str) -> Outcome:
    reason, why = "waiting", "no place under evaluation in this round"
    if copy_of is not None:
        reason, why = "near_copy", f"was measured to be a near copy of {copy_of}'s earlier model, so it is not measured again"
    elif no_use:
        reason, why = "out_of_reach", no_use
    return Outcome(c.hotkey, c.competition, c.block, "waiting", str(c.model), reason=reason, detail=why)


def _sealed(c: Sealed) -> Outcome:
    why = "sealed: its owner has not said yet where the model is"
    return Outcome(c.hotkey, c.competition, c.block, "waiting", reason="sealed", detail=why)
