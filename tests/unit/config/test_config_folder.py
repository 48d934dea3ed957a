"""Which folder of configurations counts: the link in a checkout, what copying makes of it, a wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moepp.config import configs_folder
from moepp.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout's files as far as they matter, with the link."""
    for name in ("train.py", "pyproject.toml"):
        (tmp_path / name).touch()
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "moepp").mkdir()
    (tmp_path / "moepp/configs").symlink_to("../configs")
    return tmp_path


def lose_link(checkout: Path) -> None:
    """What `cp -rL`, or an archive without links, does."""
    (checkout / "moepp/configs").unlink()
    shutil.copytree(checkout / "configs", checkout / "moepp/configs")


def test_edits_to_configs_count_in_a_checkout(checkout):
    assert configs_folder(checkout / "moepp") == checkout / "configs"


@pytest.mark.parametrize("edited", ["configs", "moepp/configs"])
@pytest.mark.parametrize("change", ["edit", "add", "remove"])
def test_two_folders_that_differ_are_refused_whichever_was_edited(checkout, edited, change):
    lose_link(checkout)
    assert configs_folder(checkout / "moepp") == checkout / "configs", "two equal folders are as good as a link"
    file = checkout / edited / "model/tiny.yaml"
    if change == "edit":
        file.write_text(file.read_text() + "num_layers: 3\n")
    elif change == "add":
        (file := file.with_name("mine.yaml")).write_text("num_layers: 3\n")
    else:
        file.unlink()
    with pytest.raises(ConfigError, match=f"differ in model/{file.name}, .*; keep one: rm -r .* && ln -s "):
        configs_folder(checkout / "moepp")


def test_the_remedy_of_the_message_works(checkout):
    lose_link(checkout)
    (checkout / "configs/model/mine.yaml").write_text("num_layers: 3\n")
    with pytest.raises(ConfigError) as caught:
        configs_folder(checkout / "moepp")
    subprocess.run(str(caught.value).split("keep one: ")[1], shell=True, check=True)
    assert (configs_folder(checkout / "moepp") / "model/mine.yaml").is_file()
    assert (checkout / "moepp/configs/model/mine.yaml").is_file()


def test_a_link_that_became_a_text_file_or_nothing_does_not_matter(checkout):
    (checkout / "moepp/configs").unlink()
    assert configs_folder(checkout / "moepp") == checkout / "configs"
    (checkout / "moepp/configs").write_text("../configs")  # git without symbolic links
    assert configs_folder(checkout / "moepp") == checkout / "configs"


def test_an_installed_package_has_its_own_folder_whatever_lies_beside_it(checkout):
    lose_link(checkout)
    (checkout / "train.py").unlink()  # site-packages
    (checkout / "configs/config.yaml").write_text("another package's")
    assert configs_folder(checkout / "moepp") == checkout / "moepp/configs"


def test_training_reads_the_edited_file_of_a_copied_checkout(tmp_path):
    """The whole way from the command line, in a copy that followed links."""
    for name in ("train.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("configs", "moepp"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "train.py", "--cfg", "job"]
    for folder, expected in (("moepp/configs", "differ in model/tiny.yaml"), ("configs", "num_layers: 3\n")):
        file = tmp_path / folder / "model/tiny.yaml"
        file.write_text(file.read_text().replace("num_layers: 4", "num_layers: 3"))
        done = subprocess.run(command, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True)
        assert done.returncode == (2 if folder == "moepp/configs" else 0)
        assert expected in done.stdout + done.stderr
