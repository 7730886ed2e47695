"""From files to weights: the cache, and errors that say what to do."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from hubpeer.errors import SettingsError
from hubpeer.model.load import load_weights, quantize_rows, read_shape
from hubpeer.model.prompt import Words, read_layout


def one_matrix(folder: Path, cache: Path | None) -> torch.Tensor:
    weights = load_weights(folder, "int8", cache)
    x = torch.randn(3, weights.shape.hidden, generator=torch.Generator().manual_seed(0))
    return weights.layers[0].qkv(x)


def test_quantized_rows_are_near() -> None:
    block = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    block[7] = 0
    whole, scales = quantize_rows(block.clone())
    assert whole.dtype is torch.int8
    assert (whole * scales[:, None] - block).abs().max() <= scales.max() / 2 + 1e-6
    assert whole[7].abs().max() == 0


def test_the_cache_gives_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    plain = one_matrix(tiny, None)
    assert torch.equal(one_matrix(tiny, tmp_path), plain)
    [kept] = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    assert torch.equal(one_matrix(tiny, tmp_path), plain)
    assert kept.stat().st_mtime_ns == written, "the second start reads it"


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_cache_is_made_again(tiny: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    plain = one_matrix(tiny, tmp_path)
    [kept] = tmp_path.iterdir()
    raw = bytearray(kept.read_bytes())
    raw[len(raw) // 2] ^= 0x40
    kept.write_bytes({"flip": bytes(raw), "cut": bytes(raw[:-100]), "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(one_matrix(tiny, tmp_path), plain)
    assert "made again" in caplog.text
    assert torch.equal(one_matrix(tiny, tmp_path), plain)


def test_other_weights_get_another_cache(tiny: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one_matrix(tiny, cache)
    other = shutil.copytree(tiny, tmp_path / "other")
    file = other / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1000:] = bytes(1000)
    file.write_bytes(raw)
    one_matrix(other, cache)
    assert len(list(cache.iterdir())) == 2


def broken(folder: Path, what: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    match what:
        case "no config":
            (folder / "config.json").unlink()
        case "not a llama":
            config["model_type"] = "bert"
        case "bias":
            config["attention_bias"] = True
        case "rope":
            config["rope_scaling"] = {"rope_type": "yarn"}
        case "no weights":
            weights.unlink()
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:-5000])
        case "no safetensors":
            weights.write_bytes(b"PK" * 100)
        case "other shape":
            config["intermediate_size"] = 128
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "bad tokenizer":
            (folder / "tokenizer.json").write_text('{"version": 7}')
        case "no stop":
            del config["eos_token_id"]
            (folder / "generation_config.json").unlink()
    if (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("no config", "config.json is missing"),
        ("not a llama", "'bert'"),
        ("bias", "attention_bias"),
        ("rope", "'llama3'"),
        ("no weights", "safetensors format"),
        ("cut weights", "download it again"),
        ("no safetensors", "not a safetensors file"),
        ("other shape", "after config.json"),
        ("no tokenizer", "tokenizer.json cannot be read"),
        ("bad tokenizer", "not a tokenizer"),
        ("no stop", "eos_token_id"),
    ],
)
def test_what_cannot_be_loaded_says_why(tiny: Path, tmp_path: Path, what: str, says: str) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    broken(folder, what)
    with pytest.raises(SettingsError, match=says):
        Words(folder, read_shape(folder))
        load_weights(folder, "fp32")


def test_a_layout_must_suit_the_tokenizer(words: Words, tmp_path: Path) -> None:
    from importlib import resources

    shipped = (resources.files("hubpeer.model") / "layouts" / "llama3.toml").read_text("utf-8")
    other = tmp_path / "other.toml"
    other.write_text(shipped.replace("<|eot_id|>", "<|im_end|>"))
    with pytest.raises(SettingsError, match="does not suit"):
        read_layout(str(other), words)
    other.write_text(shipped.replace("task_tokens = 24", 'task_tokens = "many"'))
    with pytest.raises(SettingsError, match="task_tokens"):
        read_layout(str(other), words)
    with pytest.raises(SettingsError, match="no such layout"):
        read_layout("nobody-has-this", words)
