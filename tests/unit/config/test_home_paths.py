"""Paths that begin with ~, which shells leave as it is behind an equals sign."""

from __future__ import annotations

from moepp.config import from_dict, to_dict
from tests.data_files import make_config


def test_paths_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/there")
    data = {"data__validation": {"wiki": ["~/w"]}, "data__tokenizer": "~/t.json", "data__cache_dir": "~/c"}
    cfg = make_config(["~/a", "b~"], **data, init__path="~/weights")
    assert cfg.data.paths == ("/there/a", "b~") and cfg.data.validation == {"wiki": ("/there/w",)}
    assert (cfg.data.tokenizer, cfg.data.cache_dir) == ("/there/t.json", "/there/c")
    assert cfg.init.path == "/there/weights" and from_dict(to_dict(cfg)) == cfg
