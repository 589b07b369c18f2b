"""Objects that many tests need, all real: tiny models made once a session, and a drand beacon for the SDK to seal for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from beacon import install

install()  # before any test imports bittensor

_CACHES = tempfile.TemporaryDirectory(prefix="sn29-tests-")
os.environ["BITTENSOR_RUNTIME_CACHE_DIR"] = _CACHES.name  # the SDK's, by genesis: chains of tests have no business in the user's
os.environ["BTCLI_TOKEN_SYMBOLS_CACHE"] = str(Path(_CACHES.name) / "token_symbols.json")


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_checkpoint(family, seed=0, **config) -> folder as save_pretrained writes it; a model of some 20,000 parameters."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    shape = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip

    def make(family: str = "LlamaForCausalLM", seed: int = 0, **config: Any) -> Path:
        torch.manual_seed(seed)
        config_class = getattr(transformers, family.removesuffix("ForCausalLM") + "Config")
        model = getattr(transformers, family)(config_class(**{**shape, **config}))
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json with the 256 bytes and two merges (ids 256, 257): lossless, and small enough for a tiny model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)} | {"th": 256, "the": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path
