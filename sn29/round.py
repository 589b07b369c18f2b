"""A validator's round, from commitments to weights, as one story.

    plan_round      which block's round is due, and the window of each competition in it
    run_round       admit all -> who claimed what first -> judge each competition -> combine into weights -> keep the record
      admit         read the chain -> select -> inspect metadata
      judge         choose -> draw samples -> measure losses -> score
    publish         sets the newest weights on chain whenever they are due, however long a round takes

Everything that decides a score is a function of the round's block: commitments are read as of the block before the
window's seed block, ages are counted to it, samples and groups come from its hash. A round that was opened is kept in
the store and goes on after a crash as it was opened; what was measured is never measured again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sn29.chain import Chain
from sn29.corpus import DataFiles, draw
from sn29.errors import Reason, Rejected, Unavailable
from sn29.evaluation.worker import BASE_BYTES, Job, evaluate
from sn29.hub import Hub
from sn29.models import checkpoint
from sn29.models.fetch import fetch
from sn29.records import (
    Commitment,
    Head,
    Loss,
    ModelFacts,
    Outcome,
    RepoListing,
    Sample,
    Score,
    Weights,
    Window,
)
from sn29.rules.competition import Competition, FixedTokenizer, HallOfFame, violations
from sn29.rules.scoring import score, win_matrix
from sn29.rules.selection import Claim, FirstClaims, Inspected, Refusal, choose, first_claims, next_round, select
from sn29.rules.weights import combine
from sn29.store import Store
from sn29.telemetry import tell, warn

RECORD_SCHEMA = 1
VERSION_KEY = 100
"""0.1.0 as the chain counts versions; an owner who raises the subnet's key above it turns this software's weights away."""
# Refusals that the world can take back: they are looked at again in the next round, at the cost of one request.
_MAY_HEAL = {Reason.COPY, Reason.REPOSITORY_GONE, Reason.REPOSITORY_CLOSED, Reason.REVISION_GONE}


@dataclass(frozen=True, slots=True)
class Rules:
    """The competitions in force."""

    competitions: Mapping[str, Competition]
    """By name, sorted."""
    hall_of_fame: HallOfFame
    hashes: Mapping[str, str]
    """sha256 hex of each competition's file: verdicts hold for the rules that they were made under."""


@dataclass(frozen=True, slots=True)
class Machine:
    """How this validator evaluates: no rule, only what its hardware wants."""

    models_dir: Path
    device: str
    dtype: str
    threads: int
    evaluation_deadline_s: float
    download_deadline_s: float


@dataclass(frozen=True, slots=True)
class Ports:
    """What a round needs from outside."""

    chain: Chain
    hub: Hub
    store: Store
    dataset: Callable[[Competition], DataFiles]
    """The competition's evaluation text."""
    tokenizer: Callable[[FixedTokenizer], tuple[Path, int]]
    """Path of a fixed tokenizer, fingerprint checked, and its largest id."""
    machine: Machine


