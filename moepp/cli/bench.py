"""Measure this machine: the layer, its peers, the expert exchange, the training step, layouts of it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moepp.arguments import KERNELS, add_device_option
from moepp.errors import ConfigError

DTYPES = ("bf16", "fp32")

_TRAIN_SHAPES = {
    "num_layers": "layers (default: 4)",
    "hidden_size": "width (default: 768)",
    "ffn_hidden_size": "width of an expert (default: 2048)",
    "num_ffn": "FFN experts (default: 8)",
    "num_heads": "attention heads (default: 12)",
    "vocab_size": "vocabulary (default: 16384)",
    "seq_len": "tokens per sequence (default: 512)",
    "batch_size": "sequences (default: 8)",
}
_QUICK_TRAIN = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_heads": 4, "vocab_size": 256} | {
    "seq_len": 32,
    "batch_size": 4,
    "rounds": 2,
}
_QUICK_LAYOUT = {"hidden_size": 32, "ffn_hidden_size": 48, "vocab_size": 128, "seq_len": 16}
EXAMPLE = "moepp bench layer --quick"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare one sub-command per benchmark."""
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    layer = _add(benchmarks, "layer", "the MoE++ layer against the vanilla one and against its bare matrix products")
    layer.add_argument("--cases", nargs="+", metavar="CASE", help="layer shapes (default: 8+4 16+4 32+8)")
    layer.add_argument("--taus", nargs="+", type=float, metavar="TAU", help="default: 0.1 0.25 0.5 0.75 1.0")
    layer.add_argument("--no-learned", action="store_true", help="forced balanced routing only")
    peers = _add(benchmarks, "peers", "the same layer in transformers, DeepSpeed, megatron-core and a plain loop")
    peers.add_argument("--cases", nargs="+", metavar="CASE", help="layer shapes (default: 8+4)")
    peers.add_argument("--tau", type=float, metavar="TAU", default=0.75, help="of the MoE++ layer (default: 0.75)")
    exchange = _add(benchmarks, "comm", "the expert exchange: bytes and time of real collectives between processes")
    exchange.add_argument("--case", metavar="CASE", help="layer shape (default: 8+4)")
    exchange.add_argument("--taus", nargs="+", type=float, metavar="TAU", help="default: 0.1 0.25 0.5 0.75 1.0")
    exchange.add_argument(
        "--overlap-tau", type=float, metavar="TAU", default=0.75, help="of timed steps (default: 0.75)"
    )
    exchange.add_argument("--ep", nargs="+", type=int, metavar="P", default=[2, 4], help="ranks (default: 2 4)")
    _add(benchmarks, "layouts", "the step in every kind of layout on 4 processes: time, and bytes of each collective")
    _add(benchmarks, "metrics", "what measuring a step costs: with nothing measured, between records, with a record")
    train = _add(benchmarks, "train", "the whole step: ours, our vanilla twin, the same model in transformers")
    for name, what in _TRAIN_SHAPES.items():
        train.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=what)
    train.add_argument("--tau", type=float, metavar="TAU", default=0.75, help="of the MoE++ model (default: 0.75)")
    train.add_argument("--scaling", action="store_true", help="also vary sequence length, tokens, experts and layers")
    train.add_argument("--plot", type=Path, metavar="FILE", help="with --scaling: draw its tables")


