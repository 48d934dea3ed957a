"""Make a run directory from released or exported weights, to be trained further, evaluated or sampled from.

Several processes share the experts: `torchrun --nproc_per_node 4 -m moepp import FOLDER RUN_DIR parallel.expert=4`.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moepp.checkpoint import Checkpointer, CheckpointInfo, RunState, SavedLayout
from moepp.config import (
    Config,
    ModelConfig,
    RunPlan,
    composition_error,
    configs_folder,
    from_hydra,
    register_defaults,
    to_dict,
    validate,
)
from moepp.data.manifest import sha256_of
from moepp.distributed import comm
from moepp.distributed.device import KEY
from moepp.distributed.groups import ParallelGroups, joined, new_cpu_group, read_launch_environment
from moepp.errors import CheckpointError
from moepp.evaluation.load import document_end_of_folder, eod_of_folder, print_remarks
from moepp.interop import hf, official
from moepp.interop.token_ids import listed_ids
from moepp.interop.weights.files import read_json
from moepp.io import files
from moepp.io.temporary import temporary_folder
from moepp.metrics.step_stats import StepStats
from moepp.runs.directory import RunClaim, RunDir
from moepp.runs.environment import command_facts, describe_environment
from moepp.training.build import build_model, check_initial_weights, device_name, load_initial_weights

MODEL_NAME = "imported"
DEFAULT_SEQ_LEN = 2048  # of the paper; shorter where the model is
EXAMPLE = "moepp import FOLDER runs/mine data.paths=[data/mine/text]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("folder", metavar="FOLDER", help="released MoE++ weights, or a `moepp export`")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="directory to make")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="configuration of the run, as for train.py, e.g. data.paths=[x]",
    )


def run(args: argparse.Namespace) -> int:
    """Write config.yaml, model/imported.yaml and a checkpoint at step 0."""
    source_format, source = _format_of(Path(args.folder)), Path(args.folder)
    weights_model = _read_config(args.folder, source_format)
    ends = _Ends(eod_of_folder(source), document_end_of_folder(source))
    cfg = _configuration(args, weights_model, ends)
    launch = read_launch_environment()
    plan = validate(cfg, launch.world_size)
    limits = cfg.parallel.timeout_seconds, cfg.parallel.heartbeat_seconds
    device, facts = cfg.runtime.device, command_facts(cfg.runtime.plugins)
    with joined(launch, cfg.parallel.expert, limits[0], facts, device, limits[1], KEY) as groups:
        _import(cfg, plan, replace(cfg, init=replace(cfg.init, path=args.folder, format=source_format)), groups, ends)
    if launch.rank == 0:
        print_remarks(_remarks(args.folder, cfg, ends))
        place = shlex.quote(args.run_dir)
        within = " data.document_attention=true" if cfg.data.document_attention else ""
        print(
            f"imported {args.folder} into {args.run_dir}; train it further with\n"
            f"  python train.py --config-dir {place} model={MODEL_NAME} run.dir={place} data.paths=[...] "
            f"data.tokenizer={shlex.quote(cfg.data.tokenizer or 'null')}{within}"
        )
    return 0


@dataclass(frozen=True)
class _Ends:
    """What a folder tells of the ends of documents.

    Attributes:
        eos: id of the token at which generation stops; None: not known.
        document: id of the token that ended the documents in training, if attention stayed within them; None: it did
            not, or the format does not say.
    """

    eos: int | None
    document: int | None

    @property
    def eod(self) -> int | None:
        """What a checkpoint calls the end of a document."""
        return self.document if self.document is not None else self.eos


def _remarks(folder: str, cfg: Config, ends: _Ends) -> list[str]:
    remarks = []
    path = Path(folder) / "config.json"
    if ends.eod is None and (several := listed_ids(path, read_json(path), "eos")):
        remarks.append(
            f"{path} lists several end tokens ({', '.join(map(str, several))}), and tokenizer_config.json names none "
            "of them: the run does not know which one ends a document; --eod-token of the other commands names it"
        )
    elif ends.eos not in (None, ends.eod):
        remarks.append(
            f"{folder} ends a text with token {ends.eos}, and the documents that it was trained on ended with token "
            f"{ends.eod}, with which the run goes on"
        )
    if ends.document is not None and not cfg.data.document_attention:
        remarks.append(
            f"in the training of {folder} attention stayed within documents; with data.document_attention=false it "
            "crosses them from here on"
        )
    return remarks


def _format_of(folder: Path) -> str:
    return "moepp" if read_json(folder / "config.json").get("model_type") == hf.MODEL_TYPE else "official"


def _read_config(folder: str, source_format: str) -> ModelConfig:
    return (hf if source_format == "moepp" else official).read_config(folder)


def _configuration(args: argparse.Namespace, model: ModelConfig, ends: _Ends) -> Config:
    """Return what train.py would run with these overrides and the folder's model.

    Raises:
        ConfigError: an override that cannot be.
    """
    from hydra import compose, initialize_config_dir

    configs = configs_folder()
    run_dir = Path(args.run_dir)
    tokenizer = Path(args.folder, "tokenizer.json")
    defaults = [
        f"run.name={_quoted(run_dir.resolve().name)}",
        f"run.dir={_quoted(str(run_dir))}",
        f"data.seq_len={min(model.max_seq_len, DEFAULT_SEQ_LEN)}",
        f"data.tokenizer={_quoted(str(tokenizer.resolve())) if tokenizer.is_file() else 'null'}",
        f"data.document_attention={str(ends.document is not None).lower()}",
    ]
    register_defaults()
    try:
        with temporary_folder() as folder:
            _write_model(folder, model)
            with initialize_config_dir(str(configs), version_base=None):
                search = [f"hydra.searchpath=[file://{folder}]", f"model={MODEL_NAME}"]
                return from_hydra(compose("config", [*search, *defaults, *args.overrides]))
    except Exception as error:
        if (refused := composition_error(error)) is None:
            raise
        raise refused from error


def _quoted(text: str) -> str:
    """Return a value that Hydra takes as it is, whatever characters a path has."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _write_model(folder: Path, model: ModelConfig) -> None:
    import yaml

    files.make_own_folder(folder / "model")
    files.write_whole(folder / "model" / f"{MODEL_NAME}.yaml", yaml.safe_dump(to_dict(model), sort_keys=False))


