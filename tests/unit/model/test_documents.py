"""Attention within documents: packed documents give what each gives alone, in training and in decoding."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from moepp import ops
from moepp.config import ModelConfig, MoEConfig
from moepp.model import KVCache, Transformer, generate, init_parameters
from moepp.model.documents import number_documents, positions_in_documents

END = 9
# Documents of several lengths, of one token (the end alone) and of two; the last one is cut, as sequences do.
PACKED = [
    [[3, 1, 4, 1, 9], [9], [5, 2, 6, 5, 3, 9], [5, 8], []],
    [[9], [2, 7, 1, 8, 2, 8, 1, 8, 2, 9], [8, 9], [4], []],
]
NEXT = [7, 6]  # label of the last token


def make_model(document_end: int | None = END, **changes: Any) -> Transformer:
    moe = MoEConfig(
        num_ffn_experts=4,
        ffn_hidden_size=6,
        num_zero_experts=1,
        num_copy_experts=1,
        num_constant_experts=2,
        capacity_factor=None,
    )
    values = {
        "vocab_size": 10,
        "hidden_size": 16,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_seq_len": 32,
        "init_std": 0.3,
    }
    model = Transformer(ModelConfig(moe=moe, **(values | changes)), document_end=document_end).double()
    init_parameters(model, 5)
    return model


def joined(documents: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(documents))


def make_ids() -> Tensor:
    return torch.tensor([joined(documents) for documents in PACKED])


def test_documents_are_numbered_and_positions_start_again_after_each_end():
    ids_BS = torch.tensor([[3, 9, 9, 4, 5, 9, 1], [9, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 9]])
    documents_BS = number_documents(ids_BS, END)
    assert documents_BS.tolist() == [[0, 0, 1, 2, 2, 2, 3], [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]]
    assert positions_in_documents(documents_BS).tolist() == [
        [0, 1, 0, 0, 1, 2, 0],
        [0, 0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 6],
    ]


def make_labels() -> Tensor:
    return torch.cat((make_ids()[:, 1:], torch.tensor(NEXT)[:, None]), dim=1)


def _alone() -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the losses of each document by itself, and its gradients."""
    model, total = make_model(document_end=None), torch.zeros((), dtype=torch.float64)
    for documents, last in zip(PACKED, NEXT, strict=True):
        labels = [*joined(documents)[1:], last]
        for document in filter(None, documents):
            own, labels = labels[: len(document)], labels[len(document) :]
            total = total + model.loss(torch.tensor([document]), torch.tensor([own])).ce_sum
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
def test_packed_documents_give_the_loss_and_gradients_of_each_alone(recompute):
    ids_BS, labels_BS = make_ids(), make_labels()
    model = make_model()
    model.set_recompute(recompute)
    out = model.loss(ids_BS, labels_BS)
    out.ce_sum.backward()
    wanted, gradients = _alone()
    crossing = make_model(document_end=None).loss(ids_BS, labels_BS).ce_sum
    assert abs(float(crossing.detach() - wanted)) > 1e-2
    torch.testing.assert_close(out.ce_sum.detach(), wanted, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(
                parameter.grad, gradients[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: n + m
            )


def test_block_mask_of_accelerators_says_what_the_dense_one_does(monkeypatch):
    # On the CPU FlexAttention has no backward.
    right, (ids_BS, labels_BS) = ops.document_mask, (make_ids(), make_labels())
    with torch.no_grad():
        wanted = make_model().loss(ids_BS, labels_BS).ce_sum
        monkeypatch.setattr("moepp.model.attention.document_mask", lambda *args, blocks: right(*args, blocks=True))
        torch.testing.assert_close(make_model().loss(ids_BS, labels_BS).ce_sum, wanted, rtol=1e-6, atol=0)
    mask = right(torch.zeros(1, 4, dtype=torch.int64), torch.arange(4), 4, 8, blocks=True)
    assert isinstance(mask, BlockMask)


def test_packed_tokens_see_nothing_of_other_documents():
    model, ids_BS = make_model().eval(), make_ids()
    changed_BS = ids_BS.clone()
    changed_BS[0, 6:9] = torch.tensor([1, 1, 7])  # of the third document, positions 6 to 11
    with torch.no_grad():
        difference_BS = (model(ids_BS).hidden - model(changed_BS).hidden).abs().amax(dim=-1)
    assert difference_BS[0, 6:12].min() > 1e-6
    difference_BS[0, 6:12] = 0
    assert difference_BS.max() < 1e-14


@pytest.mark.parametrize("pieces", [[1] * 14, [5, 1, 1, 7], [14], [6, 8]])
def test_cached_decoding_equals_the_full_forward(pieces):
    model, ids_BS = make_model().eval(), make_ids()
    cache = KVCache(model.cfg.num_layers, max_length=14)
    parts = [model(part_BS, cache=cache).hidden for part_BS in ids_BS.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids_BS).hidden, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cached", [False, True])
def test_padded_prompts_continue_as_alone(cached):
    """Padding on the left, with the very token that ends documents; one prompt starts with it, one holds it."""
    model = make_model().eval()
    prompts = [[9, 3, 1], [4, 9, 2, 5, 7], [6, 2, 2]]
    width = max(map(len, prompts))
    ids_BS = torch.tensor([[9] * (width - len(prompt)) + prompt for prompt in prompts])
    mask_BS = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    together = generate(model, ids_BS, 6, attention_mask=mask_BS, cache=cached)
    hidden = model(ids_BS, attention_mask=mask_BS).hidden
    assert hidden.isfinite().all()
    for row, prompt in enumerate(prompts):
        alone = torch.tensor([prompt])
        torch.testing.assert_close(hidden[row, -len(prompt) :], model(alone).hidden[0], rtol=1e-5, atol=1e-5)
        assert together[row, -6 - len(prompt) :].tolist() == generate(model, alone, 6, cache=not cached)[0].tolist()


def test_a_prompt_after_the_end_of_a_document_is_a_document_of_its_own():
    model = make_model().eval()
    prompt = torch.tensor([[3, 1, 4]])
    after_end = model(torch.cat((torch.tensor([[END]]), prompt), dim=1)).hidden[:, 1:]
    torch.testing.assert_close(after_end, model(prompt).hidden, rtol=1e-12, atol=1e-12)


def test_without_documents_the_ends_mean_nothing():
    ids_BS = make_ids()
    plain = make_model(document_end=None).eval()
    other = make_model(document_end=None).eval()
    other.document_end = 0  # a token that no sequence holds
    torch.testing.assert_close(plain(ids_BS).hidden, other(ids_BS).hidden, rtol=1e-12, atol=1e-12)
