"""From settings to adapters: which chain, which Hub, which competitions. Nothing else in the code knows the network's name."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn29.errors import Reason, Rejected
from sn29.rules.competition import (
    Competition,
    FixedTokenizer,
    FolderDataset,
    HallOfFame,
    check_together,
    parse_competition,
    parse_hall_of_fame,
)
from sn29.settings import NeuronSettings

if TYPE_CHECKING:
    from sn29.chain import Chain
    from sn29.corpus import DataFiles
    from sn29.examination import Rules
    from sn29.hub import Hub

HALL_OF_FAME = "hall_of_fame.yaml"
PRIVATE_NETWORKS = ("localnet", "local")


def open_chain(settings: NeuronSettings) -> Chain:
    """The chain of `settings.network` with the wallet's hotkey."""
    from sn29.chain import Chain, load_wallet

    wallet = load_wallet(settings.wallet_name, settings.wallet_hotkey, settings.wallet_path)
    return Chain(settings.netuid, network=network_name(settings), wallet=wallet, substrate=_substrate(settings))


def network_name(settings: NeuronSettings) -> str:
    """What the SDK is told; it knows no `localnet`, whose ledger is handed to it instead."""
    return "local" if settings.network == "localnet" else settings.network


def _substrate(settings: NeuronSettings) -> Any:
    if settings.network != "localnet":
        return None
    from sn29.localnet.ledger import LedgerSubstrate

    path = settings.localnet_dir / "chain.db"
    if not path.exists():
        raise Rejected(Reason.SETTING, f"no localnet in {settings.localnet_dir}", "run `sn29 localnet up` first", "--network")
    return LedgerSubstrate(path)


def read_texts(folder: Path) -> dict[str, str]:
    """File name -> text of every competition file in a folder, and of the hall of fame. Raises Rejected(COMPETITION_FILE)."""
    texts = {}
    for path in sorted(folder.glob("*.y*ml")) if folder.is_dir() else ():
        if path.suffix != ".yaml":
            raise Rejected(Reason.COMPETITION_FILE, path.name, f"{path.stem}.yaml", str(folder))
        try:
            texts[path.name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Rejected(Reason.COMPETITION_FILE, error, "a text file in UTF-8", path.name) from None
    if not texts:
        raise Rejected(Reason.COMPETITION_FILE, "no *.yaml", "at least one competition", str(folder))
    return texts


def read_competitions(folder: Path) -> tuple[dict[str, Competition], HallOfFame, dict[str, str]]:
    """(competitions by name, hall of fame, sha256 hex of each file by its stem). Raises Rejected(COMPETITION_FILE)."""
    texts = read_texts(folder)
    hall_text = texts.pop(HALL_OF_FAME, "")
    hall = parse_hall_of_fame(hall_text) if hall_text else None
    competitions = {name.removesuffix(".yaml"): parse_competition(name.removesuffix(".yaml"), t) for name, t in texts.items()}
    check_together(list(competitions.values()))
    hashes = {name.removesuffix(".yaml"): hashlib.sha256(t.encode()).hexdigest() for name, t in texts.items()}
    hashes["hall_of_fame"] = hashlib.sha256(hall_text.encode()).hexdigest()
    nobody = HallOfFame(max_fraction=0.0, decay_per_epoch=0.995, blocks_per_epoch=361, entries=())
    return competitions, hall or nobody, hashes


def rules_of(folder: Path) -> Rules:
    """The rules that a folder's files state. Raises Rejected(COMPETITION_FILE)."""
    from sn29.examination import Rules

    return Rules(*read_competitions(folder))


def read_rules(settings: NeuronSettings) -> Rules:
    """The rules in force. On a public network every file must pin what it names: validators must judge on the same content."""
    rules = rules_of(settings.competitions_dir)
    for name, competition in rules.competitions.items():
        if settings.network not in PRIVATE_NETWORKS and competition.unpinned:
            what = ", ".join(competition.unpinned)
            raise Rejected(
                Reason.COMPETITION_FILE,
                f"{what} without a pin",
                f"a pin for network {settings.network}",
                f"{name}.yaml",
            )
    return rules


def dataset_of(hub: Hub, folder: Path) -> Callable[[Competition], DataFiles]:
    """Opens a competition's data set: a Hub revision, or a folder (relative to the competition files)."""
    from sn29.corpus import LocalFolder
    from sn29.hub import HubDataset

    def open_dataset(competition: Competition) -> DataFiles:
        source = competition.dataset
        if isinstance(source, FolderDataset):
            return LocalFolder(folder / source.folder)
        return HubDataset(hub, source.hub, source.revision or hub.resolve(source.hub, "dataset"))

    return open_dataset


@dataclass(slots=True)
class Tokenizers:
    """Fixed tokenizers, fetched once and checked against their fingerprint each time the program starts."""

    hub: Hub
    folder: Path
    _checked: dict[str, tuple[Path, int]] = field(default_factory=dict)

    def __call__(self, wanted: FixedTokenizer) -> tuple[Path, int]:
        """(path of tokenizer.json, its largest id). Raises Rejected(TOKENIZER) when the content is another one."""
        pin = wanted.fingerprint or "unpinned"
        if pin not in self._checked:
            path = self.folder / pin / "tokenizer.json"
            if not path.exists():
                self._fetch(wanted, path)
            self._checked[pin] = (path, self._check(path, wanted))
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
        from sn29.models.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(path)
        if wanted.fingerprint is not None and tokenizer.fingerprint() != wanted.fingerprint:
            got = tokenizer.fingerprint()
            path.unlink()
            raise Rejected(Reason.TOKENIZER, f"fingerprint {got}", wanted.fingerprint, wanted.hub)
        return tokenizer.largest_id()
