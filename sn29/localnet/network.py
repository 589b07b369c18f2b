"""A subnet on this machine: an embedded chain, a loopback Hub with tokenizer and text, two competitions at tiny size.

DIR/chain.db        the chain (see `ledger`); its clock runs whether or not a process looks
DIR/hub/            the Hub's repositories (see `hub`)
DIR/competitions/   c00.yaml and c01.yaml: the rules of the real ones, the numbers of a model that trains in a minute
DIR/localnet.json   the Hub's port and its users' tokens: they stay the same from start to start
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sn29.chain import create_wallet, load_wallet
from sn29.errors import Reason, Rejected
from sn29.hub import Hub
from sn29.localnet.hub import LoopbackHub, add_user
from sn29.localnet.ledger import Ledger
from sn29.localnet.text import Texts
from sn29.models.tokenizer import Tokenizer

NETUID = 29
DATASET = "localnet/text"
TOKENIZER = "Xenova/gpt-4"  # the real one's name: a competition file says which content it must have
TRAINING_FILES = "data/train-*.parquet"
WINDOW_BLOCKS = 360
MAX_CHARS = 1200

_COMPETITION = """\
# Written by sn29 for a localnet: {name} with small numbers. Sixty samples are too few for the rule champion to be sure of
# anything in two rounds, so the reference's rule decides here.
reward_share: 0.5
families: [{families}]
tokenizer: {{{tokenizer}}}
limits: {{parameters: {parameters}, bytes: 60e6, max_tokens: 768, max_chars: {max_chars}, round_trip_failures: 3}}
dataset: {{hub: {dataset}, revision: "{revision}", files: "data/eval-*.parquet", column: text}}
samples: {{count: 60, window_blocks: {window_blocks}}}
scoring:
  rule: oldest_holder
  group: 3
  skew: 2.0
  advantage: {{initial: 0.004, decay_per_epoch: 0.995, blocks_per_epoch: 361}}
pool: {{keep: 6, pending: 3}}
"""


@dataclass(frozen=True, slots=True)
class Localnet:
    """Where the parts of a prepared localnet are."""

    folder: Path
    port: int

    @property
    def chain(self) -> Path:
        return self.folder / "chain.db"

    @property
    def competitions(self) -> Path:
        return self.folder / "competitions"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def serve(self) -> LoopbackHub:
        """The Hub, not yet started."""
        return _hub_at(self.folder / "hub", self.port)

    def hub_token(self, user: str) -> str:
        """The user's token; a new user is made."""
        return add_user(self.folder / "hub", user)

    def register(self, wallet: str, hotkey: str, wallets: Path, *, validator: bool = False) -> str:
        """A registered hotkey of that wallet, made if it is new: its address. A validator gets stake and a permit. Raises
        Rejected(SETTING) where it cannot be made."""
        try:
            keys = load_wallet(wallet, hotkey, wallets)
        except Rejected:
            try:
                keys = create_wallet(wallet, hotkey, wallets)
            except OSError as error:
                got = f"{wallets}: {error.strerror or error}"
                raise Rejected(Reason.SETTING, got, "a folder that can be written to", "--wallet.path") from None
        ledger = Ledger.open(self.chain)
        address = str(keys.hotkey.ss58_address)
        ledger.register(address, str(keys.coldkeypub.ss58_address), stake=10_000 if validator else 0, permit=validator)
        ledger.close()
        return address


def prepare(
    folder: Path,
    texts: Texts,
    *,
    port: int = 0,
    block_seconds: float = 1.0,
    window_blocks: int = WINDOW_BLOCKS,
    say: Callable[[str], None] = lambda _: None,
) -> Localnet:
    """A localnet in `folder`, made or completed; what is there stays as it is, so a second call changes nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "localnet.json"
    kept = json.loads(state.read_text()) if state.exists() else {}
    if not (folder / "chain.db").exists():
        say(f"a chain with a block every {block_seconds:g} s")
        Ledger.create(folder / "chain.db", netuid=NETUID, block_seconds=block_seconds, tempo=window_blocks).close()
    with _hub_at(folder / "hub", port or kept.get("port", 0)) as hub:
        localnet = Localnet(folder, int(hub.endpoint.rsplit(":", 1)[1]))
        if "revision" not in kept:
            say("a Hub with the GPT-4 tokenizer and the text")
            kept["revision"] = _publish(hub, texts)
        if not localnet.competitions.is_dir():
            say("two competitions: c00 (Llama, GPT-4 tokenizer) and c01 (Phi or Phi3, any tokenizer)")
            _write_competitions(localnet, texts, kept["revision"], window_blocks)
    _write(state, {**kept, "port": localnet.port})
    return localnet


def open_localnet(folder: Path) -> Localnet:
    """A localnet that was prepared. Raises Rejected(SETTING) when there is none."""
    state = folder / "localnet.json"
    if not state.exists():
        how = "run `sn29 localnet up` first, or name its folder: --localnet.dir"
        raise Rejected(Reason.SETTING, f"no localnet in {folder}", "one that was prepared", advice=how)
    return Localnet(folder, json.loads(state.read_text())["port"])


def _hub_at(folder: Path, port: int) -> LoopbackHub:
    try:
        return LoopbackHub(folder, port=port)
    except OSError as error:
        where = f"port {port}: {error.strerror}"
        raise Rejected(Reason.SETTING, where, "a free port: name another one with --port", str(folder)) from None


def _publish(hub: LoopbackHub, texts: Texts) -> str:
    """Uploads tokenizer and text with the real client; the text's revision."""
    dataset_owner, tokenizer_owner = DATASET.partition("/")[0], TOKENIZER.partition("/")[0]
    tokenizers = Hub(hub.endpoint, token=hub.add_user(tokenizer_owner))
    tokenizers.create(TOKENIZER)
    tokenizers.upload(TOKENIZER, texts.gpt4, message="GPT-4's tokenizer")
    datasets = Hub(hub.endpoint, token=hub.add_user(dataset_owner))
    datasets.create(DATASET, kind="dataset")
    return datasets.upload(DATASET, texts.dataset, message="text of three sources", kind="dataset")


def _write_competitions(localnet: Localnet, texts: Texts, revision: str, window_blocks: int) -> None:
    fingerprint = Tokenizer.load(texts.gpt4 / "tokenizer.json").fingerprint()
    part = localnet.folder / "competitions.part"
    part.mkdir(exist_ok=True)
    for name, families, tokenizer, parameters in (
        ("c00", "LlamaForCausalLM", f"hub: {TOKENIZER}, fingerprint: {fingerprint}, start_token: 100257", "8e6"),
        ("c01", "PhiForCausalLM, Phi3ForCausalLM", "free: true", "4e6"),
    ):
        text = _COMPETITION.format(
            name=name, families=families, tokenizer=tokenizer, parameters=parameters,
            dataset=DATASET, revision=revision, window_blocks=window_blocks, max_chars=MAX_CHARS,
        )  # fmt: skip
        (part / f"{name}.yaml").write_text(text)
    part.rename(localnet.competitions)


def _write(path: Path, value: object) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    os.replace(part, path)
