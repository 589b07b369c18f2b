"""From settings to adapters: which chain, which Hub, which competitions. Nothing else in the code knows the network's name."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn29 import telemetry
from sn29.errors import Reason, Rejected, Unavailable
from sn29.rules.competition import Competition, FixedTokenizer, FolderDataset, HallOfFame, parse_hall_of_fame
from sn29.rules.schedule import CompetitionFile, check_files, in_force, parse_file
from sn29.settings import NeuronSettings, ValidatorSettings, default_cache

if TYPE_CHECKING:
    from sn29.chain import Chain
    from sn29.corpus import DataFiles
    from sn29.evaluation.worker import Evaluator
    from sn29.examination import FixedText, Rules
    from sn29.hub import Hub

HALL_OF_FAME = "hall_of_fame.yaml"
NOBODY = HallOfFame(max_fraction=0.0, decay_per_epoch=0.995, blocks_per_epoch=361, entries=())
PRIVATE_NETWORKS = ("localnet", "local")


def open_chain(settings: NeuronSettings, *, with_wallet: bool = True) -> Chain:
    """The chain of `settings.network`, with the wallet's hotkey unless it is only read. Raises Rejected(SETTING)."""
    from sn29.chain import Chain, load_wallet

    hotkey = (settings.wallet_name, settings.wallet_hotkey, settings.wallet_path)
    wallet = load_wallet(*hotkey) if with_wallet else None
    return Chain(
        settings.netuid,
        network=network_name(settings),
        fallbacks=settings.fallbacks,
        archives=settings.archives,
        wallet=wallet,
        substrate=_substrate(settings),
        deadline_s=settings.chain_deadline_s,
        locks=settings.locks_dir,
    )


async def open_evaluator(settings: ValidatorSettings, work_dir: Path) -> Evaluator:
    """What measures models: this machine, or the fleet of `--fleet`. Raises Rejected(SETTING), Unavailable."""
    from sn29.evaluation.worker import Here

    if not settings.fleet:
        return Here(work_dir)
    from sn29.evaluation.fleet import Fleet

    return await Fleet.open(
        settings.fleet, device=settings.device, threads=settings.threads, cache=work_dir / "fleet", say=telemetry.tell
    )


def network_name(settings: NeuronSettings) -> str:
    """What the SDK is told; it knows no `localnet`, whose ledger is handed to it instead."""
    return "local" if settings.network == "localnet" else settings.network


def _substrate(settings: NeuronSettings) -> Any:
    if settings.network != "localnet":
        return None
    from sn29.localnet.ledger import LedgerSubstrate

    path = settings.localnet_dir / "chain.db"
    if not path.exists():
        how = "run `sn29 localnet up` first, or name its folder: --localnet.dir"
        raise Rejected(
            Reason.SETTING, f"no localnet in {settings.localnet_dir}", "one that was prepared", "--network", advice=how
        )
    return LedgerSubstrate(path)


