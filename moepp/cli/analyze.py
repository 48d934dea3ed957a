"""Measure how a checkpoint routes: by token, by position, and the questions that the paper leaves open."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moepp.arguments import add_device_option, add_plugin_option
from moepp.distributed.groups import ParallelGroups, joined, read_launch_environment
from moepp.errors import ConfigError, DataError, RunError
from moepp.evaluation.load import DTYPES, FoundModel, build_model, find_model, open_tokenizer
from moepp.io.untrusted import printable
from moepp.runs.environment import command_facts

if TYPE_CHECKING:
    import numpy as np

    from moepp.analysis.model_pages import Findings
    from moepp.analysis.token_tables import Decode, Rows, Texts
    from moepp.model.transformer import Transformer

EXAMPLE = "moepp analyze tokens runs/mine; moepp analyze communication runs/tau-0.25 runs/tau-0.75"
EP_SIZES = (2, 4, 8, 16, 32, 64)
LONGER = 4  # times the trained length
TIMEOUT_SECONDS = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "what",
        choices=tuple(_QUESTIONS),
        help="tokens: FFN experts by token, position, frequency and loss; communication: bytes between ranks by tau; "
        "long-context: routing beyond the trained length; robustness: loss when choices are swapped",
    )
    parser.add_argument("models", nargs="+", metavar="RUN_OR_FOLDER", help="run, checkpoint or folder with config.json")
    parser.add_argument(
        "--data",
        action="append",
        metavar="PREFIX",
        help="data written by moepp prepare; default: the run's, validation",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=32768,
        metavar="N",
        help="tokens to read in all (default: 32768)",
    )
    parser.add_argument("--seq-len", type=int, metavar="S", help="tokens per sequence (default: as trained)")
    parser.add_argument("--out", metavar="FOLDER", help="default: analysis/<what> in the run's directory")
    parser.add_argument("--precision", choices=tuple(DTYPES), help="default: as trained; fp32 for a folder")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="robustness: draws the swapped tokens")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.json, to show tokens as text (default: the run's)"
    )
    add_plugin_option(parser)
    add_device_option(parser)


@dataclass(frozen=True)
class Subject:
    """A model and what it reads.

    Attributes:
        name: what to call it.
        found: where it lies.
        model: whole, in eval mode.
        sources: sequences [N, S + 1] by the name of their data.
        seq_len: tokens per sequence that it was trained with.
    """

    name: str
    found: FoundModel
    model: Transformer
    sources: dict[str, np.ndarray]
    seq_len: int

    @property
    def pooled(self) -> np.ndarray:
        """Sequences of all sources."""
        import numpy as np

        return np.concatenate(list(self.sources.values()))


def run(args: argparse.Namespace) -> int:
    """Write tables and a page, and print where they lie."""
    from moepp.analysis.model_pages import write_findings

    _check(args)
    found = [find_model(place) for place in args.models]
    _check_models(args, found)
    folder = _folder(args, found[0])
    environment = read_launch_environment()
    if environment.world_size > 1:
        raise ConfigError(f"moepp analyze runs in one process, and {environment.world_size} were started; start one")
    with joined(environment, 1, TIMEOUT_SECONDS, command_facts(args.plugins), args.device) as groups:
        findings = _QUESTIONS[args.what](args, _distinct([_open(args, one, groups) for one in found]))
    page = write_findings(findings, folder, args.what)
    for figure in findings.figures:
        print(f"{figure.title}: {printable(figure.caption)}")
    print(f"tables: {', '.join(printable(folder / f'{name}.parquet') for name in findings.tables)}")
    print(f"page: {printable(page)}")
    return 0


def _check(args: argparse.Namespace) -> None:
    for name, minimum in (("tokens", 2), ("seq_len", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise ConfigError(f"--{name.replace('_', '-')}={value} is below its minimum {minimum}; raise it")
    if args.what == "tokens" and len(args.models) > 1:
        raise ConfigError(f"moepp analyze tokens reads one model, and {len(args.models)} were named; name one")


def _check_models(args: argparse.Namespace, found: list[FoundModel]) -> None:
    for one in found:
        if not one.cfg.moe_layers:
            raise ConfigError(f"{one.subject.source} has no MoE layer, so it routes nothing; name another model")
        if args.what == "robustness" and not one.cfg.moe.num_zero_computation_experts:
            raise ConfigError(
                f"{one.subject.source} has no zero-computation experts, so nothing can be swapped; name another model"
            )


def _folder(args: argparse.Namespace, found: FoundModel) -> Path:
    from moepp.analysis.page_folder import own_folder

    if args.out is not None:
        return own_folder(Path(args.out), f"moepp analyze {args.what}")
    if found.run_dir is None:
        raise ConfigError(f"{found.subject.source} is no run, so there is no place for the tables; give --out FOLDER")
    run = found.run_dir.path
    return own_folder(run / "analysis" / args.what, f"moepp analyze {args.what}", below=run)


def _open(args: argparse.Namespace, found: FoundModel, groups: ParallelGroups) -> Subject:
    cfg = found.run_config
    trained = cfg.data.seq_len if cfg is not None else found.cfg.max_seq_len
    length = args.seq_len if args.seq_len is not None else trained * (LONGER if args.what == "long-context" else 1)
    prefixes = _prefixes(args, found)
    names = [Path(prefix).name for prefix in prefixes]
    names = names if len(set(names)) == len(names) else prefixes
    share = max(args.tokens // len(prefixes), length)  # at least a sequence of each
    read = [_sequences(prefix, found, length, share) for prefix in prefixes]
    sources = dict(zip(names, read, strict=True))
    if length > found.cfg.max_seq_len:  # positions beyond it are what long-context is about
        found = replace(found, cfg=replace(found.cfg, max_seq_len=length))
    model = build_model(found, groups, args.precision)
    return Subject(Path(found.subject.source).name, found, model, sources, trained)


def _distinct(subjects: list[Subject]) -> list[Subject]:
    """Return them under their whole paths where names are the same, as of checkpoints of several runs."""
    if len({one.name for one in subjects}) == len(subjects):
        return subjects
    named = [replace(one, name=str(one.found.subject.source)) for one in subjects]
    if len({one.name for one in named}) < len(named):
        raise ConfigError(f"{named[0].name} is named more than once, or lies below another name; name each model once")
    return named


def _prefixes(args: argparse.Namespace, found: FoundModel) -> list[str]:
    if args.data:
        return args.data
    if found.run_config is None:
        raise ConfigError(f"{found.subject.source} names no data; give --data PREFIX, as moepp prepare wrote it")
    data = found.run_config.data
    if data.evaluates_split:
        return list(data.paths)
    return list(dict.fromkeys(prefix for prefixes in data.validation.values() for prefix in prefixes))


def _sequences(prefix: str, found: FoundModel, length: int, num_tokens: int) -> np.ndarray:
    """Whole sequences of the validation part of ``data.paths``, or of all of other data, as those of a named set."""
    import numpy as np

    from moepp.data.indexed import open_indexed

    file = open_indexed(prefix)
    cfg = found.run_config
    is_own = cfg is not None and prefix in cfg.data.paths
    if cfg is not None and not cfg.data.evaluates_split:  # what is in a named set was held out, whatever else it is
        is_own = is_own and all(prefix not in paths for paths in cfg.data.validation.values())
    tokens_T = file.tokens_of_split(cfg.data.split, "valid") if cfg is not None and is_own else file.tokens_T()
    count = min(len(tokens_T) - 1, num_tokens) // length
    if count < 1:
        what = "validation tokens" if is_own else "tokens"
        remedy = "lower --seq-len" if len(tokens_T) > 1 else "name other data with --data PREFIX"
        raise DataError(f"{prefix} has {len(tokens_T)} {what}, fewer than one sequence of {length} + 1; {remedy}")
    read_T = tokens_T[: count * length + 1]
    if read_T.max() >= found.cfg.vocab_size or read_T.min() < 0:
        raise DataError(
            f"{prefix} has token ids beyond the model's vocabulary of {found.cfg.vocab_size}; give its data"
        )
    return np.stack([tokens_T[i * length : (i + 1) * length + 1] for i in range(count)]).astype(np.int64)


def _spelling(args: argparse.Namespace, found: FoundModel) -> tuple[Decode | None, Texts | None]:
    if args.tokenizer is None and found.tokenizer is None:
        return None, None
    return open_tokenizer(found, args.tokenizer).spelling


def _lead(subjects: list[Subject]) -> str:
    parts = []
    for one in subjects:
        read = sum(tokens.shape[0] * (tokens.shape[1] - 1) for tokens in one.sources.values())
        step = "" if one.found.subject.step is None else f" at step {one.found.subject.step:,}"
        parts.append(f"{one.name}{step} read {read:,} tokens of {', '.join(one.sources)}")
    return "; ".join(parts) + "."


def _tokens(args: argparse.Namespace, subjects: list[Subject]) -> Findings:
    from moepp.analysis.model_pages import Findings
    from moepp.analysis.observe import Change, observe, pool_observed
    from moepp.analysis.token_pages import gate_figures, task_figures, text_markup, token_figures
    from moepp.analysis.token_tables import gate_weights, token_tables

    [one] = subjects
    spelling = _spelling(args, one.found)
    seen = {source: observe(one.model, tokens) for source, tokens in one.sources.items()}
    without = None
    if one.found.cfg.moe.gating_residual:
        without = observe(one.model, one.pooled, Change(residuals=False))
    rows = token_tables({source: found.view for source, found in seen.items()}, *spelling)
    figures, markup = token_figures(rows), text_markup(rows["text"])
    if one.found.run_dir is not None:
        rows["tasks"], source = _task_kinds(one.found.run_dir.path)
        figures += task_figures(rows["tasks"], source)
    rows["gates"] = gate_weights(pool_observed(list(seen.values())), without)
    figures += gate_figures(rows["gates"])
    rows = {name: table for name, table in rows.items() if table}  # no text without a tokenizer
    return Findings(f"How {one.name} routes tokens", _lead(subjects), rows, figures, markup)


def _task_kinds(run_path: Path) -> tuple[Rows, str]:
    """Return the expert kinds by evaluation task that the run's evaluations have counted, and where they are from."""
    from moepp.analysis.runs import Run, read_run
    from moepp.analysis.task_kinds import task_kinds

    try:
        run = read_run(run_path)
    except RunError:  # imported weights have no records; eval/*.json may be there
        run = Run(run_path, [])
    rows, source, remarks = task_kinds(run)
    for remark in remarks:
        print(f"left out: {printable(remark)}", file=sys.stderr)
    return rows, source


