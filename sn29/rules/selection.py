"""Which commitments are looked at, which of them are copies, and which models are evaluated in this round.

Five questions, in the order in which their answers become known:

    next_round     from the chain's height: which block's round is due?
    claimed_since  from the chain now and earlier: since when does a commitment claim its model?
    select         from the chain alone: is its competition in force, is its model known to belong to somebody else?
    first_claims   from Hub metadata: who committed this content first?
    choose         who gets one of the places under evaluation?

A claim is remembered only for content that was seen to match the commitment's digest. A model id alone claims
nothing: anybody can commit the name of somebody else's repository, but not the digest of files that they have not
read for their own hotkey.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sn29.errors import Reason, Rejected
from sn29.records import Commitment, Entry, Metagraph
from sn29.rules.champion import Duel
from sn29.rules.competition import Pool


@dataclass(frozen=True, slots=True, order=True)
class Claim:
    """Since when a model id, a content id or a weight file is whose. The smaller claim is the earlier one."""

    block: int
    hotkey: str

    def __str__(self) -> str:
        return f"{self.hotkey} at block {self.block}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A commitment that is out, and why."""

    commitment: Commitment
    failure: Rejected


@dataclass(frozen=True, slots=True)
class Selection:
    """What `select` makes of all commitments."""

    by_competition: Mapping[str, tuple[Commitment, ...]]
    """For every competition in force, sorted by name: its commitments, oldest first."""
    refused: tuple[Refusal, ...]


@dataclass(frozen=True, slots=True)
class Inspected:
    """A commitment whose files were seen to match its digest."""

    commitment: Commitment
    content_id: str
    weight_oids: tuple[str, ...] = ()
    """`RepoFile.oid` of the repository's *.safetensors files."""
    since: int | None = None
    """What `claimed_since` says; None: the commitment's own block."""

    @property
    def claim(self) -> Claim:
        return Claim(self.commitment.block if self.since is None else self.since, self.commitment.hotkey)


@dataclass(frozen=True, slots=True)
class FirstClaims:
    """What `first_claims` makes of inspected commitments."""

    owners: tuple[Commitment, ...]
    """Those that keep their claim, oldest first."""
    refused: tuple[Refusal, ...]
    claims: Mapping[str, Claim] = field(repr=False)
    """Everything known so far, by model id, content id and weight file: to be remembered for later rounds."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which models are evaluated in this round."""

    chosen: tuple[Commitment, ...]
    """Oldest first."""
    waiting: tuple[Commitment, ...]
    """Those for whom there was no place, the next in line first."""


