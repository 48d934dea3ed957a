"""Folders of weights that somebody else has made: bounded work, one line per fault, no escapes."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moepp.cli.main import main
from moepp.errors import CheckpointError, MoeppError
from moepp.evaluation.load import find_model
from moepp.interop import hf, official
from moepp.interop.official import TokenIds
from moepp.interop.upcycle import _differences, _require_types
from moepp.interop.weights import TensorFolder, whole_parameters
from tests.evaluation_cases import tiny_config
from tests.official_cases import released_config, released_tensors


def make(folder: Path, form: str) -> Path:
    """A tiny model of the released format or of the project's own."""
    folder.mkdir()
    if form == "official":
        config = released_config()
        tensors = released_tensors(config)
    else:
        cfg = tiny_config()
        config = hf.config.hf_config(cfg, TokenIds(), "float32")
        keys = ((n if n.startswith("lm_head") else f"model.{n}", s) for n, s in whole_parameters(cfg).items())
        tensors = {key: torch.randn(shape) for key, shape in keys}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(params=["official", "moepp"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make(tmp_path / "weights", request.param)


def refused(folder: Path, match: str | None = None) -> str:
    """Finding and opening the folder ends in one line, soon."""
    start, messages = time.process_time(), []
    form = hf if "ffn_hidden_size" in (folder / "config.json").read_text(errors="replace") else official
    for action in (lambda: find_model(str(folder)), lambda: open_whole(form, folder)):
        with pytest.raises(MoeppError, match=match) as caught:
            action()
        messages.append(str(caught.value))
    assert all(message.isprintable() and len(message) < 1500 for message in messages), messages
    assert time.process_time() - start < 10
    return messages[0]


def open_whole(form: Any, folder: Path) -> None:
    form.load.open_tensors(folder, form.read_config(folder))


def set_key(folder: Path, key: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))


def test_a_whole_folder_is_read(folder: Path) -> None:
    assert find_model(str(folder)).precision == "fp32"


@pytest.mark.parametrize("value", [10**9, 10**12, 10**18, 10**38])
@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers", "experts", "width", "layers and width"])
def test_models_beyond_their_files_are_refused_before_they_are_built(folder: Path, key: str, value: int) -> None:
    is_own = "num_ffn_experts" in (folder / "config.json").read_text()
    names = {
        "experts": "num_ffn_experts" if is_own else "num_experts",
        "width": "ffn_hidden_size" if is_own else "intermediate_size",
    }
    name = names.get(key, key)
    if key == "layers and width":
        set_key(folder, "num_hidden_layers", 10**4)
        name = names["width"]
    set_key(folder, name, [value] if name == "num_experts" else value)
    refused(folder, "cannot hold|more than 10,000 layers|beyond 64 bits|is above its maximum")


def test_experts_without_weights_are_bounded_too(folder: Path) -> None:
    if "num_copy_experts" in (folder / "config.json").read_text():
        set_key(folder, "num_copy_experts", 10**9)
        refused(folder, "num_copy_experts=1000000000 is above its maximum")
        set_key(folder, "num_copy_experts", 10**5)
        set_key(folder, "num_hidden_layers", 100)
        refused(folder, "more than 10,000 layers or 1,000,000 experts")


def test_sparse_files_do_not_make_room_for_endless_layers(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(1 << 43)
    set_key(folder, "num_hidden_layers", 10**9)
    refused(folder, "num_layers=1000000000 is above its maximum 10,000|damaged")


VALUES = (None, True, "12", -1, 0, 1.5, 10**30, [], {}, "\x1b[2J", "x" * 10**5)


@pytest.mark.parametrize("form", ["official", "moepp"])
def test_values_of_every_wrong_type_are_one_line_or_right(tmp_path: Path, form: str) -> None:
    folder = make(tmp_path / "weights", form)
    whole = json.loads((folder / "config.json").read_text())
    for key in whole:
        for value in VALUES:
            (folder / "config.json").write_text(json.dumps(whole | {key: value}))
            try:
                find_model(str(folder))
            except MoeppError as error:
                assert str(error).isprintable() and len(str(error)) < 1500, key


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"[" * 10**5 + b"]" * 10**5,
        b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
        b'{"vocab_size": ' + b"9" * 5000 + b"}",
        b'{"rope_theta": NaN}',
        b'{"rope_theta": 1e999}',
        b'{"model_type": "MoE++", "model_type": "moepp"}',
        b"\xff\xfe{",
        b'{"model_type": "\\ud800"}',
        b'{"model_type": "\\u001b[2J\\u202e"}',
    ],
    ids=range(12),
)
def test_config_that_is_none_is_one_line(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    refused(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling link"])
def test_only_regular_files_are_opened(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    text = (folder / "config.json").read_text()
    path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "dangling link": lambda: path.symlink_to(folder / "nowhere"),
    }[kind]()
    for action in (lambda: find_model(str(folder)), lambda: TensorFolder(folder)):
        if name == "config.json" and action is not None and (folder / "model.safetensors").is_file():
            with pytest.raises(MoeppError):
                find_model(str(folder))
            break
        with pytest.raises(MoeppError) as caught:
            action()
        assert str(caught.value).isprintable()
    assert text


# --- index and shards


def shard(folder: Path, weight_map: Any) -> None:
    tensors = TensorFolder(folder)
    keys = sorted(tensors.shapes)
    halves = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, names in halves.items():
        save_file({key: tensors.read(key).clone() for key in names}, folder / name)
    (folder / "model.safetensors").unlink()
    place = {key: name for name, names in halves.items() for key in names}
    changed = weight_map(place) if callable(weight_map) else weight_map
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": changed}))


def test_shards_are_read(folder: Path) -> None:
    shard(folder, lambda place: place)
    assert find_model(str(folder)).precision == "fp32"


INDICES: list[Any] = [
    *(None, [], {}, "x", 1),
    *((lambda place, v=v: place | {"x": v}) for v in (None, 1, [], {}, "../a.safetensors", "/etc/passwd", "")),
    *((lambda place, v=v: place | {"x": v}) for v in ("a/b.safetensors", "a\0.safetensors", "\x1b[2J.safetensors")),
    *((lambda place, v=v: place | {"x": v}) for v in (".safetensors", "gone.safetensors", "x" * 300 + ".safetensors")),
    lambda place: place | {"\x1b[2Jghost\n": "a.safetensors"},
]


@pytest.mark.parametrize("number", range(len(INDICES)))
def test_indices_that_lie_are_refused(folder: Path, number: int) -> None:
    shard(folder, INDICES[number])
    with pytest.raises(CheckpointError) as caught:
        TensorFolder(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    shard(folder, lambda place: place)
    save_file({key: torch.ones(1) for key in json_keys(folder)}, folder / "b.safetensors")
    with pytest.raises(CheckpointError, match="that the index places elsewhere"):
        TensorFolder(folder)


def json_keys(folder: Path) -> list[str]:
    return list(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])


def header(tree: Any, data: bytes = b"") -> bytes:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor_entry(shape: Any, offsets: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 10) + b"{}",
        header(b"[" * 10**5),
        header({"x": 1}),
        header(tensor_entry([1 << 40, 1 << 40], [0, 4]), b"\0" * 4),
        header(tensor_entry([-1], [0, 4]), b"\0" * 4),
        header(tensor_entry([1], [4, 0]), b"\0" * 4),
        header(tensor_entry([2], [0, 8]), b"\0" * 4),
        header(tensor_entry([1], [0, 4], "I8"), b"\0" * 4),
        header(tensor_entry([1], [0, 1], "F8_E4M3"), b"\0"),
        header({"\x1b[2J\n": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        header({"\x1b[2J\n": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    ],
    ids=range(12),
)
def test_headers_that_lie_are_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        TensorFolder(folder)
        refused(folder)  # what can be opened does not fit the model
        raise CheckpointError("x")
    assert str(caught.value).isprintable()


# --- .bin


def overlapping() -> Any:
    return {"x": torch.ones(1).expand(10**6, 10**6)}


@pytest.mark.parametrize(
    ("make_tensors", "match"),
    [
        (overlapping, "larger than its file"),
        (lambda: {"x": torch.eye(3).to_sparse()}, "plain tensors"),
        (lambda: {"x": torch.ones(3, device="meta")}, "plain tensors|damaged"),
        (lambda: {"x": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, "plain tensors|not read"),
        (lambda: {"x": torch.ones(3, dtype=torch.int8)}, "quantised"),
        (lambda: {"x": torch.ones(3).to(torch.float8_e4m3fn)}, "quantised|damaged"),
        (lambda: {1: torch.ones(3)}, "plain tensors"),
        (lambda: {"x": [torch.ones(3)]}, "plain tensors"),
        (lambda: [torch.ones(3)], "plain tensors"),
        (lambda: Runs(), "is not read: it holds more than tensors"),
        (lambda: {"x": torch.ones(3), "y": Runs()}, "is not read: it holds more than tensors"),
    ],
    ids=range(11),
)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_bin_files_of_anything_but_tensors_are_refused(
    tmp_path: Path, make_tensors: Callable[[], Any], match: str, zipped: bool
) -> None:
    try:
        torch.save(make_tensors(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    except (RuntimeError, AttributeError, NotImplementedError):
        pytest.skip("this torch cannot even write it")
    with pytest.raises(CheckpointError, match=match) as caught:
        TensorFolder(tmp_path)
    message = str(caught.value)
    assert message.isprintable() and "weights_only" not in message and not (tmp_path / "ran").exists()


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


# --- dense


def test_dense_configs_of_every_wrong_type_are_one_line(tmp_path: Path) -> None:
    cfg = tiny_config()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    keys += ("num_key_value_heads", "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "mlp_bias")
    for key in (*keys, "tie_word_embeddings", "attention_bias"):
        for value in (*VALUES, {"factor": "x"}, {"rope_type": [], "factor": []}, {"type": "linear", "factor": None}):
            tree = json.loads(json.dumps({key: value}))
            try:
                _require_types(tmp_path, tree)
                _differences(tmp_path, tree, cfg)
            except MoeppError as error:
                assert str(error).isprintable() and len(str(error)) < 1000


def test_import_of_a_bad_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "weights", "official")
    set_key(folder, "num_hidden_layers", 10**9)
    assert main(["import", str(folder), str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [("nan", torch.bfloat16), ("inf", torch.float32), ("-inf", torch.float16), ("1e300", torch.float64)],
)
def test_numbers_that_are_not_finite_are_named(
    folder: Path, value: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
    key = sorted(tensors)[-1]
    tensors[key].view(-1)[-2] = float(value)
    save_file(tensors, folder / "model.safetensors")
    assert main(["import", str(folder), str(folder / "run")]) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and f"{key} holds 1 of" in message
    assert not any((folder / "run/checkpoints").iterdir())
