"""What a model folder contains, inspected without opening a tensor or using the network.

Owns the question what ``model.path`` points to - a folder, the local hub cache, or a hub name that only a download can
check - and whether it can be loaded. Never imports torch or transformers. Called by ``preflight`` and ``session``.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.config import Config, ModelConfig
from rlpost.config.locations import SCHEME, resolve_path
from rlpost.errors import ConfigError, ModelError, explain

NEEDED_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """``folder`` is None for a hub name that is not in the local cache; ``shape`` is None if it is unknown."""

    folder: Path | None
    shape: Mapping[str, Any] | None


def find_model(model: ModelConfig) -> ModelFiles:
    """The model's folder and shape. Raises ModelError, early, for anything visibly missing or broken."""
    if not model.path:
        raise ModelError("model.path: not set; expected a folder, a hub name, or rlpost://NAME; set model.path")
    folder = find_local_folder(model.path, model.revision)
    if folder is None:
        return ModelFiles(folder=None, shape=model.shape)
    shape = _read_json(folder / "config.json")
    check_weights(folder)
    return ModelFiles(folder=folder, shape=shape)


def check_shape(shape: Mapping[str, Any], origin: str) -> None:
    missing = [key for key in NEEDED_KEYS if key not in shape]
    if missing:
        raise ModelError(explain(origin, f"no {', '.join(missing)}", "the keys of config.json", "add them"))
    for key in NEEDED_KEYS:
        if not isinstance(shape[key], int) or shape[key] < 1:
            raise ModelError(explain(f"{origin}: {key}", shape[key], "a whole number above 0", "fix it"))


def check_weights(folder: Path, key: str = "model.path") -> None:
    """Raises ModelError unless every weight file that the folder contains or its index names is there and complete."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        expected = "*.safetensors or pytorch_model*.bin"
        do = "the folder has no weights; complete the download"
        raise ModelError(explain(key, str(folder), expected, do))
    for index in folder.glob("*.index.json"):
        named = set(_read_json(index).get("weight_map", {}).values())
        missing = sorted(name for name in named if not (folder / name).is_file())
        if missing:
            raise ModelError(explain(str(index), f"no {missing[0]}", "every file it names", "complete the download"))
    for file in files:
        if file.suffix == ".safetensors":
            _check_safetensors(file)


def find_tokenizer_json(folder: Path) -> Path | None:
    """tokenizer.json, None if the folder has a tokenizer in an older form; ModelError if it has none."""
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    others = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / name).is_file() for name in others):
        do = "the folder has no tokenizer; copy it there"
        raise ModelError(explain("model.path", str(folder), "tokenizer.json", do))
    return None


def read_optional_json(path: Path) -> dict[str, Any]:
    """A JSON file that a model folder may lack; empty where it is missing or no object. Raises ModelError if broken."""
    loaded = _parse(path) if path.is_file() else {}
    return loaded if isinstance(loaded, dict) else {}


def is_offline() -> bool:
    values = [os.environ.get(name, "").upper() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")]
    return any(value in ("1", "ON", "YES", "TRUE") for value in values)


def find_model_folder(cfg: Config) -> str:
    """A local folder with the model: as given, shipped with the package, or downloaded from the hub to its cache."""
    return fetch_folder(cfg.model.path, cfg.model.revision)


def fetch_folder(given: str, revision: str | None, key: str = "model.path") -> str:
    """The same for any path or hub name, the value of ``key``."""
    path = resolve_path(given)
    if Path(path).is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(
            path,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.jinja"],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            explain(
                key,
                given,
                "a local folder or a model on the hub",
                f"{reason}; check name and network",
            )
        ) from None


def find_stop_tokens(cfg: Config, tokenizer: Any, model_folder: Path) -> tuple[int, ...]:
    """The tokens that end a response: the tokenizer's end token, the model's end tokens, and the recipe's own."""
    ids = {*cfg.rollout.stop_token_ids, *read_end_tokens(model_folder)}
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    check_stop_tokens(ids)
    return tuple(sorted(ids))


def check_stop_tokens(ids: Collection[int]) -> None:
    if not ids:
        expected = "an end token in the tokenizer, generation_config.json or config.json"
        raise ConfigError(explain("stop tokens", "none", expected, "set rollout.stop_token_ids"))


def read_end_tokens(folder: Path) -> tuple[int, ...]:
    """``eos_token_id`` of generation_config.json or, where that is missing or names none, of config.json.

    Raises ModelError for ids that are no ids of the model's vocabulary.
    """
    shape: Mapping[str, Any] = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    generation: Mapping[str, Any] = {}
    if (folder / "generation_config.json").is_file():
        generation = _read_json(folder / "generation_config.json")
    file, value = "generation_config.json", generation.get("eos_token_id")
    if value is None:
        file, value = "config.json", shape.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    size = shape.get("vocab_size")
    below = size if isinstance(size, int) else float("inf")
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < below for i in ids):
        expected = "a token id or a list of them" + ("" if size is None else f", each from 0 to {below - 1}")
        raise ModelError(explain(f"{folder / file}: eos_token_id", value, expected, "fix it, or take it out"))
    return tuple(ids)


def find_local_folder(given: str, revision: str | None, key: str = "model.path") -> Path | None:
    """The folder of a path or, from the local cache, of a hub name; None for one that only a download can find.

    Raises ModelError, about the value of ``key``, for a path where no folder is.
    """
    path = Path(resolve_path(given))
    if path.is_dir():
        return path
    if _looks_like_a_hub_name(given) and not path.exists():
        cached = _find_in_cache(given, revision or "main")
        if cached is None and is_offline():
            expected = "a model in the local cache while HF_HUB_OFFLINE is set"
            raise ModelError(explain(key, given, expected, "download it first, or unset HF_HUB_OFFLINE"))
        return cached
    what = "a file" if path.is_file() else "nothing there"
    do = "check the path; a hub name is ORG/NAME"
    raise ModelError(explain(key, f"{given} ({what})", "a model folder", do))


def _looks_like_a_hub_name(path: str) -> bool:
    """ORG/NAME, and not a path below an existing folder."""
    organisation, _, name = path.partition("/")
    if path.startswith((".", "~", "/", SCHEME)) or not organisation or not name or "/" in name:
        return False
    return not Path(organisation).is_dir()


def _find_in_cache(name: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    # A cache may hold only the config (the model was inspected, or a download broke off): then a download decides.
    return folder if list(folder.glob("*.safetensors")) or list(folder.glob("*.bin")) else None


def _check_safetensors(file: Path) -> None:
    """Compares the header's sizes with the file's: reveals a truncated download or a git-lfs pointer."""
    size = file.stat().st_size
    problem = f"{size} bytes, which is not a safetensors file (a truncated download or a git-lfs pointer?)"
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ModelError(explain(str(file), problem, "complete weights", "download it again"))
        try:
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(explain(str(file), problem, "complete weights", "download it again")) from None
    whole = 8 + length + max(ends, default=0)
    if whole != size:
        raise ModelError(explain(str(file), f"{size} bytes", f"{whole}", "the file is truncated; download it again"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = _parse(path)
    except FileNotFoundError:
        message = explain("model.path", str(path.parent), path.name, "the folder lacks it; check the path")
        raise ModelError(message) from None
    if not isinstance(loaded, dict):
        raise ModelError(explain(str(path), type(loaded).__name__, "a JSON object", "fix the file"))
    return loaded


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {' '.join(str(error).split())}; fix the file") from None
