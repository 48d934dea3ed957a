"""A byte-level tokenizer, a tiny random model and tiny benchmark folders for the tests of evaluation."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moepp.config import ModelConfig, MoEConfig
from moepp.data.tokenizer import Tokenizer
from moepp.distributed import comm
from moepp.distributed.groups import LaunchEnvironment, Layout, ParallelGroups, build_groups, init_process_group
from moepp.model.init import init_parameters
from moepp.model.transformer import Transformer
from moepp.moe import ExpertParallel

CPU = torch.device("cpu")
WORDS = ("red", "blue", "old", "new", "cat", "dog", "sun", "sea", "tree", "stone", "bird", "rain")


@contextmanager
def one_process() -> Iterator[ParallelGroups]:
    """Yield the groups of a job of one process."""
    init_process_group(LaunchEnvironment(0, 1, 0), CPU, 60.0)
    try:
        yield build_groups(Layout(1), CPU)
    finally:
        torch.distributed.destroy_process_group()


def write_byte_tokenizer(path: Path, special: bool = True) -> Tokenizer:
    """Bytes, " A" to " D" and " yes"/" no" as tokens of their own, and an end-of-document token, special or not."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", letter) for letter in "ABCDyn"] + [("e", "s"), ("Ġy", "es"), ("Ġn", "o")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    library = Library(models.BPE(vocab=vocabulary, merges=merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    library.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    add = library.add_special_tokens if special else library.add_tokens
    add([AddedToken("<|endoftext|>", special=special)])
    library.save(str(path))
    return Tokenizer(str(path))


def tiny_config(max_seq_len: int = 256, **changes: Any) -> ModelConfig:
    """Released shape of experts (N FFN, 2 constant, 1 copy, 1 zero), everything small."""
    moe = MoEConfig(
        num_ffn_experts=4,
        ffn_hidden_size=24,
        num_zero_experts=1,
        num_copy_experts=1,
        num_constant_experts=2,
        capacity_factor=0.5,  # drops most assignments in training mode: scores taken there would be far off
    )
    shape = {"vocab_size": 272, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    return ModelConfig(**(shape | changes), max_seq_len=max_seq_len, moe=moe, init_std=0.3)


def tiny_model(cfg: ModelConfig, ep_group: comm.Group | None = None, seed: int = 5) -> Transformer:
    """The same weights on every layout, in training mode."""
    model = Transformer(cfg, ExpertParallel(ep_group))
    ep_size = 1 if ep_group is None else comm.size(ep_group)
    init_parameters(model, seed, 0 if ep_group is None else comm.rank(ep_group), ep_size)
    return model.train()


@torch.no_grad()
def slow_loglikelihood(model: Transformer, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """One request, alone, in fp64 from the logits on: the oracle for everything that batches."""
    was_training = model.training
    model.eval()
    total, greedy = 0.0, True
    whole = [*context, *continuation]
    logits_SV = model.logits(model(torch.tensor([whole])).hidden)[0].double()
    for position in range(len(context), len(whole)):
        before_V = logits_SV[position - 1]
        total += float(before_V[whole[position]] - torch.logsumexp(before_V, 0))
        greedy &= int(before_V.argmax()) == whole[position]
    model.train(was_training)
    return total, greedy


def sentence(rng: random.Random, length: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(length))


def write_split(folder: Path, task: str, split: str, documents: Sequence[dict[str, Any]]) -> None:
    """FOLDER/<task>/<split>.jsonl"""
    path = folder / task / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(doc) + "\n" for doc in documents))


def write_benchmarks(folder: Path, number: int = 9, seed: int = 3) -> Path:
    """SciQ, BoolQ, LAMBADA, NQ-open and both ARCs, with ``number`` documents in each evaluated split."""
    rng = random.Random(seed)
    sciq = [
        {
            "question": sentence(rng, 4) + "?",
            "support": sentence(rng, rng.randint(0, 6)),
            "correct_answer": sentence(rng, 1),
        }
        | {f"distractor{i}": sentence(rng, rng.randint(1, 3)) for i in (1, 2, 3)}
        for _ in range(number)
    ]
    boolq = [
        {"question": f"is {sentence(rng, 2)} {i}", "passage": sentence(rng, 3), "label": rng.randint(0, 1)}
        for i in range(number)
    ]
    write_split(folder, "sciq", "test", sciq)
    write_split(folder, "boolq", "validation", boolq)
    write_split(folder, "lambada_openai", "test", [{"text": sentence(rng, rng.randint(3, 9))} for _ in range(number)])
    questions = [{"question": f"who is {sentence(rng, 2)} {i}", "answer": [sentence(rng, 1)]} for i in range(number)]
    write_split(folder, "nq_open", "validation", questions)
    for task, num_choices in (("arc_easy", 4), ("arc_challenge", 3)):
        documents = [
            {
                "question": sentence(rng, 5),
                "choices": {
                    "text": [sentence(rng, 2) for _ in range(num_choices)],
                    "label": list("ABCD"[:num_choices]),
                },
                "answerKey": rng.choice("ABCD"[:num_choices]),
            }
            for _ in range(number + num_choices)
        ]
        write_split(folder, task, "validation", documents)
    return folder
