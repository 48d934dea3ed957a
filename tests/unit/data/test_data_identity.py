"""A run knows its data by content: they may move, and nothing else may take their place."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from moepp import checkpoint
from moepp.checkpoint.format import checkpoint_name
from moepp.config import Config, to_dict
from moepp.data import check_data, open_corpora, vocabulary_remarks
from moepp.data.prepare.pipeline import PrepareOptions, prepare
from moepp.data.prepare.readers import ReadOptions
from moepp.errors import CheckpointError, DataError
from tests.checkpoint_cases import make_info
from tests.data_files import make_config, write_word_tokenizer

SUFFIXES = (".bin", ".idx", ".json")


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return write_word_tokenizer(tmp_path / "tokenizer.json", 30)


def prepared(prefix: Path, tokenizer: str, first: int, eod: str | None = None) -> str:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(f"w{(first + i + k) % 30}" for i in range(12)) for k in range(20)]
    prefix.with_suffix(".txt").write_text("\n".join(lines))
    options = PrepareOptions(
        str(prefix), tokenizer, read=ReadOptions(text_unit="line"), eod_token=eod, max_lost_share=1.0, progress=False
    )
    prepare([str(prefix.with_suffix(".txt"))], options)
    return str(prefix)


def moved(prefix: str, folder: Path, *suffixes: str) -> str:
    folder.mkdir(exist_ok=True)
    for suffix in suffixes or SUFFIXES:
        shutil.copyfile(prefix + suffix, folder / (Path(prefix).name + suffix))
    return str(folder / Path(prefix).name)


def save(cfg: Config, checkpoints: Path, *, step: int = 3, old: bool = False) -> Path:
    """An info.json as a run with ``cfg`` writes it; ``old``: by a version that kept less."""
    facts = (None, None)
    if step and not old:
        vocabulary = open_corpora(cfg).vocabulary
        facts = (vocabulary.eod_id, vocabulary.tokenizer_sha256)
    info = make_info(step, 10, config=to_dict(cfg))
    state = replace(info.run_state, data=open_corpora(cfg).identity if step else {})
    info = replace(info, run_state=state, eod_id=facts[0], tokenizer_sha256=facts[1])
    tree = asdict(info)
    if old:
        del tree["eod_id"], tree["tokenizer_sha256"]
    folder = checkpoints / checkpoint_name(step)
    folder.mkdir(parents=True)
    (folder / "info.json").write_text(json.dumps(tree))
    return checkpoints


def continues_same_data(cfg: Config, checkpoints: Path) -> bool:
    return checkpoint.continues_same_data(cfg, checkpoints, open_corpora(cfg).differences)


def remarks(cfg: Config) -> list[str]:
    return vocabulary_remarks(cfg, open_corpora(cfg).vocabulary)


@pytest.fixture
def run(tmp_path: Path, tokenizer: str) -> tuple[Config, Path]:
    a, b = prepared(tmp_path / "data" / "a", tokenizer, 0), prepared(tmp_path / "data" / "b", tokenizer, 5)
    cfg = make_config([a, b], model__vocab_size=32)
    return cfg, save(cfg, tmp_path / "checkpoints")


def with_paths(cfg: Config, *paths: str, tokenizer: str | None = None) -> Config:
    return replace(cfg, data=replace(cfg.data, paths=paths, tokenizer=tokenizer))


def test_data_may_move(run: tuple[Config, Path], tmp_path: Path) -> None:
    cfg, checkpoints = run
    here = [moved(path, tmp_path / "elsewhere") for path in cfg.data.paths]
    assert continues_same_data(with_paths(cfg, *here), checkpoints)
    assert continues_same_data(with_paths(cfg, cfg.data.paths[0], here[1]), checkpoints)


def test_order_and_number_of_data_count(run: tuple[Config, Path]) -> None:
    cfg, checkpoints = run
    a, b = cfg.data.paths
    for paths in ((b, a), (a,), (a, a), (a, b, b)):
        with pytest.raises(CheckpointError, match="belongs to another run") as caught:
            continues_same_data(with_paths(cfg, *paths), checkpoints)
        assert "\n  data.paths: " in str(caught.value)


@pytest.mark.parametrize("place", ["same", "other"])
def test_other_content_is_refused_by_name(run: tuple[Config, Path], tmp_path: Path, tokenizer: str, place: str) -> None:
    cfg, checkpoints = run
    a, b = cfg.data.paths
    other = prepared(tmp_path / "other" / "b", tokenizer, 6)  # as many documents and tokens
    if place == "same":
        other = moved(other, Path(b).parent)
    with pytest.raises(CheckpointError) as caught:
        continues_same_data(with_paths(cfg, a, other), checkpoints)
    shown = b if place == "same" else f"{b} -> {other}"
    assert f"data.paths: {shown}: content " in str(caught.value)
    assert "lengths" not in str(caught.value)


def test_a_copy_without_its_manifest_is_recognised(run: tuple[Config, Path], tmp_path: Path, tokenizer: str) -> None:
    cfg, checkpoints = run
    a, b = cfg.data.paths
    bare = moved(b, tmp_path / "bare", ".bin", ".idx")
    assert continues_same_data(with_paths(cfg, a, bare), checkpoints)
    other = moved(prepared(tmp_path / "other" / "b", tokenizer, 6), tmp_path / "bare2", ".bin", ".idx")
    with pytest.raises(CheckpointError, match="content"):
        continues_same_data(with_paths(cfg, a, other), checkpoints)
    started_bare = save(with_paths(cfg, a, bare), tmp_path / "second")
    assert continues_same_data(cfg, started_bare)


def test_a_tokenizer_may_be_named_later(run: tuple[Config, Path], tmp_path: Path, tokenizer: str) -> None:
    cfg, checkpoints = run
    named = with_paths(cfg, *cfg.data.paths, tokenizer=tokenizer)
    check_data(named)
    assert continues_same_data(named, checkpoints)
    copy = shutil.copyfile(tokenizer, tmp_path / "copy.json")
    assert continues_same_data(with_paths(cfg, *cfg.data.paths, tokenizer=str(copy)), checkpoints)
    other = write_word_tokenizer(tmp_path / "other.json", 29)
    with pytest.raises(DataError, match="is not the one that"):
        check_data(with_paths(cfg, *cfg.data.paths, tokenizer=other))


def test_without_manifests_the_tokenizer_is_compared_by_content(
    run: tuple[Config, Path], tmp_path: Path, tokenizer: str
) -> None:
    cfg, _ = run
    bare = [moved(path, tmp_path / "bare", ".bin", ".idx") for path in cfg.data.paths]
    checkpoints = save(with_paths(cfg, *bare, tokenizer=tokenizer), tmp_path / "bare-run")
    copy = shutil.copyfile(tokenizer, tmp_path / "copy.json")
    assert continues_same_data(with_paths(cfg, *bare, tokenizer=str(copy)), checkpoints)
    other = write_word_tokenizer(tmp_path / "other.json", 29)
    with pytest.raises(CheckpointError, match=r"data\.tokenizer: tokenizer_sha256 \w+ -> \w+"):
        continues_same_data(with_paths(cfg, *bare, tokenizer=other), checkpoints)
    before = save(with_paths(cfg, *bare, tokenizer=tokenizer), tmp_path / "old-run", old=True)
    with pytest.raises(CheckpointError, match=rf"data\.tokenizer: {tokenizer} -> {other}"):
        continues_same_data(with_paths(cfg, *bare, tokenizer=other), before)


def test_other_ends_of_documents_are_refused(run: tuple[Config, Path], tmp_path: Path) -> None:
    cfg, checkpoints = run
    here = [moved(path, tmp_path / "elsewhere") for path in cfg.data.paths]
    for path in here:
        manifest = Path(f"{path}.json")
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"eod_id": 4}))
    with pytest.raises(CheckpointError, match=r"data\.paths: eod_id 31 -> 4"):
        continues_same_data(with_paths(cfg, *here), checkpoints)


def test_older_checkpoints_and_imports_are_continued(run: tuple[Config, Path], tmp_path: Path) -> None:
    cfg, _ = run
    assert continues_same_data(cfg, save(cfg, tmp_path / "old", old=True))
    imported = save(with_paths(cfg, "nowhere"), tmp_path / "imported", step=0)
    assert continues_same_data(cfg, imported)  # nothing was trained on
    assert not continues_same_data(cfg, tmp_path / "none")


def test_blended_data_that_end_differently_are_refused(tmp_path: Path, tokenizer: str) -> None:
    a, b = prepared(tmp_path / "a", tokenizer, 0), prepared(tmp_path / "b", tokenizer, 5, eod="w3")
    with pytest.raises(DataError) as caught:
        check_data(make_config([a, b], model__vocab_size=32))
    assert f"{a} (id 31) and {b} (id 3) end their documents with different tokens" in str(caught.value)


def test_a_vocabulary_that_is_mostly_unused_is_remarked(run: tuple[Config, Path]) -> None:
    cfg, _ = run
    assert remarks(replace(cfg, model=replace(cfg.model, vocab_size=128))) == []
    (remark,) = remarks(replace(cfg, model=replace(cfg.model, vocab_size=8192)))
    assert remark.startswith("model.vocab_size is 8,192 and the tokenizer has 32 tokens: the other 8,160 rows")
    assert "model.vocab_size=128 is enough" in remark


def test_an_end_that_is_only_guessed_is_remarked(run: tuple[Config, Path], tmp_path: Path, tokenizer: str) -> None:
    cfg, _ = run
    bare = [moved(path, tmp_path / "bare", ".bin", ".idx") for path in cfg.data.paths]
    (remark,) = remarks(with_paths(cfg, *bare, tokenizer=tokenizer))
    assert "<|endoftext|> (id 31) is taken by its name" in remark
    assert open_corpora(with_paths(cfg, *bare, tokenizer=tokenizer)).vocabulary.eod_id is None
