"""`moepp generate`: runs, checkpoints and folders continue a prompt; text comes piece by piece."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from moepp.cli.generate import continuation
from moepp.cli.main import main
from moepp.data.tokenizer import Tokenizer
from moepp.interop import official
from moepp.model import generate
from moepp.model.generate import Sampling
from tests.data_files import write_word_tokenizer
from tests.evaluation_cases import tiny_config, tiny_model, write_byte_tokenizer
from tests.official_cases import released_config, released_tensors, write_released

PROMPT = "w3 w7 w1"
FLAGS = {"vocab_size": 40, "pad_token_id": "absent", "num_experts": [8]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = released_config(**FLAGS)
    out = write_released(tmp_path_factory.mktemp("generate") / "released", config, released_tensors(config))
    write_word_tokenizer(out / "tokenizer.json", 38)
    return out


def expected_text(folder: Path, count: int) -> str:
    model = official.load_pretrained(folder)
    tokenizer = Tokenizer(str(folder / "tokenizer.json"))
    out = generate(model.transformer, torch.tensor([tokenizer.encode(PROMPT)]), count, eos_id=tokenizer.eod_id)
    return tokenizer.decode(out[0].tolist())


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["generate", *arguments]) == 0
    return capsys.readouterr().out


def test_folder_and_run_and_checkpoint_continue_greedily(folder, tmp_path, capsys):
    text = expected_text(folder, 9)
    assert text.startswith(PROMPT) and len(text.split()) == 12
    options = ["--prompt", PROMPT, "--max-new-tokens", "9"]
    assert printed([str(folder), *options], capsys) == text + "\n"
    run = tmp_path / "run"
    assert main(["import", str(folder), str(run), "train.precision=fp32"]) == 0
    capsys.readouterr()
    assert printed([str(run), *options], capsys) == text + "\n"
    assert printed([str(run / "checkpoints" / "step-00000000"), *options], capsys) == text + "\n"
    assert main(["export", str(run), str(tmp_path / "own"), "--format", "moepp"]) == 0
    capsys.readouterr()
    assert printed([str(tmp_path / "own"), *options], capsys) == text + "\n"


def test_draws_depend_on_the_seed_alone(folder, capsys):
    options = [str(folder), "--prompt", PROMPT, "--max-new-tokens", "12", "--temperature", "1.5", "--top-k", "20"]
    one, again, other = (printed([*options, "--seed", seed], capsys) for seed in ("1", "1", "2"))
    assert one == again != other
    narrow = printed([*options, "--top-p", "0.001"], capsys)
    assert narrow == expected_text(folder, 12) + "\n"


def test_an_empty_prompt_starts_a_document(folder, capsys):
    assert len(printed([str(folder), "--prompt", "", "--max-new-tokens", "5"], capsys).split()) >= 1


@pytest.mark.parametrize("prompt", ["ok ", ""])
@pytest.mark.parametrize("special", [True, False])
def test_pieces_are_whole_characters_and_add_up(tmp_path, monkeypatch, special, prompt):
    tokenizer = write_byte_tokenizer(tmp_path / "tokenizer.json", special)
    model = tiny_model(tiny_config()).eval()
    wanted = [*tokenizer.encode("né ☃ 😀 yes"), tokenizer.eod_id]
    tokens = iter(wanted)
    module = importlib.import_module("moepp.model.generate")  # the package has a function of this name
    monkeypatch.setattr(module, "sample", lambda *_: torch.tensor([[next(tokens)]]))
    pieces = list(continuation(model, tokenizer, prompt, 100, Sampling(), torch.Generator()))
    assert "".join(pieces) == "né ☃ 😀 yes"
    assert "😀" in pieces and all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_experts_may_be_sharded(folder, pool_2, capsys):
    text = expected_text(folder, 9)
    outputs = pool_2.run(_generate_on_rank, str(folder))
    assert outputs == [text, text]


def _generate_on_rank(rank: int, folder: str) -> str:
    from moepp.distributed.groups import Layout, build_groups
    from moepp.evaluation.load import build_model, find_model, open_tokenizer

    found = find_model(folder)
    tokenizer = open_tokenizer(found, None)
    model = build_model(found, build_groups(Layout(2, expert=2), torch.device("cpu")))
    assert model.layers[0].moe.experts.down_proj.shape[0] == 2  # of 4
    return PROMPT + "".join(continuation(model, tokenizer, PROMPT, 9, Sampling(), torch.Generator()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k", "5"], "--temperature above 0"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--temperature", "1", "--top-p", "2"], "top_p=2.0"),
        (["--max-new-tokens", "0"], "--max-new-tokens=0"),
        (["--expert-parallel", "2"], "parallel.expert=2 does not divide"),
        (["--tokenizer", "nowhere.json"], "nowhere.json does not exist"),
    ],
)
def test_bad_options_are_one_line(folder, capsys, options, message):
    assert main(["generate", str(folder), "--prompt", PROMPT, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_no_tokenizer_and_no_model_are_one_line(folder, tmp_path, capsys):
    config = released_config(**FLAGS)
    bare = write_released(tmp_path / "bare", config, released_tensors(config))
    assert main(["generate", str(bare), "--prompt", "x"]) == 2
    assert "names no tokenizer" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "nowhere"), "--prompt", "x"]) == 2
    assert "is not a folder" in capsys.readouterr().err
    large = write_word_tokenizer(tmp_path / "large.json", 500)
    assert main(["generate", str(folder), "--prompt", "x", "--tokenizer", large]) == 2
    assert "has 502 tokens, but the model knows 40" in capsys.readouterr().err
