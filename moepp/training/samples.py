"""Continuations of held-out text, drawn after training so that a person can read what the model learnt."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from moepp.config import Config
from moepp.data import Tokenizer
from moepp.distributed import comm
from moepp.distributed.device import to_device
from moepp.errors import RunError, WriteError
from moepp.io import files
from moepp.model.generate import generate
from moepp.training.trainer import Parts

PROMPT_TOKENS = 16
NEW_TOKENS = 48
TEMPERATURE = 0.8
TOP_K = 40


FILE = "samples.json"


def lacks_samples(cfg: Config, run_path: Path) -> bool:
    """Return whether a run that is at its end still owes samples, as after a disk that was full; collective."""
    wanted = cfg.train.samples > 0 and cfg.data.tokenizer is not None
    return comm.broadcast_object(wanted and not (run_path / FILE).exists())


def write_samples(parts: Parts, run_path: Path, eod_id: int | None) -> None:
    """Write ``samples.json`` in the run directory: a list of {"prompt", "continuation"}; every rank calls it.

    Continuations stop where the document ends. Nothing is written where the configuration names no tokenizer: there
    is no text to show.

    Args:
        eod_id: token that ends the documents of the data; None: not known, and looked up by name.

    Raises:
        RunError: the file cannot be written.
    """
    cfg, groups = parts.cfg, parts.groups
    if cfg.data.tokenizer is None:
        return
    tokenizer = Tokenizer(cfg.data.tokenizer, eod_id=eod_id)
    end, unused = tokenizer.guess_eod(), tokenizer.unused_ids(cfg.model.vocab_size)
    end_id = None if end is None else end[1]
    generator = torch.Generator(device=groups.device).manual_seed(cfg.run.seed)
    samples = []
    for index in range(cfg.train.samples):
        # With expert parallelism all ranks must continue the first rank's prompt.
        prompt = comm.broadcast_object(parts.data.eval_batch(index, 0)[0][0, :PROMPT_TOKENS].tolist())
        ids = to_device(torch.tensor(prompt), groups.device)
        out = generate(
            parts.model,
            ids.unsqueeze(0),
            min(NEW_TOKENS, cfg.model.max_seq_len - len(ids)),
            temperature=TEMPERATURE,
            top_k=TOP_K,
            eos_id=end_id,
            never=unused,
            generator=generator,
        )
        new = out[0, len(ids) :].tolist()
        samples.append({"prompt": _text(tokenizer, prompt, end_id), "continuation": _text(tokenizer, new, end_id)})
    text = json.dumps(samples, indent=2, ensure_ascii=False)
    comm.on_first_rank(lambda: _write(run_path / FILE, text))


def _text(tokenizer: Tokenizer, ids: list[int], end_id: int | None) -> str:
    """Return the text of ``ids`` without ends of documents, whether the tokenizer marks them as special or not."""
    return tokenizer.decode([token_id for token_id in ids if token_id != end_id])


def _write(path: Path, text: str) -> None:
    try:
        files.write_whole(path, text)
    except WriteError as error:
        raise RunError(
            f"training is done and saved, but its samples are not: {error}; then the same command draws them"
        ) from error
