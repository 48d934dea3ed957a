"""Sampling from the model, alone and over two ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moepp.config import ModelConfig, MoEConfig
from moepp.errors import ConfigError
from moepp.model import Transformer, generate, init_parameters
from moepp.model.generate import Sampling, sample
from moepp.moe import ExpertParallel
from tests.dist import subgroups

CFG = ModelConfig(
    vocab_size=31,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    max_seq_len=64,
    init_std=0.7,  # enough for continuations that vary
    moe=MoEConfig(
        num_ffn_experts=4,
        ffn_hidden_size=8,
        num_zero_experts=1,
        num_copy_experts=1,
        num_constant_experts=1,
        capacity_factor=0.5,
    ),
)
PROMPTS = torch.tensor([[3, 9, 4, 20], [30, 1, 7, 2]])


def make_model(parallel: ExpertParallel | None = None) -> Transformer:
    model = Transformer(CFG, parallel)
    rank, size = (torch.distributed.get_rank(), 2) if parallel else (0, 1)
    init_parameters(model, 11, rank, size)
    return model


@torch.no_grad()
def greedy_one_by_one(model: Transformer, prompt_S: torch.Tensor, count: int) -> torch.Tensor:
    model.eval()
    for _ in range(count):
        logits = model.logits(model(prompt_S.unsqueeze(0)).hidden)
        prompt_S = torch.cat((prompt_S, logits[0, -1].argmax().unsqueeze(0)))
    return prompt_S


@pytest.mark.parametrize("cache", [True, False])
def test_greedy_continues_each_prompt_with_its_most_likely_tokens(cache):
    out = generate(make_model(), PROMPTS, 8, cache=cache)
    expected = torch.stack([greedy_one_by_one(make_model(), prompt, 8) for prompt in PROMPTS])
    assert torch.equal(out, expected)
    assert not torch.equal(out[0, 4:], out[1, 4:])


@pytest.mark.parametrize("cache", [True, False])
def test_left_padding_does_not_change_the_continuation(cache):
    short = PROMPTS[0, 1:]
    padded = torch.cat((torch.tensor([0]), short))
    out = generate(
        make_model(),
        torch.stack((padded, PROMPTS[1])),
        8,
        cache=cache,
        attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
    )
    assert torch.equal(out[0, 1:], greedy_one_by_one(make_model(), short, 8))
    assert torch.equal(out[1], greedy_one_by_one(make_model(), PROMPTS[1], 8))


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_restored_and_no_graph_is_kept(training):
    model = make_model().train(training)
    out = generate(model, PROMPTS, 3)
    assert all(module.training is training for module in model.modules())
    assert not out.requires_grad
    with pytest.raises(IndexError):
        generate(model, torch.tensor([[31]]), 1)
    assert model.training is training


def test_a_finished_sequence_is_filled_and_all_finished_stops():
    expected = generate(make_model(), PROMPTS, 8)
    new = expected[0, 4:].tolist()
    place = next(i for i in range(1, 8) if new[i] not in new[:i])  # not the very first, and not seen before
    eos = new[place]
    out = generate(make_model(), PROMPTS, 8, eos_id=eos)
    assert torch.equal(out[0, : 4 + place], expected[0, : 4 + place])
    assert (out[0, 4 + place :] == eos).all()
    ended = (expected[1, 4:] == eos).nonzero()
    stop = 4 + int(ended[0]) if len(ended) else out.shape[1]
    assert torch.equal(out[1, :stop], expected[1, :stop])
    alone = generate(make_model(), PROMPTS[:1], 8, eos_id=eos)
    assert torch.equal(alone, expected[:1, : 5 + place])


def test_sampling_repeats_with_the_seed_and_agrees_with_and_without_cache():
    def draw(seed: int, cache: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return generate(make_model(), PROMPTS, 12, temperature=1.0, generator=generator, cache=cache)

    assert torch.equal(draw(1, True), draw(1, False))
    assert not torch.equal(draw(1, True), draw(2, True))


def frequencies(**options) -> torch.Tensor:
    logits = torch.tensor([0.5, 0.05, 0.3, 0.15]).log().expand(20_000, 4)
    drawn = sample(logits, Sampling(**options), torch.Generator().manual_seed(0))
    return drawn.flatten().bincount(minlength=4) / len(logits)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, [0.5, 0.05, 0.3, 0.15]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365, 0.0225 / 0.365]),
        ({"temperature": 1.0, "top_k": 2}, [0.625, 0, 0.375, 0]),
        ({"temperature": 1.0, "top_k": 9}, [0.5, 0.05, 0.3, 0.15]),
        ({"temperature": 1.0, "top_p": 0.7}, [0.625, 0, 0.375, 0]),
        ({"temperature": 1.0, "top_p": 0.9}, [0.5 / 0.95, 0, 0.3 / 0.95, 0.15 / 0.95]),
        ({"temperature": 1.0, "top_p": 0.01}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.9, "top_k": 1}, [1, 0, 0, 0]),
        ({"temperature": 0.0, "top_p": 0.9}, [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_sample_draws_with_the_given_probabilities(options, expected):
    torch.testing.assert_close(frequencies(**options), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0.015)


def test_bad_options_are_refused():
    model = make_model()
    for options, message in [
        ({"temperature": -1.0}, "temperature=-1.0 is out of range"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 leaves no token"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 is negative"),
    ]:
        with pytest.raises(ConfigError, match=message):
            generate(model, PROMPTS, **({"max_new_tokens": 1} | options))
    with pytest.raises(ConfigError, match="at least one token"):
        generate(model, PROMPTS[:, :0], 1)


def _generate_on_rank(rank: int, seed_differs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    model = make_model(ExpertParallel(subgroups(2)))
    greedy = generate(model, PROMPTS, 6)
    generator = torch.Generator().manual_seed(rank if seed_differs else 0)
    return greedy, generate(model, PROMPTS, 6, temperature=1.0, generator=generator, eos_id=5)


@pytest.mark.parametrize("seed_differs", [False, True])
def test_two_ranks_sharing_the_experts_draw_the_tokens_of_one_process(pool_2, seed_differs):
    expected = generate(make_model(), PROMPTS, 6)
    drawn = generate(make_model(), PROMPTS, 6, temperature=1.0, generator=torch.Generator().manual_seed(0), eos_id=5)
    for greedy, sampled in pool_2.run(_generate_on_rank, seed_differs):
        assert torch.equal(greedy, expected)
        assert torch.equal(sampled, drawn)


@pytest.mark.parametrize(
    "options", [Sampling(), Sampling(1.5), Sampling(1.5, top_k=6), Sampling(1.5, top_p=0.9)], ids=str
)
def test_ids_without_a_token_are_never_chosen(options):
    """They are the likeliest by far; the others are chosen as if these rows did not exist."""
    logits_BV = torch.randn(64, 9, generator=torch.Generator().manual_seed(3))
    allowed, never = [0, 1, 2, 4, 5, 7], (3, 6, 8)
    logits_BV[:, list(never)] += 20
    few = sample(logits_BV[:, allowed], options, torch.Generator().manual_seed(5))
    chosen = sample(logits_BV, replace(options, never=never), torch.Generator().manual_seed(5))
    assert set(chosen.flatten().tolist()) <= set(allowed)
    if options.temperature == 0:
        assert torch.equal(chosen, torch.tensor(allowed)[few])
    assert len(set(sample(logits_BV, options, torch.Generator().manual_seed(5)).flatten().tolist()) & set(never)) == 3
