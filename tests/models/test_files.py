"""Where model.path points and whether it can be loaded, without opening a tensor or reaching the network."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlpost.config import ModelConfig
from rlpost.errors import ModelError
from rlpost.models.files import check_shape, find_model, find_tokenizer_json

SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 10,
    "max_position_embeddings": 64,
}


@pytest.fixture
def folder(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPE))
    save_file({"w": np.zeros((2, 3), np.float32)}, model / "model.safetensors")
    return model


def find(path, **settings):
    return find_model(ModelConfig(path=str(path), **settings))


def fails(path, expected, **settings):
    with pytest.raises(ModelError) as caught:
        find(path, **settings)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_whole_folder_and_its_shape(folder):
    found = find(folder, shape={"hidden_size": 99})
    assert found.folder == folder and found.shape["hidden_size"] == 8  # the local config.json wins


@pytest.mark.parametrize("path", ["./nowhere", "../nowhere", "/nowhere/model", "nowhere", "~/nowhere", "a/b/c", ""])
def test_a_path_that_is_not_there_fails_at_once(path):
    fails(path, "nothing there" if path else "not set")


def test_below_a_folder_that_is_here_is_no_hub_name(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    fails(f"{folder.parent.name}/typo", "nothing there")


def test_a_shipped_model_that_does_not_exist():
    fails("rlpost://nosuch", "nothing there")


def test_a_file_is_no_folder(folder):
    fails(folder / "config.json", "a file")


def test_missing_parts_are_named(folder):
    (folder / "model.safetensors").rename(folder / "kept")
    fails(folder, "no weights")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert find(folder).folder == folder
    (folder / "config.json").write_text("{")
    fails(folder, "cannot be read as JSON")
    (folder / "config.json").unlink()
    fails(folder, "config.json")


def test_cut_weights_and_pointers(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (whole[:-4], whole[:20], whole[:3], b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", b""):
        weights.write_bytes(cut)
        fails(folder, "model.safetensors")
    weights.write_bytes(whole)
    find(folder)


def test_every_file_of_the_index_must_be_there(folder):
    index = {"weight_map": {"w": "model.safetensors", "v": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(folder, "model-00002-of-00002.safetensors")


def test_a_hub_name_is_left_to_the_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    found = find("some-org/some-model", shape=SHAPE)
    assert found.folder is None and found.shape == SHAPE
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails("some-org/some-model", "HF_HUB_OFFLINE")


def test_a_model_in_the_local_cache_is_used(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "hub" / "models--some-org--some-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / "abc123")
    assert find("some-org/some-model").folder == repository / "snapshots" / "abc123"
    fails("some-org/some-model", "HF_HUB_OFFLINE", revision="v2")
    (repository / "snapshots" / "abc123" / "model.safetensors").unlink()  # the config alone is no model
    fails("some-org/some-model", "HF_HUB_OFFLINE")


def test_tokenizer(folder):
    with pytest.raises(ModelError, match="no tokenizer"):
        find_tokenizer_json(folder)
    (folder / "vocab.json").write_text("{}")
    assert find_tokenizer_json(folder) is None  # an older form: only transformers can read it
    (folder / "tokenizer.json").write_text("{}")
    assert find_tokenizer_json(folder) == folder / "tokenizer.json"


def test_the_shipped_model_is_whole():
    found = find("rlpost://arithmetic")
    assert found.shape["model_type"] == "qwen3" and find_tokenizer_json(Path(found.folder))


@pytest.mark.parametrize("wrong", [0, -1, "big", None, 1.5])
def test_a_shape_is_made_of_whole_numbers(wrong):
    check_shape(SHAPE, "config.json")
    with pytest.raises(ModelError, match=r"config\.json: hidden_size: got .*; expected a whole number above 0"):
        check_shape(SHAPE | {"hidden_size": wrong}, "config.json")
