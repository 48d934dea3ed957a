"""Continue a prompt with a run, a checkpoint or a folder of weights, and print the text as it comes.

A run whose experts need several processes: `torchrun --nproc_per_node 2 -m moepp generate RUN --prompt ...
--expert-parallel 2`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from moepp.arguments import add_model_arguments, add_plugin_option, add_sharing_options, may_be_empty, require_at_least
from moepp.data.tokenizer import Tokenizer
from moepp.distributed import comm
from moepp.distributed.device import to_device
from moepp.distributed.groups import joined, read_launch_environment
from moepp.errors import ConfigError
from moepp.evaluation.load import DTYPES, build_model, find_model, open_tokenizer, print_remarks, tokenizer_remarks
from moepp.io.untrusted import terminal_text
from moepp.model import Transformer
from moepp.model.generate import Sampling, stream
from moepp.runs.environment import command_facts

TIMEOUT_SECONDS = 1800.0
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to
EXAMPLE = 'moepp generate runs/mine --prompt "The state of the Union" --temperature 0.8 --top-k 40'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    may_be_empty(
        parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue; '' starts a document")
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens to add (default: 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: the most likely token (default); 1: as trained"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K most likely tokens only")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the fewest tokens that reach P only")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    add_sharing_options(parser, DTYPES)
    add_plugin_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the prompt and its continuation."""
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    if args.temperature == 0 and (args.top_k is not None or args.top_p is not None):
        raise ConfigError("--top-k and --top-p choose among drawn tokens; give a --temperature above 0 with them")
    require_at_least(args, max_new_tokens=1, expert_parallel=1, seed=0)
    found = find_model(args.model)
    tokenizer = open_tokenizer(found, args.tokenizer, args.eod_token)
    sampling = replace(sampling, never=tuple(tokenizer.unused_ids(found.cfg.vocab_size)))
    with joined(
        read_launch_environment(), args.expert_parallel, TIMEOUT_SECONDS, command_facts(args.plugins), args.device
    ) as groups:
        model = build_model(found, groups, args.precision)
        generator = torch.Generator(device=groups.device).manual_seed(args.seed)
        pieces = continuation(model, tokenizer, args.prompt, args.max_new_tokens, sampling, generator)
        if groups.rank == 0:
            print_remarks(tokenizer_remarks(found, tokenizer, args.eod_token))
            _print(args.prompt)
        for piece in pieces:
            if groups.rank == 0:
                _print(piece)
        if groups.rank == 0:
            _print("\n")
        comm.barrier(groups.world)
    return 0


def continuation(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> Iterator[str]:
    """Yield the text after ``prompt`` in pieces of whole characters, until the document ends.

    An empty prompt starts a document: it means the token that ended the one before.
    """
    ids, eod = tokenizer.encode(prompt), tokenizer.eod_id
    ids_1S = to_device(torch.tensor([ids or [eod]]), generator.device)
    shown = len(tokenizer.decode(ids))
    for next_11 in stream(model, ids_1S, max_new_tokens, sampling, eos_id=eod, generator=generator):
        if int(next_11) == eod:  # no part of the text, whether the tokenizer marks it as special or not
            break
        ids.append(int(next_11))
        text = tokenizer.decode(ids)
        if not text.endswith(REPLACEMENT):
            yield text[shown:]
            shown = len(text)
    yield tokenizer.decode(ids)[shown:]


def _print(text: str) -> None:
    sys.stdout.write(terminal_text(text))  # a tokenizer may hold anything
    sys.stdout.flush()