def next_round(lengths: Mapping[str, int], finalized: int, last: int | None, catch_up: int) -> int | None:
    """The block of the round that is due at the finalized height, None when there is none.

    A round belongs to a block in which at least one competition's window opens: a multiple of its length in blocks
    (`lengths`, by competition). Rounds are worked through in order from `last`, the last one that was finished. Of
    those that were missed only the newest `catch_up` are due, and on a first start (`last` is None) only the newest
    one. There is no round before every competition has had a whole window of blocks, in which models could be
    committed.
    """
    at_most = 1 if last is None else max(1, catch_up)
    after = max(last or 0, max(lengths.values(), default=finalized + 1) - 1)
    opened = {block for n in lengths.values() for block in range(finalized // n * n, after, -n)[:at_most]}
    due = sorted(opened)[-at_most:]
    return due[0] if due else None


def claimed_since(commitment: Commitment, first_seen: int, window_blocks: int) -> int:
    """The block from which a commitment claims its model.

    first_seen: block of the earliest commitment of this hotkey with this digest that we ever saw, sealed or not (its
    own block if there was none). A digest is made of all files and the hotkey, so whoever wrote it had the files then.
    It counts if the commitment that brings the files came within one window after it: a model that is held back longer
    shall not be older than those that were shown meanwhile.
    """
    return first_seen if commitment.block - window_blocks <= first_seen <= commitment.block else commitment.block


def select(
    commitments: Iterable[Commitment],
    competitions: Collection[str],
    known: Mapping[str, Claim],
    since: Mapping[Commitment, int] | None = None,
) -> Selection:
    """Sort out what the chain alone can tell. `known` holds earlier claims by model id (other keys do no harm).

    since: what `claimed_since` says of a commitment, where it is not the commitment's own block.
    """
    by_competition: dict[str, list[Commitment]] = {name: [] for name in sorted(competitions)}
    refused = []
    for commitment in _oldest_first(commitments):
        owner, mine = known.get(str(commitment.model)), Claim((since or {}).get(commitment, commitment.block), commitment.hotkey)
        if commitment.competition not in by_competition:
            in_force = ", ".join(by_competition) or "none in force"
            refused.append(_refusal(Reason.UNKNOWN_COMPETITION, commitment, commitment.competition, in_force))
        elif owner is not None and _belongs_to_another(owner, mine):
            refused.append(_refusal(Reason.COPY, commitment, str(commitment.model), f"first committed by {owner}"))
        else:
            by_competition[commitment.competition].append(commitment)
    return Selection({name: tuple(found) for name, found in by_competition.items()}, tuple(refused))


def first_claims(inspected: Iterable[Inspected], known: Mapping[str, Claim]) -> FirstClaims:
    """Give every content, and every single weight file, to whoever claimed it first; refuse the others as copies.

    Of one block the smaller hotkey is first. A miner who commits the same content again keeps the first claim to it.
    What a refused copy brings besides the copied file is not claimed by it. `known` is `claims` of the rounds before.
    """
    claims = dict(known)
    owners, refused = [], []
    for found in sorted(inspected, key=lambda i: i.claim):
        commitment, mine = found.commitment, found.claim
        keys = (str(commitment.model), found.content_id, *found.weight_oids)
        taken = next((key for key in keys if key in claims and _belongs_to_another(claims[key], mine)), None)
        if taken is not None:
            refused.append(_refusal(Reason.COPY, commitment, taken, f"first committed by {claims[taken]}"))
            continue
        owners.append(commitment)
        claims.update({key: min(mine, claims.get(key, mine)) for key in keys})
    return FirstClaims(tuple(owners), tuple(refused), claims)


def choose(
    candidates: Iterable[Commitment],
    pool: Pool,
    last_weights: Mapping[str, float],
    last_evaluated: Mapping[str, int],
    *,
    challenging: Sequence[str] = (),
    favoured: Collection[str] = (),
    resting: Collection[str] = (),
) -> Choice:
    """At most `pool.keep + pool.pending` of the candidates of one competition.

    `pool.pending` places are for models that were never evaluated, oldest commitment first, so that a new commitment is
    always judged, whoever's it is and whatever pool its owner was in. The other `pool.keep` are for the hotkeys with
    the largest positive weight in the last round, then for those that are `challenging` (in their order), then for those
    that other validators reward (`favoured`, see `top_miners`), then for the rest, longest not evaluated first: however many
    new models are thrown in, who has something to show goes on showing it. Places that one kind leaves free go to the
    other. Those that are `resting` (see `out_of_reach`) get none. `last_weights` is by hotkey, `last_evaluated` by model
    id (any number that grows with time, such as a block).
    """
    oldest_first = _oldest_first(candidates)
    by_weight = sorted(oldest_first, key=lambda c: -last_weights.get(c.hotkey, 0.0))
    paid = [c for c in by_weight if last_weights.get(c.hotkey, 0.0) > 0][: pool.keep]
    rest = [c for c in oldest_first if c not in paid]
    new = [c for c in rest if str(c.model) not in last_evaluated and c.hotkey not in resting]
    seen = sorted((c for c in rest if c not in new), key=lambda c: last_evaluated.get(str(c.model), 0))
    order = {hotkey: place for place, hotkey in enumerate(challenging)}
    awake = [c for c in seen if c.hotkey not in resting]
    awake.sort(key=lambda c: (order.get(c.hotkey, len(order)), c.hotkey not in favoured))
    known = [*paid, *awake]
    line = [*known[: pool.keep], *new[: pool.pending], *known[pool.keep :], *new[pool.pending :]]
    places = pool.keep + pool.pending
    waiting = [*line[places:], *(c for c in seen if c.hotkey in resting)]
    return Choice(tuple(_oldest_first(line[:places])), tuple(waiting))


def large_validators(graph: Metagraph, *, count: int = 10, max_age_blocks: int = 1200) -> tuple[str, ...]:
    """Hotkeys of the validators whose judgement counts: the largest by stake with a permit that set weights lately.

    The reference's numbers (10 validators, 1,200 blocks). Of equal stake the smaller hotkey; the same for everybody who
    reads the same block.
    """
    lately = [n for n in graph.neurons if n.permit and graph.block - n.last_update <= max_age_blocks]
    return tuple(n.hotkey for n in sorted(lately, key=lambda n: (-n.stake, n.hotkey))[:count])


def top_miners(rows: Iterable[Mapping[str, float]], *, fraction: float = 0.05) -> frozenset[str]:
    """Hotkeys that get more than `fraction` of the weight in any of these rows (0.05 is the reference's)."""
    return frozenset(hotkey for row in rows for hotkey, weight in row.items() if weight > fraction)


def out_of_reach(duels: Iterable[Duel], entries: Mapping[str, Entry], needed: Mapping[str, float]) -> frozenset[str]:
    """Challengers that another evaluation cannot help now: `duels` are what is known of them (`champion.open_duels`).

    A challenger rests while its holder is the same and even the most favourable end of its confidence sequence (`low`, of
    the mean of ln(its loss / the holder's)) does not reach what is needed against the holder today (`needed` by
    holder, in the same unit, positive); as the holder's advantage decays it comes back by itself.

    Example: low -0.0012, needed 0.0030: rests. A week later needed is 0.0011: it is evaluated again.
    """
    return frozenset(
        d.challenger
        for d in duels
        if d.holder in entries and d.challenger in entries and not d.won and d.low > -needed.get(d.holder, 0.0)
    )


def _belongs_to_another(owner: Claim, claim: Claim) -> bool:
    return owner.hotkey != claim.hotkey and owner < claim


def _oldest_first(commitments: Iterable[Commitment]) -> list[Commitment]:
    return sorted(commitments, key=lambda c: (c.block, c.hotkey))


def _refusal(reason: Reason, commitment: Commitment, got: str, limit: str) -> Refusal:
    return Refusal(commitment, Rejected(reason, got, limit, commitment.hotkey))