@dataclass(frozen=True, slots=True)
class Plan:
    """What a round is about, fixed when it is opened."""

    block: int
    windows: Mapping[str, Window]
    """By competition."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """A commitment whose metadata passed every rule."""

    commitment: Commitment
    facts: ModelFacts
    listing: RepoListing


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

    scores: tuple[Score, ...]
    record: Mapping[str, Any]


# --- planning ---------------------------------------------------------------------------------------------------------


async def plan_round(ports: Ports, rules: Rules, *, catch_up: int) -> Plan | None:
    """The round to work on now: one that was opened and not finished, else the next one due, else None."""
    for opened in ports.store.open_rounds():
        if opened.plan["rules"] == dict(rules.hashes):  # a round opened under other rules is not finished under these
            tell("resumed", f"going on with the round of block {opened.block}", block=opened.block)
            return _plan_from(opened.plan)
    lengths = {name: c.samples.window_blocks for name, c in rules.competitions.items()}
    finalized = await ports.chain.finalized()
    block = next_round(lengths, finalized.block, ports.store.last_finished(), catch_up)
    if block is None:
        return None
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
    _say_refused(no_competition)
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
    ports.store.finish_round(plan.block, record, weights)
    tell("weights", f"round of block {plan.block} decided", **{h: f"{w:.4f}" for h, w in weights.by_hotkey.items()})
    return weights


async def _admit(ports: Ports, rules: Rules, competition: Competition, window: Window, known: Mapping[str, Claim]) -> Admitted:
    """The commitments made before the window's seed block, as far as chain and metadata can judge them."""
    name = competition.name
    commitments, entrants = [], []
    outcomes: list[Outcome] = []
    no_competition: list[Outcome] = []
    for raw in await ports.chain.commitments(window.seed.block - 1):
        try:
            commitments.append(Commitment.parse(raw.hotkey, raw.block, raw.data))
        except Rejected as error:
            no_competition.append(_refused(raw.hotkey, "", raw.block, "", error))
    selection = select(commitments, rules.competitions, known)
    for refusal in selection.refused:
        foreign = refusal.commitment.competition not in rules.competitions
        if foreign or refusal.commitment.competition == name:
            (no_competition if foreign else outcomes).append(_outcome_of(refusal))
    for commitment in selection.by_competition[name]:
        entrant = await _inspect(ports, rules, competition, commitment)
        if isinstance(entrant, Outcome):
            outcomes.append(entrant)
        else:
            entrants.append(entrant)
    return Admitted(competition, window, tuple(entrants), tuple(outcomes), tuple(no_competition))


async def _judge(ports: Ports, rules: Rules, admitted: Admitted, claims: FirstClaims) -> Verdicts:
    """Choice, losses and scores of one competition."""
    store, competition, window = ports.store, admitted.competition, admitted.window
    mine = {e.commitment: e for e in admitted.entrants}
    outcomes = [*admitted.outcomes, *(_outcome_of(r) for r in claims.refused if r.commitment in mine)]
    last = store.weights(before=window.seed.block)
    owners = [c for c in claims.owners if c in mine]
    choice = choose(owners, competition.pool, last.by_hotkey if last else {}, _last_evaluated(store, competition.name))
    outcomes += [_waiting(c) for c in choice.waiting]
    _say_refused(outcomes)
    samples = await asyncio.to_thread(_draw, ports, competition, window)
    tell("samples", f"{competition.name}: {len(samples)} samples drawn by the hash of block {window.seed.block}")
    losses = {}
    for commitment in choice.chosen:
        outcome, found = await _measure(ports, rules, competition, mine[commitment], samples)
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


def _last_evaluated(store: Store, name: str) -> dict[str, int]:
    """Model id -> block of the last finished round that evaluated it in this competition."""
    found: dict[str, int] = {}
    for kept in store.rounds():
        rows = kept.record["competitions"].get(name, {}).get("outcomes", ()) if kept.record else ()
        found.update({row["model"]: kept.block for row in rows if row["status"] == "evaluated"})
    return found


# --- one commitment ---------------------------------------------------------------------------------------------------


async def _inspect(ports: Ports, rules: Rules, competition: Competition, commitment: Commitment) -> Entrant | Outcome:
    """Everything that metadata can show. One request to the Hub for what is known already, about 100 kB for what is new."""
    data, hotkey, rules_hash = commitment.encode(), commitment.hotkey, rules.hashes[competition.name]
    known = ports.store.verdict(hotkey, commitment.block, data, rules_hash)
    if known is not None:
        tell("remembered", "refused before: not looked at again", hotkey=hotkey, reason=known.reason)
        return known
    fixed = competition.tokenizer if isinstance(competition.tokenizer, FixedTokenizer) else None
    largest_id = (await asyncio.to_thread(ports.tokenizer, fixed))[1] if fixed else None  # the first call fetches it
    try:
        listing = await asyncio.to_thread(ports.hub.listing, commitment.model)
        content = checkpoint.content_id(listing.files)
        expected = checkpoint.digest(content, hotkey)
        if commitment.digest != expected:
            raise Rejected(Reason.DIGEST, commitment.digest, expected, hotkey)
        facts = await asyncio.to_thread(checkpoint.inspect, listing, ports.hub.reader(commitment.model))
        for violation in violations(competition, facts, largest_id):
            raise violation
    except Rejected as error:
        outcome = _refused(hotkey, competition.name, commitment.block, str(commitment.model), error)
        if error.reason not in _MAY_HEAL:
            ports.store.keep_verdict(outcome, data, rules_hash)
        return outcome
    except Unavailable as error:
        return _put_off(commitment, error)
    tell(
        "inspected",
        f"{facts.family}, {facts.num_parameters:,} parameters: allowed",
        hotkey=hotkey,
        competition=competition.name,
    )
    return Entrant(commitment, facts, listing)