# --- competition files ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RuleFiles:
    """Everything that a folder of competition files says."""

    files: Mapping[str, CompetitionFile]
    """By competition name, sorted."""
    hall_of_fame: HallOfFame
    hashes: Mapping[str, str]
    """sha256 hex of each competition's file."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """File name -> text of each, and of the hall of fame."""


_NAME_A_FOLDER = (
    "go to the folder of the clone, or name the folder of the files: --competitions.dir DIR, `sn29 competitions check DIR`"
)


def read_texts(folder: Path) -> dict[str, str]:
    """File name -> text of every competition file in a folder, and of the hall of fame. Raises Rejected(COMPETITION_FILE)."""
    texts = {}
    try:
        paths = sorted(folder.glob("*.y*ml")) if folder.is_dir() else []
    except OSError as error:  # a network's disk that is away
        raise Rejected(Reason.COMPETITION_FILE, error, "a folder that can be read", str(folder)) from None
    for path in paths:
        if path.suffix != ".yaml":
            raise Rejected(Reason.COMPETITION_FILE, path.name, f"{path.stem}.yaml", str(folder))
        try:
            texts[path.name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Rejected(Reason.COMPETITION_FILE, error, "a text file in UTF-8", path.name) from None
    if not texts:
        raise Rejected(Reason.COMPETITION_FILE, "no *.yaml", "at least one competition", str(folder), advice=_NAME_A_FOLDER)
    return texts


def read_git_texts(source: str, cache: Path) -> dict[str, str]:
    """The same from `competitions/` of a git repository at one commit: `REPO@REVISION`, 40 hex digits, REPO a URL or a path.

    Fetches that commit alone, with the `git` program, into the bare repository `cache`; a commit that is there already is
    not fetched again. Raises Rejected(SETTING | COMPETITION_FILE), Unavailable.
    """
    repo, _, revision = source.rpartition("@")
    if not repo or not re.fullmatch("[0-9a-f]{40}", revision):
        raise Rejected(Reason.SETTING, source, "REPO@REVISION with all 40 hex digits of a commit", "--competitions.git")
    _git("init", "--quiet", "--bare", str(cache))
    here = ("--git-dir", str(cache))
    try:
        _git(*here, "cat-file", "-e", f"{revision}^{{tree}}")
    except Unavailable:
        _git(*here, "fetch", "--quiet", "--depth", "1", "--no-tags", "--", repo, revision)
    listed = _git(*here, "ls-tree", "-z", "--name-only", revision, "competitions/").split("\0")
    names = [path.removeprefix("competitions/") for path in listed if path.endswith(".yaml")]
    if not names:
        raise Rejected(Reason.COMPETITION_FILE, "no competitions/*.yaml", "at least one competition", source)
    return {name: _git(*here, "show", f"{revision}:competitions/{name}") for name in names}


def _git(*words: str) -> str:
    """Standard output of `git`. Raises Unavailable when it fails, is not there or takes longer than two minutes."""
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(["git", *words], capture_output=True, encoding="utf-8", timeout=120, env=environment, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError) as error:
        raise Unavailable("git", str(error)[:200]) from None
    if done.returncode:
        raise Unavailable("git", " ".join(done.stderr.split())[-200:] or f"exit status {done.returncode}")
    return done.stdout


def parse_texts(texts: Mapping[str, str]) -> RuleFiles:
    """What the files say, every change checked, alone and together. Raises Rejected(COMPETITION_FILE)."""
    hall = parse_hall_of_fame(texts[HALL_OF_FAME]) if HALL_OF_FAME in texts else None
    by_name = {name.removesuffix(".yaml"): text for name, text in sorted(texts.items()) if name != HALL_OF_FAME}
    files = {name: parse_file(name, text) for name, text in by_name.items()}
    check_files(list(files.values()))
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in by_name.items()}
    hashes["hall_of_fame"] = hashlib.sha256(texts.get(HALL_OF_FAME, "").encode()).hexdigest()
    return RuleFiles(files, hall or NOBODY, hashes, dict(texts))


def read_files(settings: NeuronSettings) -> RuleFiles:
    """The files that the settings name, from a folder or a git commit. Raises as `read_texts` and `read_git_texts` do."""
    return parse_texts(_texts_of(settings))


def _texts_of(settings: NeuronSettings) -> dict[str, str]:
    if settings.competitions_git:
        return read_git_texts(settings.competitions_git, default_cache() / "competitions.git")
    return read_texts(settings.competitions_dir)


def read_competitions(folder: Path, block: int = 0) -> tuple[dict[str, Competition], HallOfFame, dict[str, str]]:
    """(competitions in force at a block, hall of fame, sha256 hex of each competition's file).

    Block 0 is before every change. Raises Rejected(COMPETITION_FILE).
    """
    read = parse_texts(read_texts(folder))
    return {name: in_force(file, block) for name, file in read.files.items()}, read.hall_of_fame, dict(read.hashes)


class RulesReader:
    """The rules while a program runs: files that change are read again, and a bad one never replaces the last good ones."""

    def __init__(self, settings: NeuronSettings, validator: str = "") -> None:
        """Reads the files; `validator` is the hotkey whose overrides count.

        Raises Rejected(COMPETITION_FILE): a program does not start on files that are wrong, nor on a public network with
        one that does not pin what it names, because validators must judge on the same content. Raises Unavailable when
        a git repository does not answer.
        """
        self._settings, self._validator = settings, validator
        self._seen = _texts_of(self._settings)
        self.files = self._checked(self._seen)
        """The last good files."""

    def rules(self, texts: Mapping[str, str] | None = None) -> Rules:
        """The last good files; or other ones, given by name. Raises Rejected(COMPETITION_FILE) for those."""
        from sn29.examination import Rules

        read = self.files if texts is None or texts == self.files.texts else parse_texts(texts)
        return Rules(read.files, read.hall_of_fame, read.hashes, self._validator)

    def look_again(self) -> None:
        """Takes over files that changed, if they are good; what is refused is said once, when it is first seen.

        From which block on they hold says `sn29.changeover`; a round that is worked on keeps its rules.
        """
        if self._settings.competitions_git:
            return  # a commit does not change
        try:
            texts = _texts_of(self._settings)
        except Rejected as error:
            texts = {"": str(error)}  # not even readable: remembered like a text, so that it is said once
        if texts == self._seen:
            return
        self._seen = texts
        try:
            self.files = self._checked(_texts_of(self._settings) if "" in texts else texts)
        except Rejected as error:
            telemetry.warn("rules_refused", f"{error}; the rules of before stay in force", reason=error.reason.code)
        else:
            what = {name: digest[:12] for name, digest in self.files.hashes.items()}
            telemetry.tell("rules", "new competition files were read, and are good", **what)

    def _checked(self, texts: Mapping[str, str]) -> RuleFiles:
        read = parse_texts(texts)
        for name, file in read.files.items():
            if self._settings.network not in PRIVATE_NETWORKS and file.unpinned:
                got, rule = f"{', '.join(file.unpinned)} without a pin", f"a pin for network {self._settings.network}"
                how = "write the pins into the file with `sn29 competitions pin FILE`"
                raise Rejected(Reason.COMPETITION_FILE, got, rule, f"{name}.yaml", advice=how)
        return read


def dataset_of(hub: Hub, folder: Path) -> Callable[[Competition, int], DataFiles]:
    """Opens a competition's data set, the first or another by its index: a Hub revision, or a folder (relative to `folder`)."""
    from sn29.corpus import LocalFolder
    from sn29.hub import HubDataset

    def open_dataset(competition: Competition, index: int) -> DataFiles:
        source = competition.datasets[index]
        if isinstance(source, FolderDataset):
            return LocalFolder(folder / source.folder)
        return HubDataset(hub, source.hub, source.revision or hub.resolve(source.hub, "dataset"))

    return open_dataset


@dataclass(slots=True)
class Tokenizers:
    """Fixed tokenizers, fetched once and checked against their fingerprint when the program starts.

    A file that is another one than was checked (its hash is looked at each time: 1 ms a MB) is checked again, and one that
    is no good is thrown away and fetched again: what happens on this machine's disk is no miner's fault.
    """

    hub: Hub
    folder: Path
    _checked: dict[str, FixedText] = field(default_factory=dict)

    def __call__(self, wanted: FixedTokenizer) -> FixedText:
        """Raises Rejected(TOKENIZER) when the content that the Hub gives is another one, and what the Hub raises."""
        from sn29.examination import FixedText

        pin = wanted.fingerprint or f"unpinned {wanted.hub} {wanted.revision}".replace("/", " ")
        path = self.folder / pin / "tokenizer.json"
        known = self._checked.get(pin)
        if known is not None and path.is_file() and known.oid == _oid(path):
            return known
        if path.is_file():
            try:
                self._checked[pin] = FixedText(path, self._check(path, wanted), _oid(path))
                return self._checked[pin]
            except Rejected as error:
                telemetry.warn("disk", f"{error}; thrown away and fetched again")
        self._fetch(wanted, path)
        self._checked[pin] = FixedText(path, self._check(path, wanted), _oid(path))
        return self._checked[pin]

    def _fetch(self, wanted: FixedTokenizer, path: Path) -> None:
        from sn29.models.fetch import fetch
        from sn29.records import ModelId

        namespace, _, name = wanted.hub.partition("/")
        model = ModelId(namespace, name, wanted.revision or self.hub.resolve(wanted.hub))
        part = path.parent.with_suffix(".part")
        fetch(self.hub, self.hub.listing(model), part, only=lambda name: name == "tokenizer.json", deadline_s=300)
        path.parent.mkdir(parents=True, exist_ok=True)
        (part / "tokenizer.json").rename(path)
        shutil.rmtree(part)

    def _check(self, path: Path, wanted: FixedTokenizer) -> int:
        """Its largest id. Deletes what it refuses."""
        from sn29.models.tokenizer import Tokenizer

        try:
            tokenizer = Tokenizer.load(path)
            if wanted.fingerprint not in (None, found := tokenizer.fingerprint()):
                raise Rejected(Reason.TOKENIZER, f"fingerprint {found}", wanted.fingerprint, wanted.hub)
        except Rejected:
            path.unlink(missing_ok=True)
            raise
        return tokenizer.largest_id()


def _oid(path: Path) -> str:
    with path.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
