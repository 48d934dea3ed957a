"""What is seen of a model's routing, against the slow oracle and hand-made tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moepp.analysis import token_tables as tables
from moepp.analysis.observe import Change, Observed, observe, pool_observed, swap_kinds
from moepp.analysis.question_pages import long_context_figures
from moepp.analysis.questions import communication, long_context, robustness
from moepp.analysis.token_pages import gate_figures, token_figures
from moepp.analysis.token_view import TokenView, pool, view_evaluation
from moepp.config import ModelConfig, MoEConfig
from moepp.errors import ConfigError, DataError
from moepp.model import Transformer
from moepp.model.init import init_parameters

MOE = MoEConfig(
    num_ffn_experts=4, num_constant_experts=1, num_copy_experts=1, num_zero_experts=1, ffn_hidden_size=16, top_k=2
)


def make_model(layers: dict[str, int] | None = None, **changes: object) -> Transformer:
    moe = MoEConfig(**({f: getattr(MOE, f) for f in MOE.__dataclass_fields__} | changes))
    cfg = ModelConfig(
        vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, max_seq_len=64, moe=moe, init_std=0.3
    )
    cfg = replace(cfg, **(layers or {}))
    model = Transformer(cfg)
    init_parameters(model, 3)
    return model.eval()


def tokens(num: int = 3, length: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50, (num, length + 1))


def test_choices_weights_and_losses_are_those_of_each_sequence_alone():
    model, data = make_model(), tokens()
    seen = observe(model, data)
    assert seen.ids_LNSK.shape == (2, 3, 12, 2)
    for number, sequence in enumerate(data):
        ids = torch.from_numpy(sequence[None])
        logits = model.logits(model(ids[:, :-1]).hidden)[0].double()
        wanted = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        np.testing.assert_allclose(seen.losses_NS[number], wanted.detach().numpy(), rtol=1e-5)
    kept = []
    layer = model.layers[1].moe
    hook = layer.register_forward_hook(lambda module, args, out: kept.append(module.router.choose(out.router_logits)))
    model(torch.from_numpy(data[:, :-1]))
    hook.remove()
    np.testing.assert_array_equal(seen.ids_LNSK[1].reshape(-1, 2), kept[0].topk_ids_TK.numpy())
    np.testing.assert_allclose(seen.weights_LNSK[1].reshape(-1, 2), kept[0].weights_TK.detach().numpy())
    probs = kept[0].probs_TE.detach().double().numpy()
    np.testing.assert_allclose(seen.entropy_LNS[1].ravel(), -(probs * np.log(probs)).sum(1), rtol=1e-5)


def test_a_change_of_routing_leaves_the_model_as_it_was():
    model, data = make_model(), tokens()
    before = observe(model, data)
    changed = observe(model, data, Change(residuals=False, swap_share=1.0))
    assert not np.array_equal(changed.ids_LNSK, before.ids_LNSK)
    after = observe(model, data)
    np.testing.assert_array_equal(after.ids_LNSK, before.ids_LNSK)
    np.testing.assert_array_equal(after.losses_NS, before.losses_NS)
    assert not any("choose" in vars(layer.moe.router) for layer in model.layers)
    assert not any(layer.moe._forward_hooks or layer.moe.router._forward_pre_hooks for layer in model.layers)


def test_without_residuals_a_router_sees_its_own_token_alone():
    model, data = make_model(), tokens()
    for layer in model.layers:
        torch.nn.init.zeros_(layer.moe.router.gate_map.weight)
    np.testing.assert_array_equal(observe(model, data).ids_LNSK, observe(model, data, Change(residuals=False)).ids_LNSK)


def test_swapped_tokens_choose_the_best_of_the_other_family_and_others_do_not_change():
    # FFN 0..3, constant 4, copy 5, zero 6
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0, -1], [5.0, 1, 3, 2, 4, 0, -1], [1.0, 2, 3, 4, 5, 6, 7]])
    ids = logits.topk(2, dim=1).indices
    swapped = swap_kinds(logits, ids, MOE, torch.tensor([True, True, False]))
    assert swapped.topk(2, dim=1).indices.tolist() == [[4, 5], [5, 2], [6, 5]]
    assert torch.equal(swapped[2], logits[2])
    assert torch.equal(swapped.sort(dim=1).values, logits.sort(dim=1).values), "values only change places"
    only_two = torch.tensor([[1.0, 2, 3, 4, 9, 8, 7]])  # both chosen are zero-computation experts
    moved = swap_kinds(only_two, only_two.topk(2, dim=1).indices, MOE, torch.tensor([True]))
    assert moved.topk(2, dim=1).indices.tolist() == [[3, 2]]


def test_robustness_rows_start_at_zero_and_cover_every_token():
    rows = robustness("m", make_model(), tokens(), (0.0, 0.5, 1.0), seed=1)
    assert all(row["increase"] == 0 for row in rows if row["share"] == 0)
    for share in (0.5, 1.0):
        part = {row["quarter"]: row for row in rows if row["share"] == share}
        assert sum(part[q]["tokens"] for q in (1, 2, 3, 4)) == part[0]["tokens"] == 36
        mean = sum(part[q]["loss"] * part[q]["tokens"] for q in (1, 2, 3, 4)) / 36
        assert part[0]["loss"] == pytest.approx(mean) and part[0]["increase"] != 0
    easy, hard = (next(r["loss"] for r in rows if r["share"] == 0 and r["quarter"] == q) for q in (1, 4))
    assert easy < hard


def test_long_context_agrees_with_itself_within_the_trained_length():
    model, data = make_model(), tokens(2, 32)
    rows = long_context("m", model, data, 8)
    assert [row["first"] for row in rows if row["residuals"] == "with residuals"] == list(range(0, 32, 4))
    for row in rows:
        assert 0 <= row["agreement"] <= 1
        if row["last"] < 8:
            assert row["agreement"] == 1 and row["loss"] == pytest.approx(row["loss_in_windows"], rel=1e-5)
    alone = observe(model, data[:, 12:21])  # the window of positions 12 to 19; its later half is what counts
    whole = observe(model, data)
    same = (whole.ids_LNSK[:, :, 16:20, :, None] == alone.ids_LNSK[:, :, 4:, None, :]).any(-1).mean()
    [row] = [row for row in rows if row["residuals"] == "with residuals" and row["first"] == 16]
    assert row["agreement"] == pytest.approx(same)


def hand_made() -> Observed:
    """One layer, 2 sequences of 4 tokens, 2 choices; experts 0..3 are FFN experts."""
    ids = np.array([[[[0, 1], [0, 5], [5, 6], [2, 3]], [[4, 5], [1, 2], [6, 5], [0, 4]]]])
    weights = np.linspace(0, 1, 16).reshape(1, 2, 4, 2)
    losses = np.array([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    return Observed(np.array([[7, 7, 8, 9], [7, 8, 8, 7]]), losses, ids, weights, np.zeros((1, 2, 4)), MOE)


def test_tables_hold_hand_counted_means():
    observed = hand_made()  # FFN experts: 2 1 0 2 / 0 2 0 1
    seen = observed.view
    [seven, eight] = tables.by_type(seen, None, least=2)
    assert (seven["token"], seven["count"], seven["ffn_per_token"], seven["loss"]) == (7, 4, 1.0, 4.0)
    assert (eight["token"], eight["count"], eight["ffn_per_token"]) == (8, 3, pytest.approx(2 / 3))
    positions = tables.by_position(seen)
    assert [row["ffn_per_token"] for row in positions] == [1.0, 1.5, 0.0, 1.5]
    assert [row["tokens"] for row in positions] == [2, 2, 2, 2]
    losses = tables.by_loss(seen)
    assert [row["ffn_per_token"] for row in losses] == [2, 1, 0, 2, 0, 2, 0, 1]
    assert [row["tokens"] for row in tables.by_frequency(seen)] == [1] * 8
    [kinds] = tables.kinds_by_layer({"a": seen})
    assert {k: kinds[k] for k in ("ffn", "constant", "copy", "zero")} == {
        "ffn": 0.5,
        "constant": 0.125,
        "copy": 0.25,
        "zero": 0.125,
    }
    first, second = tables.gate_weights(observed, None)
    assert first["mean"] == pytest.approx(np.linspace(0, 1, 16)[::2].mean()) and sum(first["histogram"]) == 1
    assert (first["choice"], second["choice"], second["residuals"]) == (1, 2, "with")


def test_sources_are_pooled_by_their_tokens():
    seen = hand_made()
    half = replace(seen, **{n: getattr(seen, n)[:1] for n in ("input_ids_NS", "losses_NS")})
    half = replace(half, **{n: getattr(seen, n)[:, :1] for n in ("ids_LNSK", "weights_LNSK", "entropy_LNS")})
    both = pool([seen.view, half.view])
    assert both.ffn_NS.tolist() == [[2, 1, 0, 2], [0, 2, 0, 1], [2, 1, 0, 2]]
    assert both.shares["ffn"] == pytest.approx([(8 + 5) / 24])
    again = pool_observed([seen, half]).view
    assert again.shares["ffn"] == pytest.approx(both.shares["ffn"]) and np.array_equal(again.ffn_NS, both.ffn_NS)
    rows = tables.kinds_by_layer({"a": seen.view, "b": half.view})
    assert [(row["source"], row["ffn"], row["tokens"]) for row in rows] == [("a", 0.5, 8), ("b", 5 / 8, 4)]


def test_what_a_tokens_type_explains_is_all_nothing_or_unknown():
    ids = np.array([[1, 2] * 50])
    shares = {"ffn": np.ones(1)}
    by_token = TokenView(ids, np.zeros((1, 100)), (ids == 1).astype(float), shares)
    assert tables.explained_by_type(tables.by_type(by_token)) == pytest.approx(1.0)
    chance = TokenView(ids, np.zeros((1, 100)), np.random.default_rng(1).integers(0, 3, (1, 100)).astype(float), shares)
    assert tables.explained_by_type(tables.by_type(chance)) == pytest.approx(0, abs=0.05)
    same = TokenView(ids, np.zeros((1, 100)), np.full((1, 100), 2.0), shares)
    assert tables.explained_by_type(tables.by_type(same)) is None
    figures = {figure.name: figure for figure in token_figures(tables.token_tables({"a": same}))}
    assert "All 2 token types use 2.00" in figures["token-types"].caption
    assert "no difference beyond chance" in figures["losses"].caption


def test_an_evaluation_that_is_watched_shows_what_reading_the_sequences_shows():
    model, data = make_model(), tokens(4)
    ids = torch.from_numpy(data)
    batches = [(ids[n : n + 2, :-1], ids[n : n + 2, 1:]) for n in (0, 2)]
    sums = []

    def evaluate(batches):
        sums.extend(float(model.loss(*batch).ce_sum) for batch in batches)

    with torch.no_grad():
        view = view_evaluation(model, batches, evaluate, (0, 1), lambda tensor: tensor)
    seen = observe(model, data).view
    np.testing.assert_array_equal(view.input_ids_NS, seen.input_ids_NS)
    np.testing.assert_allclose(view.ffn_NS, seen.ffn_NS)
    np.testing.assert_allclose(view.losses_NS, seen.losses_NS, rtol=1e-5)
    assert view.losses_NS.sum() == pytest.approx(sum(sums), rel=1e-5)
    for kind, share_L in seen.shares.items():
        np.testing.assert_allclose(view.shares[kind], share_L)
    assert "cross_entropy" not in vars(model) and not any(layer.moe._forward_hooks for layer in model.layers)


def test_layers_are_called_as_in_metrics_where_only_some_are_moe_layers():
    model, data = make_model({"num_layers": 4, "moe_layer_interval": 2, "dense_ffn_hidden_size": 16}), tokens(2)
    seen = observe(model, data)
    batch = [(torch.from_numpy(data)[:, :-1], torch.from_numpy(data)[:, 1:])]
    with torch.no_grad():
        view = view_evaluation(model, batch, lambda batches: model.loss(*batches[0]), (0, 1), lambda tensor: tensor)
    for one in (seen.view, view, pool([view, view]), pool_observed([seen, seen]).view):
        assert [row["layer"] for row in tables.kinds_by_layer({"a": one})] == [1, 3]
    assert [row["layer"] for row in tables.gate_weights(seen, seen)] == [1, 1, 3, 3] * 2


def test_a_model_without_gating_residuals_is_not_said_to_have_any():
    cut = tables.gate_weights(hand_made(), hand_made())
    assert [row["residuals"] for row in cut] == ["with", "with", "without", "without"]
    assert "Cutting the gating residuals moves" in gate_figures(cut)[0].caption
    rows = tables.gate_weights(replace(hand_made(), cfg=replace(MOE, gating_residual=False)), None)
    assert [row["residuals"] for row in rows] == ["none", "none"]
    [figure] = gate_figures(rows)
    assert figure.caption.startswith("The model has no gating residuals. The second choice weighs")
    assert [row[0] for row in figure.rows] == ["choice 1", "choice 2"]


def test_each_model_has_its_own_trained_length():
    names = {"model": "m", "residuals": "r", "last": 0, "entropy": 1.0, "loss": 1.0}
    rows = [
        names | {"model": model, "trained_length": trained, "first": first, "agreement": float(first)}
        for model, trained in (("short", 8), ("long", 16))
        for first in (0, 8, 16)
    ]
    caption = long_context_figures(rows)[0].caption
    assert "short, r: 0.000 within the trained length" in caption
    assert "long, r: 4.000 within the trained length" in caption
    assert "Trained on sequences of 8 (short), 16 (long) tokens." in caption
    assert "Trained on 8 tokens." in long_context_figures(rows[:3])[0].caption


def test_traffic_counts_ffn_assignments_alone():
    model = make_model()
    rows = communication("m", hand_made(), model.cfg, 2, (2, 4))
    per_assignment = 16 * 2 * 2 * 2 * 1  # D, bytes, directions, passes, layers
    assert rows[0]["bytes_per_token"] == 1.0 * per_assignment / 2
    assert rows[1]["bytes_per_token"] == 1.0 * per_assignment * 3 / 4
    assert rows[0]["vanilla"] == rows[0]["everything_sharded"] == 2 * per_assignment / 2
    assert [row["saved"] for row in rows] == [0.5, 0.5]
    # 4 FFN and 3 other experts at tau 0.75: 2 x 3 / (3 + 3) = 1 of 2 choices
    assert [(row["tau"], row["balanced"], row["measured"]) for row in rows] == [(0.75, 0.5, None)] * 2
    vanilla = make_model(num_constant_experts=0, num_copy_experts=0, num_zero_experts=0)
    assert communication("v", observe(vanilla, tokens()), vanilla.cfg, 2, (2,), 0.25)[0]["tau"] is None


def test_what_a_model_does_not_have_is_refused():
    vanilla = make_model(num_constant_experts=0, num_copy_experts=0, num_zero_experts=0, gating_residual=False)
    with pytest.raises(ConfigError, match="no gating residuals"):
        observe(vanilla, tokens(), Change(residuals=False))
    with pytest.raises(ConfigError, match="no zero-computation experts"):
        observe(vanilla, tokens(), Change(swap_share=0.5))
    with pytest.raises(DataError, match="at least one sequence"):
        observe(vanilla, tokens()[:0])
    assert {row["residuals"] for row in long_context("v", vanilla, tokens(), 6)} == {"without residuals"}