async def _measure(
    ports: Ports, rules: Rules, competition: Competition, entrant: Entrant, samples: tuple[Sample, ...]
) -> tuple[Outcome, tuple[Loss, ...]]:
    """The losses of one model on the window's samples, from the store where they are known."""
    commitment, content = entrant.commitment, entrant.facts.content_id
    fixed = competition.tokenizer if isinstance(competition.tokenizer, FixedTokenizer) else None
    start_token = competition.tokenizer.start_token
    start_token = entrant.facts.start_token if start_token is None else start_token
    tokenizer_id = (fixed.fingerprint or "") if fixed else tokenizer_oid(entrant.listing)
    profile = f"{ports.machine.dtype} start={start_token} max_tokens={competition.limits.max_tokens} plain-1"
    try:
        known = ports.store.losses(content, tokenizer_id, profile, [s.id for s in samples])
        missing = tuple(s for s in samples if s.id not in known)
        if missing:
            folder = await _fetch(ports, entrant)
            job = Job(
                checkpoint=str(folder),
                tokenizer=str(ports.tokenizer(fixed)[0] if fixed else folder / "tokenizer.json"),
                start_token=start_token,
                max_tokens=competition.limits.max_tokens,
                max_round_trip_failures=competition.limits.round_trip_failures,
                dtype=ports.machine.dtype,
                device=ports.machine.device,
                threads=ports.machine.threads,
                samples=missing,
            )
            found = await _evaluate(ports, entrant, job)
            ports.store.keep_losses(content, tokenizer_id, profile, found)
            known |= {loss.sample: loss for loss in found}
    except Rejected as error:
        outcome = _refused(commitment.hotkey, competition.name, commitment.block, str(commitment.model), error)
        ports.store.keep_verdict(outcome, commitment.encode(), rules.hashes[competition.name])
        _say_refused([outcome])
        return outcome, ()
    except Unavailable as error:
        return _put_off(commitment, error), ()
    tell(
        "evaluated", f"{len(missing)} samples measured, {len(samples) - len(missing)} known",
        hotkey=commitment.hotkey, competition=competition.name, measured=len(missing), known=len(samples) - len(missing),
    )  # fmt: skip
    outcome = Outcome(
        commitment.hotkey, competition.name, commitment.block, "evaluated", str(commitment.model), content_id=content
    )
    return outcome, tuple(known[s.id] for s in samples)


def tokenizer_oid(listing: RepoListing) -> str:
    """Identity of a model's own tokenizer: its file's object id, so that it is known without the file."""
    return next((f.oid for f in listing.files if f.path == "tokenizer.json"), "")


async def _fetch(ports: Ports, entrant: Entrant) -> Path:
    """The model's verified files, one folder a content: two commitments of one content share it."""
    received = 0

    def count(num_bytes: int) -> None:
        nonlocal received
        received += num_bytes

    folder = ports.machine.models_dir / entrant.facts.content_id
    await asyncio.to_thread(
        fetch,
        ports.hub,
        entrant.listing,
        folder,
        only=checkpoint.is_content,
        deadline_s=ports.machine.download_deadline_s,
        progress=count,
    )
    what = f"{received:,} bytes downloaded, every file's hash checked" if received else "the files are here already"
    tell("fetched", what, hotkey=entrant.commitment.hotkey, bytes=received)
    return folder


