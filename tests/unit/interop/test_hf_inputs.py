"""Exported models with every cache, mask and way of generating that transformers has: equal to none, or refused.

The reference is the model itself without cache, mask and padding. Letters: B batch, S positions, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache

from tests.hf_checks import CLOSE
from tests.unit.interop.test_hf import CONFIGS, export, own_module_cache  # noqa: F401

GENERATION = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, own_module_cache: None) -> Path:  # noqa: F811
    path = tmp_path_factory.mktemp("export") / "mlp_interval"
    export(path, CONFIGS["mlp_interval"])
    return path


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder)


@pytest.fixture(scope="module")
def ids_BS() -> Tensor:
    return torch.randint(1, 61, (2, 12), generator=torch.Generator().manual_seed(1))


def alone(model: Any, ids_BS: Tensor) -> Tensor:
    """Logits without cache and mask."""
    return model(ids_BS, use_cache=False).logits


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, **CLOSE)


def refused(message: str, call: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def static_cache(model: Any, length: int = 32) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=length)


CACHES = {
    "dynamic": lambda model: DynamicCache(),
    "dynamic by layers": lambda model: DynamicCache(config=model.config),
    "static": static_cache,
    "static, full at the end": lambda model: static_cache(model, 12),
    "tuples": lambda model: (),
}


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(12,), (5, 7), (6, 1, 1, 4)])
@pytest.mark.parametrize("kind", CACHES)
def test_pieces_with_a_cache_are_the_whole(model, ids_BS, kind, sizes):
    cache, start, pieces = CACHES[kind](model), 0, []
    for size in sizes:
        place = torch.arange(start, start + size) if start else None  # the older code's argument, now and then
        out = model(ids_BS[:, start : start + size], cache=cache, use_cache=True, cache_position=place)
        cache, start = out.cache, start + size
        pieces.append(out.logits)
    same(torch.cat(pieces, dim=1), alone(model, ids_BS))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cropped_cache_is_continued(model, ids_BS, kind):
    cache = CACHES[kind](model)
    other_BS = torch.cat((ids_BS[:, :6], ids_BS[:, :4]), dim=1)
    model(other_BS, cache=cache, use_cache=True)
    cache.crop(-4)
    same(model(ids_BS[:, 6:], cache=cache, use_cache=True).logits, alone(model, ids_BS)[:, 6:])


@torch.no_grad()
def test_caches_that_cannot_be_right_are_refused(model, ids_BS):
    def given(cache: Any, **options: Any) -> Any:
        return lambda: model(ids_BS, past_key_values=cache, **options)

    sliding = Cache(layers=[cache_utils.DynamicSlidingWindowLayer(6) for _ in range(4)])
    refused("Cache with a sliding window", given(sliding))
    mixed = Cache(
        layers=[cache_utils.StaticSlidingWindowLayer(32, 6), *(cache_utils.StaticLayer(32) for _ in range(3))]
    )
    refused("Cache with a sliding window", given(mixed))
    refused("a EncoderDecoderCache, which", given(EncoderDecoderCache(DynamicCache(), DynamicCache())))
    refused("holds 2 layers, the model has 4", given(Cache(layers=[cache_utils.DynamicLayer() for _ in range(2)])))
    refused("holds 1 layers", given(((ids_BS, ids_BS),)))
    refused("is a str, which", given("static"))
    refused("at most 8 positions, needed are 12", given(static_cache(model, 8)))
    refused("does not fit 12 new positions after 0", given(DynamicCache(), cache_position=torch.arange(3, 15)))

    class Forgetful(DynamicCache):
        def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            key, value = super().update(*args, **kwargs)
            return key[:, :, 1:], value[:, :, 1:]

    refused("Forgetful returned 11 keys, expected 12", given(Forgetful()))


def padding_masks() -> dict[str, Tensor]:
    masks = {name: torch.ones(2, 12, dtype=torch.long) for name in ("left", "right", "holes")}
    masks["left"][0, :3] = 0
    masks["right"][0, 9:] = 0
    masks["holes"][0, 4:6] = 0
    masks["holes"][1, 8] = 0
    return masks


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", padding_masks())
def test_padding_is_not_seen(folder, ids_BS, name, attention):
    model, mask_BS = load(folder, attn_implementation=attention), padding_masks()[name]
    positions_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)

    def check(logits_BSV: Tensor) -> None:
        for row in range(2):
            real_S = mask_BS[row].bool()
            same(logits_BSV[row, real_S], alone(model, ids_BS[row : row + 1, real_S])[0])

    for form in (mask_BS, mask_BS.bool(), mask_BS.float()):
        check(model(ids_BS, attention_mask=form, position_ids=positions_BS).logits)
    for kind in ("dynamic", "static"):
        cache, pieces = CACHES[kind](model), []
        for start, stop in ((0, 7), (7, 8), (8, 12)):
            seen = mask_BS[:, :stop]
            if kind == "static":  # a mask may cover all places of the cache
                seen = torch.nn.functional.pad(seen, (0, 32 - stop), value=1 if start else 0)
            place = positions_BS[:, start:stop]
            out = model(ids_BS[:, start:stop], attention_mask=seen, position_ids=place, cache=cache, use_cache=True)
            pieces.append(out.logits)
        check(torch.cat(pieces, dim=1))


@torch.no_grad()
def test_prepared_masks_take_the_place_of_the_causal_one(model, ids_BS):
    """Two documents in a row: the second does not see the first."""
    allowed_SS = torch.ones(12, 12, dtype=torch.bool).tril()
    allowed_SS[5:, :5] = False
    lowest = torch.finfo(torch.float32).min
    added_SS = torch.zeros(12, 12).masked_fill(~allowed_SS, lowest)
    want = torch.cat((alone(model, ids_BS[:, :5]), alone(model, ids_BS[:, 5:])), dim=1)
    infinite_SS = torch.zeros(12, 12).masked_fill(~allowed_SS, -torch.inf)
    for mask in (allowed_SS, added_SS, infinite_SS, added_SS.double()):
        for shape in ((1, 1, 12, 12), (2, 1, 12, 12), (2, 4, 12, 12)):
            same(model(ids_BS, attention_mask=mask.expand(shape)).logits, want)
    wide = torch.nn.functional.pad(allowed_SS, (0, 20))[None, None]
    same(model(ids_BS, attention_mask=wide, cache=static_cache(model), use_cache=True).logits, want)
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    same(model(ids_BS, position_ids=packed, use_cache=False).logits, want)
    # With a mask, positions are positions: moved on together, nothing changes.
    moved = packed.new_tensor(range(7, 19))[None]
    same(model(ids_BS, position_ids=moved, use_cache=False).logits, alone(model, ids_BS))


@torch.no_grad()
def test_masks_of_no_known_form_are_refused(model, ids_BS):
    ones = torch.ones(2, 12)
    for mask, message in (
        ({"full_attention": ones}, "attention_mask is a dict, expected a tensor"),
        (ones.tolist(), "attention_mask is a list"),
        (ones[:, :8], r"shape \[2, 8\], expected \[2, 12\]"),
        (torch.ones(2, 15), r"shape \[2, 15\], expected \[2, 12\]"),
        (ones[:1], r"shape \[1, 12\], expected \[2, 12\]"),
        (ones[0], r"shape \[12\]"),
        (torch.ones(2, 12, 12), r"shape \[2, 12, 12\]"),
        (torch.ones(1, 1, 12, 12, dtype=torch.long), "of 4 dimensions is torch.int64"),
        (torch.ones(1, 1, 12, 20, dtype=torch.bool), r"expected \[1 or 2, 1 or 4, 12, 12\]"),
        (torch.ones(1, 3, 12, 12, dtype=torch.bool), r"expected \[1 or 2, 1 or 4, 12, 12\]"),
        (ones - 1e9, "of 2 dimensions holds negative numbers"),
    ):
        refused(message, lambda mask=mask: model(ids_BS, attention_mask=mask))


@torch.no_grad()
def test_attention_weights_are_returned_when_asked_for(folder, ids_BS):
    for attention in ("sdpa", "eager"):
        model = load(folder, attn_implementation=attention)
        out = model(ids_BS, output_attentions=True)
        same(out.logits, alone(model, ids_BS))
        assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 12, 12)] * 4
        for weights in out.attentions:
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))
            assert not weights.triu(1).any()
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        load(folder, attn_implementation="flash_attention_2")
    model.config._attn_implementation_internal = "paged|eager"
    refused("attn_implementation='paged|eager' is not supported", lambda: model(ids_BS))


@torch.no_grad()
def test_outputs_are_those_of_llama(model, ids_BS):
    whole = alone(model, ids_BS)
    assert torch.equal(model(ids_BS, logits_to_keep=3).logits, whole[:, -3:])
    assert torch.equal(model(ids_BS, num_logits_to_keep=3).logits, whole[:, -3:])
    assert torch.equal(model(ids_BS, logits_to_keep=torch.tensor([1, 5])).logits, whole[:, [1, 5]])
    each = model(ids_BS, logits_to_keep=torch.tensor([[1, 5], [2, 3]])).logits
    same(each, torch.stack((whole[0, [1, 5]], whole[1, [2, 3]])))
    chosen_BS = ids_BS > 30
    same(model(ids_BS, logits_to_keep=chosen_BS).logits, whole[chosen_BS])
    same(model(inputs_embeds=model.get_input_embeddings()(ids_BS)).logits, whole)
    loss, logits = model(ids_BS, labels=ids_BS, return_dict=False, output_router_logits=False, use_cache=False)
    assert torch.equal(logits, whole) and loss.dim() == 0
    assert isinstance(model.model(ids_BS, return_dict=False), tuple)
    hidden = model(ids_BS, output_hidden_states=True).hidden_states
    assert len(hidden) == 5 and torch.equal(model.lm_head(hidden[-1]), whole)
    assert model(ids_BS, output_router_logits=False).router_logits is None
    model.config.output_hidden_states = True
    assert len(model(ids_BS).hidden_states) == 5
    model.config.output_hidden_states = False


@torch.no_grad()
def greedy(model: Any, ids_BS: Tensor) -> Tensor:
    for _ in range(GENERATION["max_new_tokens"]):
        ids_BS = torch.cat((ids_BS, alone(model, ids_BS)[:, -1:].argmax(-1)), dim=1)
    return ids_BS


@pytest.mark.parametrize("implementation", ["dynamic", "static", "hybrid"])
def test_generation_with_every_cache_is_generation_without(model, ids_BS, implementation):
    options = GENERATION | {"cache_implementation": implementation}
    ones = torch.ones_like(ids_BS)
    assert torch.equal(model.generate(ids_BS, **options), greedy(model, ids_BS))
    assert torch.equal(model.generate(ids_BS, attention_mask=ones, **options), greedy(model, ids_BS))
    padded = torch.nn.functional.pad(ids_BS, (3, 0))
    mask = (padded > 0).long()
    mask[1, :5] = 0
    out = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(out[:1, 3:], greedy(model, ids_BS[:1])) and torch.equal(
        out[1:, 5:], greedy(model, ids_BS[1:, 2:])
    )
    beams = GENERATION | {"num_beams": 3, "attention_mask": ones}
    want = model.generate(ids_BS, use_cache=False, **beams)
    assert torch.equal(model.generate(ids_BS, cache_implementation=implementation, **beams), want)
    chunks = model.generate(ids_BS, attention_mask=ones, prefill_chunk_size=5, **options)
    assert torch.equal(chunks, greedy(model, ids_BS))


def test_generation_goes_on_from_a_cache_and_from_embeddings(model, ids_BS):
    for kind in ("dynamic", "static"):
        cache = CACHES[kind](model)
        model(ids_BS[:, :5], cache=cache, use_cache=True)
        out = model.generate(ids_BS, cache=cache, attention_mask=torch.ones_like(ids_BS), **GENERATION)
        assert torch.equal(out, greedy(model, ids_BS))
        embeddings = model.get_input_embeddings()(ids_BS)
        out = model.generate(inputs_embeds=embeddings, cache_implementation=kind, **GENERATION)
        assert torch.equal(out, greedy(model, ids_BS)[:, 12:])


def test_drafts_do_not_change_the_text(folder, model, ids_BS):
    prompt, other = ids_BS[:1], load(folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    want = greedy(model, prompt)
    assert torch.equal(model.generate(prompt, assistant_model=other, **GENERATION), want)
    assert torch.equal(other.generate(prompt, assistant_model=model, **GENERATION), greedy(other, prompt))
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **GENERATION), want)
    early = load(folder)
    assert torch.equal(early.generate(prompt, assistant_early_exit=2, **GENERATION), want)


@torch.no_grad()
def test_copies_resized_and_saved_models_compute_the_same(model, folder, ids_BS, tmp_path):
    import copy

    whole, resized = alone(model, ids_BS), copy.deepcopy(model)
    resized.resize_token_embeddings(70, mean_resizing=False)
    same(alone(resized, ids_BS)[..., :61], whole)
    assert torch.isfinite(resized(ids_BS, labels=ids_BS).loss)
    resized.save_pretrained(tmp_path / "resized", max_shard_size="30KB")
    assert len(list((tmp_path / "resized").glob("*.safetensors"))) > 2
    assert torch.equal(alone(load(tmp_path / "resized"), ids_BS), alone(resized, ids_BS))
    placed = load(folder, device_map={"": "cpu"}, dtype=torch.bfloat16)
    assert placed.dtype == torch.bfloat16 and torch.isfinite(alone(placed, ids_BS)).all()
    # Layers on disk are fetched when their module is called, so that everything must go through modules.
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    on_disk = load(folder, device_map=places, offload_folder=str(tmp_path / "disk"))
    same(alone(on_disk, ids_BS), whole)


@pytest.mark.slow
@pytest.mark.exhaustive
@torch.no_grad()
def test_compiled_models_compute_the_same(model, ids_BS):
    compiled = torch.compile(model, backend="eager")
    same(compiled(ids_BS, use_cache=False).logits, alone(model, ids_BS))
    cache = static_cache(model)
    pieces = [compiled(ids_BS[:, a:b], cache=cache, use_cache=True).logits for a, b in ((0, 8), (8, 9), (9, 12))]
    same(torch.cat(pieces, dim=1), alone(model, ids_BS))