def _communication(args: argparse.Namespace, subjects: list[Subject]) -> Findings:
    from moepp.analysis.model_pages import Findings
    from moepp.analysis.observe import observe
    from moepp.analysis.question_pages import communication_figures
    from moepp.analysis.questions import communication

    rows: Rows = []
    for one in subjects:
        element_bytes = DTYPES[args.precision or one.found.precision].itemsize
        sizes = [size for size in EP_SIZES if one.found.cfg.moe.num_ffn_experts % size == 0]
        seen, measured = observe(one.model, one.pooled), _measured_saving(one.found)
        rows += communication(one.name, seen, one.found.cfg, element_bytes, sizes, measured)
    if not rows:
        raise ConfigError(
            "no number of ranks from 2 on divides the FFN experts, so nothing is sent; name another model"
        )
    figures = communication_figures(rows)
    return Findings("Expert-parallel traffic", _lead(subjects), {"communication": rows}, figures)


def _measured_saving(found: FoundModel) -> float | None:
    """Return the share of the traffic that a run's counters say it saved; None where it sent nothing or has none."""
    from moepp.analysis.runs import read_run

    if found.run_dir is None:
        return None
    try:
        bytes_sent = read_run(found.run_dir.path).bytes_sent
    except RunError:
        return None
    return 1 - bytes_sent[0] / bytes_sent[1] if bytes_sent is not None and bytes_sent[1] else None


def _long_context(args: argparse.Namespace, subjects: list[Subject]) -> Findings:
    from moepp.analysis.model_pages import Findings
    from moepp.analysis.question_pages import long_context_figures
    from moepp.analysis.questions import long_context

    rows = [row for one in subjects for row in long_context(one.name, one.model, one.pooled, one.seq_len)]
    return Findings("Routing in long contexts", _lead(subjects), {"long-context": rows}, long_context_figures(rows))


def _robustness(args: argparse.Namespace, subjects: list[Subject]) -> Findings:
    from moepp.analysis.model_pages import Findings
    from moepp.analysis.question_pages import robustness_figures
    from moepp.analysis.questions import robustness

    rows = [row for one in subjects for row in robustness(one.name, one.model, one.pooled, seed=args.seed)]
    return Findings("Swapped routing", _lead(subjects), {"robustness": rows}, robustness_figures(rows))


_QUESTIONS: dict[str, Callable[[argparse.Namespace, list[Subject]], Findings]] = {
    "tokens": _tokens,
    "communication": _communication,
    "long-context": _long_context,
    "robustness": _robustness,
}
