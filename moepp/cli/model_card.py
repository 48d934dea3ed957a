"""The README.md of an exported model: what it is, what it was trained on, how, and how well it does."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from moepp.config import Config, ModelConfig, to_dict
from moepp.data.manifest import read_manifest
from moepp.data.tokenizer import Tokenizer
from moepp.errors import DataError, RunError
from moepp.evaluation.load import FoundModel
from moepp.evaluation.results import Subject, read_results, table_text
from moepp.interop.official.save import DTYPE_NAMES
from moepp.io.untrusted import printable
from moepp.metrics.jsonl import read_records
from moepp.model.accounting import activated_parameters, count_parameters
from moepp.runs.directory import RunDir
from moepp.runs.report import named_sets

TAG = "\n- moepp\n"  # in the metadata of every model card
_NO_FOLDING = 1 << 20  # a text continued on a line of its own could end the block that it stands in
_PAPER = "https://arxiv.org/abs/2410.07348"
_CODE = {
    "moepp": "The code in this folder runs it with transformers 4.46 to 5.x.",
    "official": "It is in the format of the released MoE++ code: `configuration_moe_plus_plus.py` and "
    "`modeling_moe_plus_plus.py` must lie beside `config.json`, or where its `auto_map` says.",
}


def model_card(
    found: FoundModel, form: str, dtype: torch.dtype, eod_id: int | None = None, tokenizer: Tokenizer | None = None
) -> str:
    """Return Markdown with the metadata block of the Hugging Face hub.

    Args:
        found: a checkpoint of a run.
        form: "official" or "moepp".
        dtype: of the weights.
        eod_id: token that ends a document; None: not known.
        tokenizer: what was exported beside it, if anything.
    """
    cfg = found.run_config
    assert cfg is not None  # checkpoints carry the configuration of their run
    sections = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- moe\n- moe++{TAG}---",
        f"# {_plain(cfg.run.name)}",
        _summary(found, dtype),
        _loading(form, tokenizer is not None),
        _data(cfg, found.subject),
        *_document_end(eod_id, tokenizer),
        *_document_attention(found, form),
        *_fine_tuning(found, form, tokenizer),
        _training(cfg),
        _evaluation(found),
    ]
    return "\n\n".join(sections) + "\n"


def _plain(text: str) -> str:
    """Return text that Markdown and HTML show as it is."""
    return re.sub(r"([\\`*\[\]<>|&~#])", r"\\\1", printable(text, 200))


def _summary(found: FoundModel, dtype: torch.dtype) -> str:
    cfg, subject = found.cfg, found.subject
    moe, counts = cfg.moe, count_parameters(cfg)
    experts = f"{moe.num_ffn_experts} FFN, {moe.num_constant_experts} constant, {moe.num_copy_experts} copy and "
    experts += f"{moe.num_zero_experts} zero experts"
    return (
        f"A language model with MoE++ layers ([paper]({_PAPER})) of {experts}, of which each token uses {moe.top_k}. "
        f"{counts.total:,} parameters, at most {activated_parameters(cfg):,.0f} of them for one token. "
        f"Weights after step {subject.step:,} ({subject.tokens:,} training tokens), in {DTYPE_NAMES[dtype]}."
    )


def _loading(form: str, has_tokenizer: bool) -> str:
    model = 'AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)'
    lines = ["from transformers import AutoModelForCausalLM", "", f"model = {model}"]
    if has_tokenizer:
        lines[0] += ", AutoTokenizer"
        # With trust_remote_code, too: transformers reads config.json for the tokenizer and asks otherwise.
        lines.append('tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=True)')
    if has_tokenizer and form == "moepp":
        lines += ['inputs = tokenizer("The", return_tensors="pt", return_token_type_ids=False)']
        lines += ["print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"]
    code = "\n".join(lines)
    return f"{_CODE[form]}\n\n```python\n{code}\n```"


def _data(cfg: Config, subject: Subject) -> str:
    weights = cfg.data.weights or [None] * len(cfg.data.paths)
    rows = ["## Data", "", "| dataset | weight | documents | tokens |", "|---|---|---|---|"]
    for prefix, weight in zip(cfg.data.paths, weights, strict=True):
        documents, tokens = _sizes(prefix)
        share = "by size" if weight is None else f"{weight:g}"
        rows.append(f"| {_plain(Path(prefix).name)} | {share} | {documents} | {tokens} |")
    rows += ["", f"Trained on {subject.tokens:,} tokens of them, in sequences of {cfg.data.seq_len:,} tokens."]
    return "\n".join(rows)


def _document_end(eod_id: int | None, tokenizer: Tokenizer | None) -> list[str]:
    if eod_id is None:
        return []
    token = None if tokenizer is None else tokenizer.token(eod_id)
    what = f"token {eod_id}" if token is None else f"`{token}` (token {eod_id})"
    return [f"Every document ends with {what}, and a text starts after it. No other token is added to a text."]


def _document_attention(found: FoundModel, form: str) -> list[str]:
    if found.document_end is None:
        return []
    told = "" if form == "official" else " The commands of moepp, which read `config.json`, go on as in training."
    return [
        "In training, attention stayed within documents: a token saw those of its own document alone. The code that "
        f"runs the exported model attends to all that it is given, so give it one document at a time.{told}"
    ]


def _fine_tuning(found: FoundModel, form: str, tokenizer: Tokenizer | None) -> list[str]:
    """Return what the usual recipes take for granted and this export does not do, with what to do instead."""
    if tokenizer is None:
        return []
    unused = tokenizer.unused_ids(found.cfg.vocab_size)
    load = 'AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=True, split_special_tokens=False)'
    lines = [f"tokenizer = {load}", 'tokenizer.add_special_tokens({"pad_token": "<|pad|>"})']
    lines += ["model.resize_token_embeddings(len(tokenizer))", "model.config.pad_token_id = tokenizer.pad_token_id"]
    suppressed = []
    if unused:
        frees = (
            "`resize_token_embeddings` frees those below the new size; without it, take them out of"
            if form == "moepp"
            else "`resize_token_embeddings` of the released code does not free them, so they must be taken out of"
        )
        suppressed = [
            f"{len(unused):,} ids from {unused[0]:,} on have no token, and `generation_config.json` suppresses them. "
            f"Added tokens take the first of them, and could never be generated: {frees} "
            "`model.generation_config.suppress_tokens`."
        ]
        if form == "official":
            lines.append("model.generation_config.suppress_tokens = None")
    code = "\n".join(lines)
    return [
        "## Fine-tuning",
        "The tokenizer reads what spells a special token as plain text, as in training, so that "
        "`text + tokenizer.eos_token` does not end with the end token. It also pads with the end token, which "
        "`DataCollatorForLanguageModeling` then leaves out of the loss. To teach where texts end, load it so:",
        f"```python\n{code}\n```",
        *suppressed,
    ]


def _sizes(prefix: str) -> tuple[str, str]:
    """Return the documents and tokens of a dataset, or nothing if the data has moved."""
    try:
        manifest = read_manifest(prefix)
    except DataError:
        manifest = None
    return ("unknown", "unknown") if manifest is None else (f"{manifest.documents:,}", f"{manifest.tokens:,}")


def _training(cfg: Config) -> str:
    import yaml

    tree = to_dict(cfg)
    shown = {"model": _without_defaults(cfg.model), "optim": tree["optim"]}
    train = ("steps", "global_batch_size", "precision")
    shown["train"] = {key: tree["train"][key] for key in train} | {"seed": cfg.run.seed}
    shown["parallel"] = {"expert": cfg.parallel.expert}
    if cfg.init.path is not None:
        shown["init"] = tree["init"] | {"path": Path(cfg.init.path).name}
    return f"## Configuration\n\n```yaml\n{yaml.safe_dump(shown, sort_keys=False, width=_NO_FOLDING)}```"


def _without_defaults(model: ModelConfig) -> dict:
    return {key: value for key, value in to_dict(model).items() if value is not None}


def _evaluation(found: FoundModel) -> str:
    lines = ["## Evaluation", ""]
    losses, table = {}, None
    if found.run_dir is not None:
        losses, table = _held_out_losses(found.run_dir, found.subject.step), _benchmarks(found.run_dir, found.subject)
    for name, loss in losses.items():
        text = f"validation set {name}" if name else "held-out text of the training data"
        lines += [f"Cross-entropy on {text}: {loss:.4f} nats per token.", ""]
    if table is not None:
        lines += ["```", table.replace("```", "'''"), "```", ""]
    if not losses and table is None:
        lines.append("None yet.")
    return "\n".join(lines).rstrip()


def _held_out_losses(run_dir: RunDir, step: int | None) -> dict[str, float]:
    """Return the last evaluations up to the exported step by name of the set; "" is that of the training data."""
    try:
        records = [record for record in read_records(run_dir.metrics_file) if record["step"] <= (step or 0)]
    except RunError:
        return {}
    losses = [record["eval/loss"] for record in records if record.get("eval/loss") is not None]
    return ({"": losses[-1]} if losses else {}) | dict(named_sets(records))


def _benchmarks(run_dir: RunDir, subject: Subject) -> str | None:
    """Return the newest table that `moepp eval` wrote for this checkpoint."""
    files = sorted((run_dir.path / "eval").glob(f"{subject.step:08d}-*.json"))
    if not files:
        return None
    results = read_results(files[-1])
    return table_text(results, Subject(run_dir.path.name, subject.step, subject.tokens))