async def _evaluate(ports: Ports, entrant: Entrant, job: Job) -> tuple[Loss, ...]:
    """The child's losses. A crash or a missed deadline is tried once more at once, so that all validators try alike."""
    facts = entrant.facts
    logits = job.max_tokens * facts.vocab_size * 4 * 3  # float32 logits, their softmax and a copy
    memory = BASE_BYTES + 3 * 4 * facts.num_parameters + logits
    while True:
        try:
            return await evaluate(job, deadline_s=ports.machine.evaluation_deadline_s, memory_bytes=memory)
        except Unavailable as error:
            late = "no result within" in error.why
            if ports.store.count_failure(entrant.commitment) >= 2:
                reason = Reason.DEADLINE if late else Reason.CRASHED
                raise Rejected(
                    reason, error.why, f"{ports.machine.evaluation_deadline_s:.0f} s" if late else "a result"
                ) from None
            warn("retry", str(error), hotkey=entrant.commitment.hotkey)


def _inspected(entrant: Entrant) -> Inspected:
    return Inspected(entrant.commitment, entrant.facts.content_id, (entrant.facts.weights_id,))


def _refused(hotkey: str, competition: str, block: int, model: str, error: Rejected) -> Outcome:
    return Outcome(
        hotkey,
        competition,
        block,
        "rejected",
        model,
        reason=error.reason.code,
        detail=str(error),
        got=error.got,
        limit=error.limit,
    )


def _say_refused(outcomes: Iterable[Outcome]) -> None:
    for o in outcomes:
        if o.status == "rejected":
            warn("refused", o.detail, hotkey=o.hotkey, competition=o.competition, reason=o.reason)


def _outcome_of(refusal: Refusal) -> Outcome:
    c = refusal.commitment
    return _refused(c.hotkey, c.competition, c.block, str(c.model), refusal.failure)


def _put_off(c: Commitment, error: Unavailable) -> Outcome:
    warn("unavailable", str(error), hotkey=c.hotkey, competition=c.competition)
    return Outcome(c.hotkey, c.competition, c.block, "unavailable", str(c.model), reason="unavailable", detail=str(error))


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
    return Verdicts(scores, record)


# --- publishing -------------------------------------------------------------------------------------------------------


async def publish(chain: Chain, store: Store) -> bool:
    """Sets the newest weights on chain if they are due; True when they were set and read back.

    Due: decided by a newer round than the last set, or a tempo after it (validators that fall silent lose their standing).
    A set that landed while we could not see it (a crash, a lost reply) is found by reading the row back, not repeated.
    """
    weights = store.weights()
    if weights is None or not weights.by_hotkey:
        return False
    head, params = await chain.head(), await chain.params()
    me = next((n for n in (await chain.metagraph()).neurons if n.hotkey == chain.hotkey), None)
    if me is None:
        raise Rejected(Reason.NOT_REGISTERED, chain.hotkey, f"a hotkey that is registered on subnet {chain.netuid}")
    last_block, last = next(reversed(store.publications()), (None, None))
    fresh = last is None or last.block < weights.block
    if not fresh and last_block is not None and head.block - last_block < params.tempo:
        return False
    since = weights.block if last_block is None else last_block
    if fresh and me.last_update > since and _same(await chain.weights(chain.hotkey), weights):
        store.keep_publication(me.last_update, weights)
        return True
    if me.last_update + params.weights_rate_limit > head.block:  # registration counts as a set
        return False
    receipt = await chain.set_weights(weights, version_key=VERSION_KEY)
    store.keep_publication(receipt.block, weights)
    tell("published", f"weights of the round of block {weights.block} set on chain and read back", block=receipt.block)
    return True


def _same(on_chain: Mapping[str, float], weights: Weights) -> bool:
    """Equal but for the chain's 16-bit rounding: each share within 1/65535 of the largest."""
    hotkeys = on_chain.keys() | weights.by_hotkey.keys()
    return all(abs(on_chain.get(h, 0.0) - weights.by_hotkey.get(h, 0.0)) <= 2 / 65535 for h in hotkeys)