def _add(benchmarks: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser = benchmarks.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds: does it run?")
    if name not in ("train", "layouts", "metrics"):
        parser.add_argument("--tokens", type=int, metavar="T", help="tokens per rank (default: 8192)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    add_device_option(parser)
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="as runtime.kernels (default: auto)")
    if name not in ("comm", "layouts", "metrics"):
        parser.add_argument("--threads", nargs="+", type=int, metavar="N", help="threads (default: 1, then all cores)")
    parser.add_argument("--rounds", type=int, metavar="N", help="timed rounds (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run one benchmark, print its tables, and write them as JSON when asked."""
    from moepp.bench.host_memory import keep_freed_memory
    from moepp.bench.tables import format_table, write_json

    _check(args)
    kept = keep_freed_memory()
    runners: dict[str, Callable[[argparse.Namespace], tuple[dict[str, Any], dict[str, Any]]]] = {
        "layer": _layer,
        "peers": _peers,
        "comm": _comm,
        "train": _train,
        "layouts": _layouts,
        "metrics": _metrics,
    }
    settings, tables = runners[args.benchmark](args)
    settings |= {"host_memory": "kept" if kept else "returned", "command": "moepp " + " ".join(sys.argv[1:])}
    for name, value in settings.items():
        print(f"{name}: {value}")
    for name, records in tables.items():
        print(f"\n{name}\n{format_table(records)}")
    if args.json is not None:
        write_json(args.json, args.benchmark, settings, tables)
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("tokens", "rounds", *_TRAIN_SHAPES):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1; raise it")
    threads = getattr(args, "threads", None) or [1]
    if min(threads) < 1:
        raise ConfigError(f"--threads {min(threads)} must be at least 1; raise it")
    if max(threads) > _num_cores():
        raise ConfigError(f"--threads {max(threads)} must be at most {_num_cores()}, the cores to use; lower it")
    for name in ("json", "plot"):
        path = getattr(args, name, None)
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"--{name} {path}: {path.absolute().parent} is not a directory; create it first")


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _thread_counts(args: argparse.Namespace) -> list[int]:
    default = [1] if args.quick or _num_cores() == 1 else [1, _num_cores()]
    return args.threads if args.threads is not None else default


def _machine(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Return the device, the dtype, and the report's lines about them; choose the kernels."""
    import torch

    from moepp import ops
    from moepp.distributed.device import OPTION, pick_device
    from moepp.runs.environment import cpu_name

    device = pick_device(0, args.device, named=OPTION)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    try:
        ops.choose_kernels(args.kernels, device)
    except ConfigError as error:
        raise ConfigError(str(error).replace("runtime.kernels=", "--kernels ")) from error
    settings = {
        "torch": torch.__version__,
        "device": str(device)
        if device.type == "cpu"
        else f"{device}, {torch.get_device_module(device).get_device_name()}",
        "cpu": cpu_name(),
        "dtype": args.dtype,
        "kernels": ops.describe(device, dtype),
        "experts": str(ops.expert_products(device, dtype, 768, 2048)),  # of the paper's models
    }
    return device, dtype, settings


def _layer(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    from moepp.bench import layer

    names = _cases(args, ["8+4", "16+4", "32+8"])
    taus = _taus(args)
    device, dtype, settings = _machine(args)
    options = layer.Options(
        cases=names,
        taus=taus,
        num_tokens=args.tokens or (512 if args.quick else 8192),
        dtype=dtype,
        device=device,
        num_threads=_thread_counts(args),
        rounds=args.rounds or (3 if args.quick else 15),
        learned=not args.no_learned,
    )
    return settings | {"tokens": options.num_tokens, "rounds": options.rounds}, layer.run(options)


def _taus(args: argparse.Namespace) -> list[float]:
    taus = args.taus or ([0.5] if args.quick else [0.1, 0.25, 0.5, 0.75, 1.0])
    if min(taus) <= 0:
        raise ConfigError(f"--taus {min(taus)} must be greater than 0; raise it")
    return taus


def _cases(args: argparse.Namespace, default: list[str]) -> list[str]:
    from moepp.bench.cases import CASES

    names = args.cases or (["quick"] if args.quick else default)
    for name in names:
        if name not in CASES:
            raise ConfigError(f"--cases {name} is not one of {', '.join(CASES)}; choose among them")
    return names


def _peers(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    from moepp.bench import peers

    names = _cases(args, ["8+4"])
    if args.tau <= 0:
        raise ConfigError(f"--tau {args.tau} must be greater than 0; raise it")
    device, dtype, settings = _machine(args)
    options = peers.Options(
        cases=tuple(names),
        tau=args.tau,
        num_tokens=args.tokens or (512 if args.quick else 8192),
        dtype=dtype,
        device=device,
        num_threads=tuple(_thread_counts(args)),
        rounds=args.rounds or (3 if args.quick else 9),
    )
    return settings | {"tokens": options.num_tokens, "rounds": options.rounds}, peers.run(options)


def _comm(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    from moepp.bench import comm
    from moepp.bench.cases import CASES

    args.cases = [args.case] if args.case else None
    [name] = _cases(args, ["8+4"])
    taus = _taus(args)
    if args.overlap_tau <= 0:
        raise ConfigError(f"--overlap-tau {args.overlap_tau} must be greater than 0; raise it")
    for ep_size in args.ep:
        for count in (CASES[name].num_ffn, CASES[name].config(taus[0]).num_experts):
            if ep_size < 2 or count % ep_size:
                raise ConfigError(
                    f"--ep {ep_size} must be at least 2 and divide the {count} experts of case {name}; change it"
                )
    device, dtype, settings = _machine(args)
    comm.require_devices(device, max(args.ep))
    options = comm.Options(
        case=name,
        taus=tuple(taus),
        ep_sizes=tuple(args.ep),
        num_tokens=args.tokens or (512 if args.quick else 8192),
        dtype=dtype,
        rounds=args.rounds or (3 if args.quick else 9),
        overlap_tau=args.overlap_tau,
        device_type=device.type,
        kernels=args.kernels,
    )
    settings |= {"tokens per rank": options.num_tokens, "rounds": options.rounds, "threads": "1 per rank"}
    return settings, comm.run(options)


def _train(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    from moepp.bench import train
    from moepp.bench.timing import threads

    if args.plot is not None and not args.scaling:
        raise ConfigError(f"--plot {args.plot} draws the scaling tables; add --scaling")
    device, dtype, settings = _machine(args)
    shapes = dict(_QUICK_TRAIN) if args.quick else {}
    shapes |= {name: value for name in (*_TRAIN_SHAPES, "rounds") if (value := getattr(args, name)) is not None}
    options = train.Options(tau=args.tau, dtype=dtype, device=device, kernels=args.kernels, **shapes)
    options.model_config(vanilla=False)  # wrong shapes fail here
    counts = _thread_counts(args)
    with threads(counts[-1]):
        tables = train.run(options, args.scaling)
    if args.plot is not None:
        train.plot_scaling(tables["scaling"], str(args.plot))
    return settings | train.describe(options) | {"threads": counts[-1]}, tables


def _layouts(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    from moepp.bench import layouts

    device, _, settings = _machine(args)
    if device.type != "cpu":
        raise ConfigError(f"--device {args.device} cannot be shared by {layouts.NUM_RANKS} processes; use --device cpu")
    small = _QUICK_LAYOUT if args.quick else {}
    rounds = args.rounds or (1 if args.quick else 5)
    options = layouts.Options(dtype=args.dtype, rounds=rounds, **small)
    settings |= {"processes": layouts.NUM_RANKS, "threads": "1 per process", "rounds": rounds}
    shapes = ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_size", "seq_len", "global_batch_size")
    return settings | {name: getattr(options, name) for name in shapes}, {"layouts": layouts.run(options)}


def _metrics(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    from moepp.bench import layouts, metrics

    device, _, settings = _machine(args)
    shape = layouts.Options(dtype=args.dtype, **(_QUICK_LAYOUT if args.quick else {}))
    options = metrics.Options(shape, device, args.rounds or (2 if args.quick else 20), args.kernels)
    settings |= {"threads": 1, "rounds": options.rounds}
    shapes = ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_size", "seq_len", "global_batch_size")
    return settings | {name: getattr(shape, name) for name in shapes}, metrics.run(options)
