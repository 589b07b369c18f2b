"""Miners that break a rule, each as a process of its own, for the demo and for trying a validator out.

    python -m sn29.localnet.mischief copy --of REPO ...        another's model, exactly, under the own key
    python -m sn29.localnet.mischief nan --model DIR ...       a model with NaN in its weights
    python -m sn29.localnet.mischief rewrite --model DIR ...   commits, then replaces the repository
    python -m sn29.localnet.mischief garbage ...               a string on chain that is no commitment

The flags are those of the miner. What needs no program of its own is done with the miner itself and --force: a model
over the parameter limit, a model of another family.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

from pydantic_settings import SettingsConfigDict

from neurons.adapters import open_chain, read_competitions
from sn29 import telemetry
from sn29.chain import Chain
from sn29.errors import Sn29Error
from sn29.hub import Hub
from sn29.models.fetch import fetch
from sn29.records import ModelId
from sn29.rules.competition import Competition
from sn29.settings import MinerSettings, read
from sn29.submission import submit


class CopySettings(MinerSettings):
    """The miner's, and whose model is copied."""

    model_config = SettingsConfigDict(cli_prog_name="python -m sn29.localnet.mischief")
    of: str = ""
    """Repository whose main branch is copied."""


async def copy(settings: CopySettings, chain: Chain, hub: Hub, competition: Competition) -> None:
    """Downloads another's model and commits to it: the digest is right, for it is made for the own hotkey."""
    namespace, _, name = settings.of.partition("/")
    model = ModelId(namespace, name, hub.resolve(settings.of))
    folder = fetch(hub, hub.listing(model), settings.work_dir / "copied", only=_no_git_files, deadline_s=600)
    await submit(chain, hub, folder, settings.repo, competition, None, force=True)


def _no_git_files(path: str) -> bool:
    return not path.startswith(".git")


async def nan(settings: CopySettings, chain: Chain, hub: Hub, competition: Competition) -> None:
    """One weight that is not a number: no metadata shows it."""
    from safetensors.torch import load_file, save_file

    folder = _fresh_copy(settings)
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    await submit(chain, hub, folder, settings.repo, competition, None, force=True)


async def rewrite(settings: CopySettings, chain: Chain, hub: Hub, competition: Competition) -> None:
    """Claims a block with one model, then puts another one in its place: the committed revision is gone."""
    folder = _fresh_copy(settings)
    (folder / "generation_config.json").unlink(missing_ok=True)  # a content of its own: not refused as a copy
    await submit(chain, hub, folder, settings.repo, competition, None, force=True)
    hub.delete(settings.repo)
    hub.create(settings.repo)
    (folder / "README.md").write_text("a better model, found later\n")
    hub.upload(settings.repo, folder, message="replaced")
    telemetry.tell("rewritten", "the repository was replaced after the commitment", hotkey=chain.hotkey)


async def garbage(settings: CopySettings, chain: Chain, hub: Hub, competition: Competition) -> None:
    """What other software, or a typing error, leaves on chain."""
    receipt = await chain.commit(b"my best model so far: https://example.org/model.zip")
    telemetry.tell("committed", "a string that is no commitment", hotkey=chain.hotkey, block=receipt.block)


def _fresh_copy(settings: MinerSettings) -> Path:
    folder = settings.work_dir / "made"
    shutil.rmtree(folder, ignore_errors=True)
    assert settings.model is not None
    return Path(shutil.copytree(settings.model, folder))


_KINDS = {f.__name__: f for f in (copy, nan, rewrite, garbage)}


async def _run(kind: str, settings: CopySettings) -> None:
    hub = Hub(settings.hub_endpoint, token=settings.hub_token or None)
    competition = read_competitions(settings.competitions_dir)[0][settings.competition]
    async with open_chain(settings) as chain:
        await _KINDS[kind](settings, chain, hub, competition)


def main() -> int:
    """Exit status as the miner's."""
    kind, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if kind not in _KINDS:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        settings = read(CopySettings, arguments)
        telemetry.configure(as_json=settings.log_json, level=settings.log_level, file=settings.log_file)
        asyncio.run(_run(kind, settings))
    except Sn29Error as error:
        print(f"mischief {kind}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
