"""Registering parts from outside: what is refused, and in which words; --plugin; the page about it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch
import yaml
from torch import nn

import docs.examples.bias_router
import docs.examples.negate_expert
import docs.examples.scale_expert  # noqa: F401
from moepp import MoEConfig, MoELayer
from moepp.cli.main import main
from moepp.config import ModelConfig, import_plugins
from moepp.config.load import build, from_stored, upgrade
from moepp.errors import ConfigError, PluginError
from moepp.model.init import init_parameters
from moepp.model.transformer import Transformer
from moepp.moe.experts import ExpertKind
from moepp.moe.gates import Gates
from moepp.moe.registered import persistent_buffers
from moepp.moe.router import LinearRouter, make_router
from moepp.registry import BALANCE_RULES, EXPERT_KINDS, GATE_NORMALIZATIONS, ROUTERS, Registry
from tests.parity import Layout, Setting, make_config

ROOT = Path(__file__).resolve().parents[3]
BIAS = {"router": "bias", "gate_normalization": "none"}


def small(**moe) -> MoEConfig:
    return MoEConfig(num_ffn_experts=2, ffn_hidden_size=4, num_copy_experts=1, num_zero_experts=1, **moe)


def model_of(moe: MoEConfig) -> Transformer:
    cfg = ModelConfig(vocab_size=8, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, max_seq_len=8, moe=moe)
    with torch.device("meta"):
        model = Transformer(cfg)
    return model.to_empty(device="cpu")


@pytest.mark.parametrize(
    "fields",
    [
        {"router": "nosuch"},
        {"gate_normalization": "nosuch"},
        {"balance_rule": "nosuch"},
        {"extra_experts": {"nosuch": 1}},
        {"extra_experts": {"nosuch": 0}},
    ],
)
def test_unknown_name_is_refused_with_the_known_ones_and_the_remedy(fields):
    with pytest.raises(ConfigError) as error:
        small(**fields)
    text = str(error.value)
    assert "'nosuch'" in text and "runtime.plugins" in text and "\n" not in text
    [key] = fields
    assert f"model.moe.{key}" in text


@pytest.mark.parametrize("registry", [EXPERT_KINDS, ROUTERS, GATE_NORMALIZATIONS, BALANCE_RULES], ids=lambda r: r.what)
@pytest.mark.parametrize("name", ["", "two words", "3d", "größe", "a.b", "a/b", "-x"])
def test_name_that_no_key_can_hold_is_refused(registry, name):
    with pytest.raises(ConfigError, match="ASCII"):
        registry.register(name)


@pytest.mark.parametrize(
    "name", ["ffn", "zero", "copy", "constant", "value", "alpha_proj", "experts", "forward", "type"]
)
def test_reserved_kind_is_refused(name):
    with pytest.raises(ConfigError, match="meaning of its own"):
        EXPERT_KINDS.register(name)


@pytest.mark.parametrize(
    ("registry", "name"), [(ROUTERS, "linear"), (GATE_NORMALIZATIONS, "none"), (BALANCE_RULES, "heterogeneous")]
)
def test_taken_name_is_refused(registry, name):
    before = registry.get(name)
    with pytest.raises(ConfigError, match="registered already"):
        registry.register(name)(lambda: None)
    assert registry.get(name) is before


def test_same_name_of_another_file_is_refused_and_of_the_same_file_is_not(monkeypatch):
    registry = Registry("thing", "model.thing", "moepp.moe.gates")
    made = []
    for name, file in (("one", "a.py"), ("again", "a.py"), ("two", "b.py")):
        module = ModuleType(name)
        module.__file__ = file
        monkeypatch.setitem(sys.modules, name, module)
        exec("def rule(): pass", module.__dict__)
        made.append(module.rule)
    registry.register("rule")(made[0])
    registry.register("rule")(made[1])
    assert registry.get("rule") is made[1]
    with pytest.raises(ConfigError, match="registered already"):
        registry.register("rule")(made[2])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import nothing_of_this_name", "nothing_of_this_name"),
        ("def broken(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("raise ValueError('two\\nlines \\x1b[31m')", "ValueError"),
    ],
)
def test_plugin_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch, source, reason):
    (tmp_path / "broken_plugin_for_test.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as error:
        import_plugins({"runtime": {"plugins": ["broken_plugin_for_test"]}})
    text = str(error.value)
    assert reason in text and "runtime.plugins" in text and "PYTHONPATH" in text
    assert text.isprintable()


def test_plugin_that_is_named_as_a_file_is_told_the_modules_name(tmp_path, monkeypatch):
    (tmp_path / "plugin_named_as_file.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="name the module, plugin_named_as_file"):
        import_plugins({"runtime": {"plugins": ["plugin_named_as_file.py"]}})


@EXPERT_KINDS.register("bad_kind")
class BadKind(ExpertKind):
    def forward(self, x_TD, gates_TZ):
        return x_TD[:1]


@ROUTERS.register("bad_router")
class BadRouter(LinearRouter):
    def project(self, x_TD):
        return super().project(x_TD)[:, :-1]


BALANCE_RULES.register("bad_rule")(lambda *, probs_TE, selection_share_E, cfg: probs_TE.mean(dim=0))
BALANCE_RULES.register("number_rule")(lambda *, probs_TE, selection_share_E, cfg: 0.5)
GATE_NORMALIZATIONS.register("bad_gates")(lambda logits_TE, cfg: Gates(logits_TE, *reversed(logits_TE.topk(1))))
GATE_NORMALIZATIONS.register("tuple_gates")(lambda logits_TE, cfg: tuple(logits_TE.topk(2)))


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        ({"extra_experts": {"bad_kind": 1}}, "expert kind bad_kind returned shape [1, 8] on cpu; return shape [5, 8]"),
        ({"router": "bad_router"}, "router bad_router returned shape [5, 3] on cpu; return shape [5, 4]"),
        ({"balance_rule": "bad_rule"}, "balance rule bad_rule returned shape [4] on cpu; return shape []"),
        ({"balance_rule": "number_rule"}, "balance rule number_rule returned 0.5; return a tensor of shape []"),
        ({"gate_normalization": "bad_gates"}, "topk_ids_TK of gate normalisation bad_gates returned shape [5, 1]"),
        ({"gate_normalization": "tuple_gates"}, "probs_TE of gate normalisation tuple_gates returned "),
    ],
)
def test_part_that_returns_something_else_is_named(moe, expected):
    layer = MoELayer(small(**moe), hidden_size=8)
    with pytest.raises(ConfigError) as error:
        layer(torch.ones(5, 8))
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no_such_module_anywhere", "./parts.py", "", ".relative", "a b", 5, None, ["x"]])
def test_plugin_that_is_no_module_is_one_line(name):
    with pytest.raises(ConfigError, match=r"runtime\.plugins names") as error:
        import_plugins({"runtime": {"plugins": [name]}})
    assert str(error.value).isprintable()


def test_command_takes_plugins_and_refuses_a_wrong_one(capsys):
    assert main(["generate", "nowhere", "--prompt", "x", "--plugin", "no_such_module_anywhere"]) == 2
    assert "--plugin names 'no_such_module_anywhere'" in capsys.readouterr().err
    assert main(["export", "nowhere", "out", "--plugin", "docs.examples.bias_router", "--plugin", "json"]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err


def stored(**moe) -> dict:
    from moepp.config import to_dict

    tree = to_dict(make_config(Setting(), Layout()))
    tree["model"]["moe"] |= moe
    return tree


def test_stored_configuration_names_the_modules_to_pass():
    tree = stored(router="not_here") | {"runtime": {"plugins": ["my_parts", "more.parts\x1b[31m"]}}
    with pytest.raises(PluginError) as error:
        from_stored(tree)
    assert "--plugin my_parts --plugin more.parts" in str(error.value) and str(error.value).isprintable()
    assert "my_parts" not in sys.modules
    with pytest.raises(PluginError, match="--plugin MODULE"):
        from_stored(stored(extra_experts={"not_here": 1}))


def test_stored_configuration_of_earlier_versions_gets_the_keys_of_today():
    tree = stored()
    assert upgrade(tree) == tree
    old = stored(triton_kernels=True)
    del old["runtime"], old["model"]["moe"]["balance_rule"], old["data"]["document_attention"]
    old["parallel"]["exchange_parts"] = old["parallel"].pop("exchange_chunks")
    old["parallel"]["exchange_parts"] = 2
    before = repr(old)
    cfg = from_stored(old)
    assert cfg.parallel.exchange_chunks == 2 and cfg.runtime.kernels == "triton"
    assert cfg.model.moe.balance_rule == "heterogeneous" and not cfg.model.moe.extra_experts
    assert repr(old) == before, "what was read is not changed"
    off = stored(triton_kernels=False)
    assert from_stored(off).runtime.kernels == "auto"


@pytest.mark.parametrize("tree", [None, [], {}, {"parallel": 1}, {"parallel": [], "model": {"moe": 3}}, "text"])
def test_stored_configuration_of_another_form_is_one_line(tree):
    with pytest.raises(ConfigError):
        from_stored(tree)


def test_unknown_option_of_a_router_is_refused():
    with pytest.raises(ConfigError, match=r"router_options\.nosuch is not an option of router=linear \(it has none\)"):
        small(router_options={"nosuch": 1.0})
    with pytest.raises(ConfigError, match="bias_update_rate"):
        small(**BIAS, router_options={"rate": 1.0})
    with pytest.raises(ConfigError, match="negative"):
        small(**BIAS, router_options={"bias_update_rate": -1.0})
    with pytest.raises(ConfigError, match="gate_normalization=none"):
        small(router="bias")


@ROUTERS.register("with_options")
class RouterWithOptions(LinearRouter):
    default_options: ClassVar = {"groups": 2, "rate": 0.5, "shared": False, "score": "softmax"}


def options_of(**given) -> dict:
    tree = {"num_ffn_experts": 2, "ffn_hidden_size": 4, "router": "with_options", "router_options": given}
    options = make_router(build(MoEConfig, tree, "model.moe"), 8).options
    again = build(MoEConfig, yaml.safe_load(yaml.safe_dump(tree | {"router_options": options})), "model.moe")
    assert typed(again.router_options) == typed(options), "as a run keeps them"
    return options


def typed(options) -> dict:
    return {name: (type(value), value) for name, value in options.items()}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"groups": 2, "rate": 0.5, "shared": False, "score": "softmax"}),
        ({"groups": 4}, {"groups": 4}),
        ({"groups": 4.0}, {"groups": 4}),
        ({"groups": -3}, {"groups": -3}),
        ({"groups": 2**62}, {"groups": 2**62}),
        ({"rate": 1}, {"rate": 1.0}),
        ({"rate": 10**17}, {"rate": 1e17}),
        ({"shared": True}, {"shared": True}),
        ({"score": "sigmoid"}, {"score": "sigmoid"}),
        ({"score": 7}, {"score": "7"}),
        ({"groups": 1, "rate": 2.5, "shared": True, "score": "x"}, {}),
    ],
)
def test_option_of_a_router_has_the_type_of_its_default(given, expected):
    found = options_of(**given)
    assert typed(found) == typed(RouterWithOptions.default_options | given | expected)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("groups", 2.5, "a whole number, as its default 2 is"),
        ("groups", 1e300, "a whole number"),
        ("groups", True, "a whole number"),
        ("groups", "four", "a whole number"),
        ("rate", "fast", "a number, as its default 0.5 is"),
        ("rate", False, "a number"),
        ("shared", 1, "true or false, as its default False is"),
        ("shared", "yes", "true or false"),
        ("score", True, "a text, as its default 'softmax' is"),
    ],
)
def test_option_of_another_type_is_one_line(name, value, wanted):
    with pytest.raises(ConfigError) as error:
        options_of(**{name: value})
    assert f"model.moe.router_options.{name}={value!r} is not {wanted}" in str(error.value)
    assert str(error.value).endswith("; give one") and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, float("nan"), float("inf")])
def test_option_that_is_no_plain_value_is_one_line(value):
    for name in RouterWithOptions.default_options:
        with pytest.raises(ConfigError, match=rf"model\.moe\.router_options\.{name}="):
            options_of(**{name: value})
    for name in ("groups", "rate"):  # built in Python
        with pytest.raises(ConfigError, match=rf"router_options\.{name}="):
            small(router="with_options", router_options={name: float("nan")})


def test_default_that_no_configuration_could_write_names_the_router(monkeypatch):
    monkeypatch.setattr(RouterWithOptions, "default_options", {"sizes": [1, 2]})
    with pytest.raises(ConfigError, match=r"router=with_options declares .*sizes with the default \[1, 2\]"):
        options_of(sizes=1)


def test_buffers_keep_fp32_in_every_precision_and_are_filled_at_the_start():
    model = model_of(small(**BIAS))
    [(name, bias)] = persistent_buffers(model)
    assert name == "layers.0.moe.router.bias"
    bias.fill_(7)
    model.to(torch.bfloat16)
    init_parameters(model, 1)
    bias = model.routers[0].bias
    assert bias.dtype == torch.float32 and not bias.any() and model.routers[0].weight.dtype == torch.bfloat16
    bias.fill_(1 + 2**-20)  # not a bf16 number
    for change in (model.half, model.double, model.float, model.bfloat16):
        assert torch.equal(change().routers[0].bias, torch.full((4,), 1 + 2**-20))


def test_parameters_start_as_their_kind_says_in_layer_and_model():
    moe = small(extra_experts={"scale": 2})
    assert torch.equal(MoELayer(moe, 8).zero_computation.scale.factor, torch.ones(2, 8))
    model = model_of(moe)
    init_parameters(model, 1)
    assert torch.equal(model.layers[0].moe.zero_computation.scale.factor, torch.ones(2, 8))


class Forgetful(LinearRouter):
    def make_parameters(self, hidden_size: int) -> None:
        super().make_parameters(hidden_size)
        self.register_buffer("count", torch.zeros(3))


class Complex(Forgetful):
    def make_parameters(self, hidden_size: int) -> None:
        super().make_parameters(hidden_size)
        self.register_buffer("count", torch.zeros(3, dtype=torch.complex64))

    def reset_buffers(self) -> None:
        self.count.zero_()


class Misnamed(ExpertKind):
    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__(num_experts, hidden_size)
        self.experts = nn.Linear(hidden_size, 1)

    def forward(self, x_TD, gates_TZ):
        return x_TD


@pytest.mark.parametrize(
    ("registry", "part", "words"),
    [(ROUTERS, Forgetful, "no reset_buffers"), (ROUTERS, Complex, "complex64"), (EXPERT_KINDS, Misnamed, "`experts`")],
)
def test_part_that_no_checkpoint_could_hold_is_refused_when_it_is_built(registry, part, words, monkeypatch):
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    registry.register("faulty")(part)
    moe = small(router="faulty") if registry is ROUTERS else small(extra_experts={"faulty": 1})
    with pytest.raises(ConfigError, match=words):
        init_parameters(model_of(moe), 1)


def test_page_shows_the_files_and_every_file_is_on_it():
    page = (ROOT / "docs/extending.md").read_text()
    shown = dict(re.findall(r'```python title="(docs/examples/\w+\.py)"\n(.*?)```', page, re.DOTALL))
    files = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "docs/examples").glob("*.py")}
    assert shown == files
