"""transformers reads a model's files as this package does, or the difference is reported in one
sentence.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_real.config import ModelConfig
from megatron_real.rollout.engines.tokenizer import eos_ids, load_tokenizer
from megatron_real.weights import WeightsError
from megatron_real.weights.by_transformers import load_model, new_model

ModelMaker = Callable[..., Path]


@pytest.fixture
def model(tiny_model: ModelMaker, tmp_path: Path) -> Path:
    path = tiny_model("qwen2", dtype="bfloat16", num_hidden_layers=2)
    return Path(shutil.copytree(path, tmp_path / "model"))


def with_values(directory: Path, name: str, **values: Any) -> Path:
    file = directory / name
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | values))
    return directory


def test_a_config_that_transformers_rejects_is_one_sentence(model: Path) -> None:
    with_values(model, "config.json", use_cache="perhaps")
    for load in (load_model, new_model):
        with pytest.raises(WeightsError, match=r"transformers [\d.]+ cannot load the") as error:
            load(model, torch.float32)
        assert "\n" not in str(error.value)


def test_another_rotary_embedding_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4 ignores rope_parameters and uses its default base."""
    load_model(model, torch.float32)
    with_values(model, "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    load_model(model, torch.bfloat16)
    read = transformers.AutoConfig.from_pretrained

    def as_version_4(*arguments: Any, **options: Any) -> Any:
        config = read(*arguments, **options)
        config.rope_parameters["rope_theta"] = 10000.0
        return config

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", as_version_4)
    with pytest.raises(WeightsError, match="does not read the rotary embedding"):
        new_model(model, torch.float32)


def test_models_load_after_the_cpu_room_was_entered(model: Path) -> None:
    """In a new process, because torch must not have seen `with torch.device` before its
    constructors are wrapped.
    """
    program = """
import sys, torch
from megatron_real.parallel import cpu
cpu.enable()
with torch.device("meta"):
    made = [torch.tensor([1.0]), torch.zeros(1), torch.empty(1), torch.full((1,), 2.0)]
assert [tensor.device.type for tensor in made] == ["meta"] * 4, made
from megatron_real.weights.by_transformers import load_model
load_model(sys.argv[1], torch.float32)
"""
    completed = subprocess.run(
        [sys.executable, "-c", program, str(model)], capture_output=True, text=True, timeout=300
    )
    assert completed.returncode == 0, completed.stderr


def digits_together(directory: Path, pre_tokenizer: Any) -> Path:
    """Makes a tokenizer of bytes with one merge, "19", which a pre-tokenizer may keep apart."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|end|>", *alphabet, "19"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("1", "9")]))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", unk_token="<|end|>"
    ).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_texts_are_cut_as_tokenizer_json_says(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """transformers may read "1999" as four tokens where the file gives three: "19", "9" and "9"."""
    digits_together(model, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    with_values(model, "tokenizer_config.json", tokenizer_class=kind, chat_template="{{ 1 }}")
    config = ModelConfig(path=str(model))
    tokenizer = load_tokenizer(config)

    assert len(tokenizer.encode("1999", add_special_tokens=False)) == 3
    assert tokenizer.decode(tokenizer.encode("In 1999", add_special_tokens=False)) == "In 1999"
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|end|>", "{{ 1 }}")

    otherwise = load_tokenizer(config)
    otherwise.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    caplog.clear()
    read_otherwise = classmethod(lambda *_, **__: otherwise)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", read_otherwise)

    assert len(load_tokenizer(config).encode("1999", add_special_tokens=False)) == 3
    assert "cuts 'In 1999, " in caplog.text and "taken as it is" in caplog.text

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", read_otherwise)
    with pytest.raises(WeightsError, match=r"cuts 'In 1999, .* take another version"):
        load_tokenizer(config)


def test_a_tokenizer_that_cannot_be_read_is_one_sentence(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"cannot load the tokenizer|is not a tokenizer"):
        load_tokenizer(ModelConfig(path=str(model)))


def test_end_of_sequence_tokens_come_from_the_generation_config_first(model: Path) -> None:
    """Without generation_config.json those of config.json count, as in transformers."""
    (model / "generation_config.json").unlink(missing_ok=True)
    with_values(model, "config.json", eos_token_id=[7, 9])
    assert eos_ids(str(model), 5) == [5, 7, 9]
    assert eos_ids(str(model), None) == [7, 9]

    with_values(model, "generation_config.json", eos_token_id=11)
    assert eos_ids(str(model), 5) == [5, 11]

    with_values(model, "generation_config.json", eos_token_id="</s>")
    with pytest.raises(WeightsError, match="no token numbers"):
        eos_ids(str(model), 5)

    (model / "generation_config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"generation_config.json is not JSON"):
        eos_ids(str(model), 5)

    (model / "generation_config.json").write_text("{}")
    with pytest.raises(WeightsError, match="names an end-of-sequence token"):
        eos_ids(str(model), None)
