"""One run from its data to its exports: every command uses the tokens that training saw."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moepp.checkpoint import read_info
from moepp.cli.main import main
from moepp.data.prepare.pipeline import PrepareOptions, prepare
from moepp.data.prepare.readers import ReadOptions
from moepp.errors import ConfigError
from moepp.evaluation.load import find_model, open_tokenizer
from tests.train_processes import TrainServer, records

END = "<|im_end|>"  # 2; <|endoftext|> is 0 and never occurs in the data
TEXT = "the people of the government said hello to the world again"


def write_tokenizer(path: Path, begins: bool = True) -> None:
    """Byte-level BPE with several ends to choose from, which puts <|im_start|> before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    library: Any = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    options: dict[str, Any] = {"vocab_size": 300, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    options |= {"special_tokens": ["<|endoftext|>", "<|im_start|>", END], "show_progress": False}
    library.train_from_iterator([TEXT], trainers.BpeTrainer(**options))
    if begins:
        library.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", 1)]
        )
    library.save(str(path))


@pytest.fixture(scope="module")
def trained(server: TrainServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data that end with token 2, and a run of 3 steps that wrote samples."""
    folder = tmp_path_factory.mktemp("saw")
    write_tokenizer(folder / "tokenizer.json")
    (folder / "text.txt").write_text("\n".join(f"{TEXT} {i} {TEXT[: i % 30]}" for i in range(60)))
    options = PrepareOptions(
        str(folder / "text"),
        str(folder / "tokenizer.json"),
        read=ReadOptions(text_unit="line"),
        eod_token=END,
        max_lost_share=1.0,
        progress=False,
    )
    assert prepare([str(folder / "text.txt")], options).eod_id == 2
    server.train(folder / "run", 1, train_options(folder, 3))
    return folder


def train_options(folder: Path, steps: int) -> list[str]:
    paths = [f"data.paths=[{folder}/text]", f"data.tokenizer={folder}/tokenizer.json", "data.split='80,20,0'"]
    return [*paths, "engine=native", "model.vocab_size=1024", f"train.steps={steps}", "train.samples=2"]


def exported(trained: Path, folder: Path, *options: str) -> Path:
    assert main(["export", str(trained / "run"), str(folder), *options]) == 0
    return folder


def test_the_checkpoint_keeps_the_end_of_documents(trained: Path) -> None:
    info = read_info(trained / "run/checkpoints/step-00000003")
    manifest = json.loads((trained / "text.json").read_text())
    assert (info.eod_id, info.tokenizer_sha256) == (2, manifest["tokenizer_sha256"])
    log = "".join(path.read_text() for path in (trained / "run/log").iterdir())
    assert "model.vocab_size is 1,024 and the tokenizer has" in log
    assert len(json.loads((trained / "run/samples.json").read_text())) == 2


@pytest.mark.parametrize("form", ["official", "moepp"])
def test_exports_tell_it_everywhere(trained: Path, tmp_path: Path, form: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    out = exported(trained, tmp_path / "out", "--format", form)
    config = json.loads((out / "config.json").read_text())
    generation = json.loads((out / "generation_config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], generation["eos_token_id"]) == (2, 2, 2)
    assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == END
    assert f"ends with `{END}` (token 2)" in (out / "README.md").read_text()
    ours = open_tokenizer(find_model(str(trained / "run")), None)
    assert generation["suppress_tokens"] == list(range(ours.vocab_size, 1024))
    for place in (str(trained / "run"), str(trained / "run/checkpoints/step-00000003"), str(out)):
        assert open_tokenizer(find_model(place), None).eod_id == 2
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs(TEXT).input_ids == ours.encode(TEXT) and 1 not in theirs(TEXT).input_ids
    assert theirs(f"{END} said").input_ids == ours.encode(f"{END} said")


def test_generation_starts_and_stops_with_it(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moepp.cli import generate

    seen: list[tuple[list[int], int, tuple[int, ...]]] = []

    def spy(model: Any, ids: torch.Tensor, count: int, sampling: Any, *, eos_id: int, generator: Any) -> Any:
        seen.append((ids[0].tolist(), eos_id, sampling.never))
        return iter(())

    monkeypatch.setattr(generate, "stream", spy)
    assert main(["generate", str(trained / "run"), "--prompt", ""]) == 0
    assert seen[0][:2] == ([2], 2) and seen[0][2][-1] == 1023
    assert capsys.readouterr().err == ""


def test_an_end_that_contradicts_the_checkpoint_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(trained / "run")
    for command in (["generate", run, "--prompt", "x"], ["export", run, str(tmp_path / "x")]):
        assert main([*command, "--eod-token", "<|endoftext|>"]) == 2
        error = capsys.readouterr().err
        assert "--eod-token=<|endoftext|> is token 0" in error and f"end with token 2 ({END})" in error
    assert open_tokenizer(find_model(run), None, END).eod_id == 2
    with pytest.raises(ConfigError, match="leave it out"):
        open_tokenizer(find_model(run), None, "<|endoftext|>")


def test_older_checkpoints_find_it_in_their_data_or_ask(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from moepp.checkpoint.format import FileEntry, checksum, read_manifest, write_manifest

    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    checkpoint = run / "checkpoints/step-00000003"
    tree = json.loads((checkpoint / "info.json").read_text())
    del tree["eod_id"], tree["tokenizer_sha256"]

    def rewrite() -> None:
        (checkpoint / "info.json").write_text(json.dumps(tree))
        files: dict[str, FileEntry] = read_manifest(checkpoint)
        write_manifest(checkpoint, files | {"info.json": checksum(checkpoint / "info.json")})

    rewrite()
    assert open_tokenizer(find_model(str(run)), None).eod_id == 2  # the data are still there
    tree["run_state"]["data"][f"{trained}/text"]["content"] = "0" * 64  # others lie in their place
    rewrite()
    assert open_tokenizer(find_model(str(run)), None).eod_id == 0
    generate = ["generate", str(run), "--prompt", "x", "--max-new-tokens", "1"]
    assert main(generate) == 0
    assert "<|endoftext|> (id 0) is taken by its name, --eod-token names another" in capsys.readouterr().err
    assert open_tokenizer(find_model(str(run)), None, END).eod_id == 2
    assert main([*generate, "--eod-token", END]) == 0
    assert capsys.readouterr().err == ""


def test_another_tokenizer_in_its_place_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = str(trained / "run"), str(tmp_path / "other.json")
    write_tokenizer(Path(other), begins=False)  # encodes the same, and is another file
    path, kept = trained / "tokenizer.json", (trained / "tokenizer.json").read_bytes()
    path.write_bytes(Path(other).read_bytes())
    try:
        assert main(["generate", run, "--prompt", "x"]) == 2
        assert "checksums differ" in capsys.readouterr().err
    finally:
        path.write_bytes(kept)
    assert main(["generate", run, "--prompt", "x", "--max-new-tokens", "1", "--tokenizer", other]) == 0
    assert f"note: {other} is another file than the tokenizer" in capsys.readouterr().err


def test_a_run_goes_on_when_its_data_have_moved(server: TrainServer, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("text.bin", "text.idx", "text.json", "tokenizer.json"):
        shutil.copyfile(trained / name, elsewhere / name)
    run = server.train(tmp_path / "run", 1, train_options(elsewhere, 6))
    assert f"data.paths: ['{trained}/text'] -> ['{elsewhere}/text']" in run.output(0)
    shutil.copytree(trained / "run", tmp_path / "stayed")
    server.train(tmp_path / "stayed", 1, train_options(trained, 6))
    assert records(tmp_path / "run") == records(tmp_path / "stayed")

    config = (tmp_path / "run/config.yaml").read_bytes()
    (elsewhere / "text.json").unlink()
    (elsewhere / "text.bin").write_bytes((trained / "text.bin").read_bytes()[2:] + b"\x07\x00")
    failed = server.train(tmp_path / "run", 1, train_options(elsewhere, 9), exit_codes=[2])
    assert "belongs to another run" in failed.output(0) and "elsewhere/text: content" in failed.output(0)
    assert (tmp_path / "run/config.yaml").read_bytes() == config, "a refused start leaves the run as it was"
