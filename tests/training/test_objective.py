from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from sn29.errors import Reason, Rejected
from sn29.training.objective import ISOLATION_LIMIT, Objective, isolation_error, make_batch, require_isolation, summed_nats
from sn29.training.packing import UNSCORED, Mode, Packing, Row, rows

TINY = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MODELS = {
    "llama": ("Llama", {}),
    "llama, grouped, tied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "phi": ("Phi", {}),
    "phi, grouped, tied": ("Phi", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "phi3, grouped": ("Phi3", {"num_key_value_heads": 2}),
    "phi3, narrow window, tied": ("Phi3", {"sliding_window": 9, "tie_word_embeddings": True}),
}
ISOLATED_ELSEWHERE = {
    "gpt_neox": ("GPTNeoX", {}),
    "opt": ("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 64}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 9}),
}


def model_of(family: str, config: dict[str, object], dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}Config")(**{**TINY, **config})
    found: transformers.PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(made).to(dtype)
    return found


def packing(mode: Mode) -> Packing:
    """Rows of 64 with context, so that long documents are cut; EOS scored, so that all modes ask for the same tokens."""
    return Packing(mode, 64, end_token=0, start_token=1, score_end=True, context=7)


def documents() -> list[list[int]]:
    numbers = random.Random(3)
    return [[numbers.randrange(2, 300) for _ in range(length)] for length in (1, 63, 2, 5, 64, 17, 150, 40, 40, 1, 65, 9)]


def of_mode(mode: Mode) -> list[Row]:
    return rows(documents(), packing(mode))[0]


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm, of the gradient as one vector."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[k].double() - expected[k].double()).square().sum()) for k in expected)
    return math.sqrt(difference / sum(float(v.double().square().sum()) for v in expected.values()))


def by_transformers(model: transformers.PreTrainedModel, alone: Iterable[Row]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of rows of one document, one call of the stock model each, full logits: the twin of this module."""
    total = 0.0
    for row in alone:
        logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
        nats = F.cross_entropy(logits, torch.tensor(row.targets), reduction="sum", ignore_index=UNSCORED)
        nats.backward()
        total += nats.item()
    return total, gradients(model)


def by_us(objective: Objective, some: list[Row]) -> tuple[float, dict[str, Tensor]]:
    nats = objective(make_batch(some))
    nats.backward()
    return nats.item(), gradients(objective.model)


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"])
@pytest.mark.parametrize("name", [*MODELS, "opt", "gpt_neox"])
def test_loss_and_gradients_of_masked_rows_are_those_of_documents_alone(name, dtype, limit):
    family, config = (MODELS | ISOLATED_ELSEWHERE)[name]
    model = model_of(family, config, dtype).eval()  # OPT has dropout
    alone, expected = by_transformers(model, of_mode(Mode.UNPACKED))
    objective = Objective(model)
    for mode in (Mode.UNPACKED, Mode.PACKED_MASKED):
        found, slopes = by_us(objective, of_mode(mode))
        assert abs(found - alone) < limit * alone, mode
        assert apart(slopes, expected) < limit, mode
    found, slopes = by_us(objective, of_mode(Mode.PACKED))
    useful = [sum(row.useful for row in of_mode(mode)) for mode in (Mode.PACKED, Mode.UNPACKED)]
    assert abs(found / useful[0] - alone / useful[1]) > 1e-3 * alone / useful[1]  # of random ids: nothing to learn
    assert apart(slopes, expected) > 0.1


def test_packed_rows_are_the_stock_model_on_whole_rows():
    model = model_of("Llama", {}, torch.float64)
    some = of_mode(Mode.PACKED)
    expected, expected_slopes = by_transformers(model, some)
    found, slopes = by_us(Objective(model), some)
    assert abs(found - expected) < 1e-12 * expected
    assert apart(slopes, expected_slopes) < 1e-12


def test_the_form_of_a_batch_follows_from_its_rows():
    packed, unpacked, masked = (make_batch(of_mode(mode)) for mode in (Mode.PACKED, Mode.UNPACKED, Mode.PACKED_MASKED))
    tokens = sum(len(ids) + 1 for ids in documents())
    assert packed.ids.shape == (tokens // 64, 64)
    assert packed.scored is None
    assert packed.useful == packed.ids.numel()
    assert unpacked.ids.shape == (len(of_mode(Mode.UNPACKED)), 64)
    assert unpacked.useful == tokens
    assert masked.ids.shape == (1, sum(len(row.ids) for row in of_mode(Mode.PACKED_MASKED)))
    assert masked.useful == tokens
    assert masked.documents is not None
    assert masked.documents.starts[-1] == masked.ids.shape[1]
    for start, stop in zip(masked.documents.starts, masked.documents.starts[1:], strict=False):
        assert masked.positions[0, start:stop].tolist() == list(range(stop - start))
    for batch in (unpacked, masked):
        assert sorted(batch.targets.tolist()) == sorted(token for ids in documents() for token in (*ids, 0))
    with pytest.raises(Rejected, match="a batch of no rows"):
        make_batch([])


def test_rows_in_which_nothing_is_asked_cost_nothing():
    objective = Objective(model_of("Llama", {}))
    nothing = objective(make_batch([Row((5, 6), (UNSCORED, UNSCORED), (0, 2))]))
    assert nothing.item() == 0
    nothing.backward()
    assert all(float(slope.abs().sum()) == 0 for slope in gradients(objective.model).values())


# --- the four traps, and classes that are not isolated ----------------------------------------------------------------

FIRST, SECOND = list(range(10, 33)), list(range(40, 77))


def second_alone(model: transformers.PreTrainedModel) -> Tensor:
    return model(input_ids=torch.tensor([SECOND]), use_cache=False).logits[0]


def by_position_ids(model: transformers.PreTrainedModel, **more: object) -> Tensor:
    """Logits of the second of two documents in a packed row, through the stock call with restarting positions."""
    positions = torch.tensor([[*range(len(FIRST)), *range(len(SECOND))]])
    return model(input_ids=torch.tensor([FIRST + SECOND]), position_ids=positions, **more).logits[0, len(FIRST) :]


def by_objective(model: transformers.PreTrainedModel) -> Tensor:
    row = Row((*FIRST, *SECOND), (*FIRST, *SECOND), (0, len(FIRST), len(FIRST) + len(SECOND)))
    return model.get_output_embeddings()(Objective(model).hidden(make_batch([row])))[0, len(FIRST) :]


def same_documents_in_4d() -> Tensor:
    document = torch.tensor([0] * len(FIRST) + [1] * len(SECOND))
    return ((document[:, None] == document) & torch.ones(60, 60, dtype=torch.bool).tril())[None, None]


TRAPS: dict[str, tuple[str, dict[str, object]]] = {
    "the cache": ("sdpa", {"use_cache": True}),
    "a 2-D mask of ones": ("sdpa", {"use_cache": False, "attention_mask": torch.ones(1, 60, dtype=torch.long)}),
    "a boolean 4-D mask under eager": ("eager", {"use_cache": False, "attention_mask": same_documents_in_4d()}),
}


@pytest.mark.parametrize("name", list(TRAPS))
@torch.no_grad()
def test_what_switches_isolation_off_in_the_stock_call_does_not_in_ours(name):
    attention, call = TRAPS[name]
    model = model_of("Llama", {}).eval()
    model.set_attn_implementation(attention)
    model.config.use_cache = bool(call["use_cache"])  # as every config.json has it
    alone = second_alone(model)
    assert (by_position_ids(model, **call) - alone).abs().max() > 0.1  # the trap is there
    assert (by_objective(model) - alone).abs().max() < 1e-5
    assert isolation_error(model) < ISOLATION_LIMIT


NOT_ISOLATED: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "bloom": lambda: model_of("Bloom", {"n_head": 4}),
    "falcon": lambda: model_of("Falcon", {"alibi": False}),
    "falcon, alibi": lambda: model_of("Falcon", {"alibi": True}),
    "mpt": lambda: transformers.MptForCausalLM(transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=300)),
}


@pytest.mark.parametrize("name", list(NOT_ISOLATED))
def test_a_class_whose_documents_see_each_other_is_refused(name):
    model = NOT_ISOLATED[name]()
    for tried in (isolation_error, require_isolation):
        with pytest.raises(Rejected, match=type(model).__name__) as refused:
            tried(model)
        assert refused.value.reason is Reason.FAMILY


@pytest.mark.parametrize("name", [*MODELS, *ISOLATED_ELSEWHERE])
def test_a_class_whose_documents_are_on_their_own_is_accepted_and_left_as_it_was(name):
    family, config = (MODELS | ISOLATED_ELSEWHERE)[name]
    model = model_of(family, config).train()
    require_isolation(model)
    assert model.training
    assert model.config._attn_implementation == "sdpa"


class Leaky(transformers.LlamaForCausalLM):
    """A stranger's class: takes everything that a Llama takes, and drops what it does not know."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        whole = self.model.forward
        self.model.forward = lambda documents=None, **more: whole(**more)  # type: ignore[method-assign]


@pytest.mark.parametrize("scale", [0.2, 0.002])
def test_a_leak_is_found_however_small_the_weights_are(scale):
    torch.manual_seed(0)
    model = Leaky(transformers.LlamaConfig(**{**TINY, "initializer_range": scale}))
    assert isolation_error(model) == pytest.approx(1, abs=0.05)
    with pytest.raises(Rejected):
        require_isolation(model)


def llama_that(before: Callable[[dict[str, object]], None]) -> transformers.PreTrainedModel:
    """`before` is called with what every call of the layers is given."""
    model = model_of("Llama", {})
    whole = model.model.forward

    def forward(**given: object) -> object:
        before(given)
        return whole(**given)

    model.model.forward = forward
    return model


def test_the_precision_of_the_training_is_tried_too():
    """A kernel that only 16-bit products run, as on CUDA, and that leaks."""
    model = llama_that(lambda given: given.pop("documents", None) if torch.is_autocast_enabled("cpu") else None)
    require_isolation(model)
    assert isolation_error(model, torch.bfloat16) == pytest.approx(1, abs=0.1)
    with pytest.raises(Rejected, match=r"differ in bfloat16 by .*at most 0\.25"):
        require_isolation(model, torch.bfloat16)
    require_isolation(model_of("Llama", {}), torch.bfloat16)


def test_what_is_no_fault_of_the_class_is_not_called_one():
    def full(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        require_isolation(llama_that(full))
    model = model_of("Llama", {})
    model.model.norm.weight.data[3] = math.nan
    with pytest.raises(Rejected, match="LlamaForCausalLM: logits that are not") as refused:
        require_isolation(model)
    assert refused.value.reason is Reason.NOT_FINITE


@pytest.mark.parametrize("positions", [32, 50])
def test_a_model_of_too_few_positions_for_the_trial_is_refused_by_name(positions):
    with pytest.raises(Rejected, match="OPTForCausalLM: packed, it ends in IndexError"):
        require_isolation(model_of("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 64, "max_position_embeddings": positions}))


def test_positions_that_depend_on_the_longest_text_are_refused():
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    with pytest.raises(Rejected, match="dynamic"):
        require_isolation(model_of("Llama", {"rope_parameters": dynamic, "max_position_embeddings": 32}))


# --- what a trainer switches on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(Mode))
def test_activation_checkpointing_changes_nothing(mode):
    model = model_of("Phi3", {"sliding_window": 9}).train()
    objective = Objective(model)
    expected, slopes = by_us(objective, of_mode(mode))
    model.activation_checkpointing_enable({"use_reentrant": False})
    found, again = by_us(objective, of_mode(mode))
    assert found == expected
    assert apart(again, slopes) < 1e-6


@pytest.mark.parametrize("mode", [Mode.UNPACKED, Mode.PACKED_MASKED])
def test_compiling_changes_nothing(mode):
    objective = Objective(model_of("Llama", {"num_key_value_heads": 2}))
    expected, slopes = by_us(objective, of_mode(mode))
    compiled = torch.compile(objective, backend="aot_eager")  # graphs and their gradients, without a C++ compiler
    nats = compiled(make_batch(of_mode(mode)))
    nats.backward()
    assert abs(nats.item() - expected) < 1e-6 * expected
    assert apart(gradients(objective.model), slopes) < 1e-6


@pytest.mark.parametrize("mode", list(Mode))
def test_bfloat16_autocast_is_near(mode):
    objective = Objective(model_of("Llama", {"num_key_value_heads": 2}))
    expected, slopes = by_us(objective, of_mode(mode))
    with torch.autocast("cpu", torch.bfloat16):
        nats = objective(make_batch(of_mode(mode)))
    nats.backward()
    assert nats.dtype == torch.float64
    assert abs(nats.item() - expected) < 2e-3 * expected
    found = gradients(objective.model)
    assert {slope.dtype for slope in found.values()} == {torch.float32}
    assert 1e-5 < apart(found, slopes) < 0.1  # it was 16 bits, and it was near


def test_rows_that_tokens_share_are_the_model_in_which_each_has_its_own():
    small = model_of("Phi", {"vocab_size": 12})
    row_of = torch.arange(300).clamp(max=11)
    large = model_of("Phi", {})
    with torch.no_grad():
        for name, weight in small.state_dict().items():
            by_token = name.startswith(("model.embed_tokens.", "lm_head."))
            large.state_dict()[name].copy_(weight[row_of] if by_token else weight)
    expected = Objective(large)(make_batch(of_mode(Mode.PACKED_MASKED))).item()
    batch = make_batch(of_mode(Mode.PACKED_MASKED))
    batch = replace(batch, ids=row_of[batch.ids], targets=row_of[batch.targets])
    log_count = torch.zeros(12)
    log_count[11] = math.log(300 - 11)
    assert Objective(small, log_count)(batch).item() == pytest.approx(expected, rel=1e-6)
    assert not any("log_count" in name for name in Objective(small, log_count).state_dict())


# --- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("counted", [False, True], ids=["own", "shared"])
def test_the_head_in_pieces_is_the_head_as_a_whole(biased, counted):
    torch.manual_seed(1)
    places, size, vocabulary = 300, 8, 50_000  # 128 places at once: the last piece is a short one
    hidden, weight = torch.randn(places, size, dtype=torch.float64), torch.randn(vocabulary, size, dtype=torch.float64)
    bias = torch.randn(vocabulary, dtype=torch.float64) if biased else None
    log_count = torch.rand(vocabulary, dtype=torch.float64) * 5 if counted else None
    targets = torch.randint(0, vocabulary, (places,))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logits = F.linear(hidden, weight, bias)
    if log_count is not None:
        logits = logits + log_count
    expected = F.cross_entropy(logits, targets, reduction="sum")
    if log_count is not None:
        expected = expected + log_count[targets].sum()
    slopes = torch.autograd.grad(expected / 7, leaves)
    found = summed_nats(hidden, weight, bias, targets, log_count)
    assert found.item() == pytest.approx(expected.item(), rel=1e-13)
    for got, wanted in zip(torch.autograd.grad(found / 7, leaves), slopes, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < 1e-13
    with torch.no_grad():
        assert summed_nats(hidden, weight, bias, targets, log_count).item() == pytest.approx(expected.item(), rel=1e-13)


def test_logits_beyond_the_range_of_exp_are_no_trouble():
    hidden, weight = torch.tensor([[1000.0], [-1000.0]], requires_grad=True), torch.tensor([[1.0], [2.0]], requires_grad=True)
    nats = summed_nats(hidden, weight, None, torch.tensor([1, 0]))
    nats.backward()
    assert nats.item() == 0
    assert float(weight.grad.abs().sum()) == 0
    assert summed_nats(hidden, weight, None, torch.tensor([0, 1])).item() == 2000


def test_gradients_are_made_once_and_used_once():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    nats = summed_nats(hidden, weight, None, torch.tensor([1, 2, 3]))
    nats.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        nats.backward()


PEAK = """
import resource, torch
from sn29.training.objective import summed_nats
torch.set_num_threads(1)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
hidden, weight = torch.randn(2048, 16, requires_grad=True), torch.randn(100_277, 16, requires_grad=True)
summed_nats(hidden[:8], weight, None, torch.arange(8)).backward()
before = peak()
summed_nats(hidden, weight, None, torch.arange(2048)).backward()
print(peak() - before)
"""


def test_logits_of_a_hundred_thousand_tokens_never_exist():
    """2,048 places would be 0.8 GB of them, and the gradient as much again."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200e6