def _import(cfg: Config, plan: RunPlan, cfg_with_source: Config, groups: ParallelGroups, ends: _Ends) -> None:
    comm.run_together(lambda: check_initial_weights(cfg_with_source))
    environment = describe_environment(device_name(groups.device), groups.world_size)
    claim = comm.on_first_rank(lambda: _claim(cfg, environment))
    try:
        run_dir = RunDir(Path(comm.broadcast_object(str(claim.run_dir.path) if claim else None)))
        if claim is not None:
            _write_model(run_dir.path, cfg.model)
        # The checkpoint holds the masters, which are fp32 whatever the run computes in.
        in_fp32 = replace(cfg_with_source, train=replace(cfg.train, precision="fp32"))
        model = build_model(in_fp32, groups, comm.CommStats())
        comm.run_together(lambda: load_initial_weights(in_fp32, model, groups))
        _save(cfg, plan, model, groups, run_dir, _described(cfg, ends, environment["packages"]))
        comm.run_together(lambda: claim.finish_import() if claim is not None else None)
    finally:
        if claim is not None:
            claim.release()


def _claim(cfg: Config, environment: dict[str, Any]) -> RunClaim:
    return RunDir.claim(cfg.run.path, to_dict(cfg), environment, "never", importing=True)


@dataclass(frozen=True)
class _Described:
    """What a checkpoint tells besides configuration and state."""

    versions: dict[str, Any]
    eod_id: int | None
    tokenizer_sha256: str | None


def _described(cfg: Config, ends: _Ends, versions: dict[str, Any]) -> _Described:
    path = cfg.data.tokenizer
    sha256 = sha256_of(path) if path is not None and Path(path).is_file() else None
    return _Described(versions, ends.eod, sha256)


def _save(
    cfg: Config, plan: RunPlan, model: nn.Module, groups: ParallelGroups, run_dir: RunDir, described: _Described
) -> None:
    checkpointer = Checkpointer(cfg.checkpoint, groups, run_dir.checkpoints, new_cpu_group())
    moe = cfg.model.moe
    info = CheckpointInfo(
        step=0,
        tokens=0,
        layout=SavedLayout.of(cfg, plan),
        config=to_dict(cfg),
        versions=described.versions,
        run_state=RunState.fresh(cfg.run.seed),
        eod_id=described.eod_id,
        tokenizer_sha256=described.tokenizer_sha256,
    )
    stats = StepStats(cfg.model.moe_layers, moe)
    checkpointer.save(_Untrained(model), stats, info, background=False)
    problems = checkpointer.reports[-1].problems
    if problems:
        raise CheckpointError(f"the weights could not be saved: {'; '.join(problems)}; then repeat the import")


class _Untrained:
    """The state before the first step of any engine."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def read_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, parameter in self.model.named_parameters():
            zeros = torch.zeros_like(parameter, dtype=torch.float32)
            yield name, {"fp32": parameter.detach(), "exp_avg": zeros, "exp_avg_sq": zeros, "step": torch.zeros(())}
