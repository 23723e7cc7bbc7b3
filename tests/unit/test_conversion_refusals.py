"""What a conversion must not lose, must not believe and must not delete; each is refused in one
sentence.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_real.cli import main
from megatron_real.conversion.convert import (
    LegacyLayout,
    check_model,
    hf_to_megatron,
    megatron_to_hf,
    open_megatron,
)
from megatron_real.conversion.inspection import describe
from megatron_real.conversion.verify import open_as_hf, verify
from megatron_real.weights import WeightsError, stream, transfer
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.hf import INDEX, SINGLE, HfWeights, has_weights, open_model, side_files
from megatron_real.weights.stream import write_hf
from megatron_real.weights.transfer import MANIFEST

ModelMaker = Callable[..., Path]
LAYERS = {"num_hidden_layers": 2}


@pytest.fixture
def source(tiny_model: ModelMaker, tmp_path: Path) -> Path:
    """Makes a model of two layers that the test may change."""
    return Path(
        shutil.copytree(tiny_model("qwen2", dtype="bfloat16", **LAYERS), tmp_path / "model")
    )


@pytest.fixture
def tied(tiny_model: ModelMaker, tmp_path: Path) -> Path:
    """Makes the same model with its embedding as output layer."""
    path = tiny_model("qwen2", dtype="bfloat16", tie_word_embeddings=True, **LAYERS)
    return Path(shutil.copytree(path, tmp_path / "tied"))


def with_config(directory: Path, **values: Any) -> Path:
    """Changes config.json of a directory, which it returns."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return directory


def with_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Changes the single file of weights of a directory, which it returns."""
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
    return directory


def changed_state(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the one file of a `torch` checkpoint of one rank."""
    (file,) = checkpoint.rglob("model_optim_rng.pt")
    state = torch.load(file, weights_only=False)
    change(state)
    torch.save(state, file)


# What may be a copy is compared before it is dropped.


@pytest.mark.parametrize("layout", [None, LegacyLayout()], ids=["torch_dist", "torch"])
def test_an_output_layer_of_its_own_is_not_dropped(
    source: Path, tied: Path, tmp_path: Path, layout: LegacyLayout | None
) -> None:
    """The checkpoint has an output layer of its own under a tied config: an export without it would
    lose it.
    """
    checkpoint = hf_to_megatron(source, tmp_path / "megatron", layout=layout).out
    with pytest.raises(WeightsError, match=r"output_layer.weight differs from model.embed_tokens"):
        megatron_to_hf(checkpoint, tmp_path / "hf", hf_config=tied)
    with pytest.raises(WeightsError, match=r"output_layer.weight differs"):
        check_model(tied, checkpoint)
    assert not (tmp_path / "hf").exists()

    def equal(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    copied = hf_to_megatron(with_tensors(source, equal), tmp_path / "copied", layout=layout).out
    exported = megatron_to_hf(copied, tmp_path / "hf", hf_config=tied).out
    assert "lm_head.weight" not in HfWeights(exported).tensors


def test_norms_of_all_tensor_parallel_ranks_are_compared(source: Path, tmp_path: Path) -> None:
    checkpoint = hf_to_megatron(source, tmp_path / "megatron", layout=LegacyLayout(tp=2)).out
    file = checkpoint / "release/mp_rank_01/model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    state["model"]["decoder.final_layernorm.weight"] += 1
    torch.save(state, file)
    with pytest.raises(WeightsError, match=r"final_layernorm.weight of mp_rank_01 differs"):
        megatron_to_hf(checkpoint, tmp_path / "hf")


def test_a_parameter_under_two_names_is_refused(source: Path, tmp_path: Path) -> None:
    checkpoint = hf_to_megatron(source, tmp_path / "megatron", layout=LegacyLayout()).out
    name = "decoder.layers.0.input_layernorm.weight"
    changed_state(checkpoint, lambda state: state["model"].update({name: torch.ones(32)}))
    with pytest.raises(WeightsError, match="has one parameter twice"):
        megatron_to_hf(checkpoint, tmp_path / "hf")


def test_rotary_buffers_are_compared_with_the_base(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """inv_freq of old Llama files is 10000^(-2i/8) for a head of size 8; one with these values is
    left out.
    """
    path = tiny_model("llama", dtype="bfloat16", **LAYERS)
    source = Path(shutil.copytree(path, tmp_path / "llama"))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001])
    with_tensors(source, lambda tensors: tensors.update({name: frequencies}))
    open_model(source)
    with_tensors(source, lambda tensors: tensors.update({name: frequencies**2}))
    with pytest.raises(WeightsError, match=r"inv_freq is of another rotary embedding"):
        open_model(source)


def test_llama3_frequencies_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(head_dim=64, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    values = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    frequencies = torch.tensor(Architecture.from_config(values).rope_frequencies)

    assert torch.allclose(frequencies, expected, rtol=1e-6)


# What convert refuses, every command refuses, in the same words.


@pytest.mark.parametrize("what", ["layers", "tied", "shape", "adapter", "link"])
def test_every_entry_point_refuses_in_the_same_words(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    if what == "layers":
        with_config(source, num_hidden_layers=1)
    elif what == "tied":
        with_config(source, tie_word_embeddings=True)
    elif what == "shape":
        with_config(source, intermediate_size=32)
    elif what == "adapter":
        (source / "adapter_config.json").write_text("{}")
    else:
        (source / "NOTICE.txt").symlink_to("/proc/self/environ")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: {source}}}\n"
        f"trainer: {{run_dir: {tmp_path / 'run'}, steps: 1}}\n"
        f"data: {{train: x.jsonl, max_prompt_tokens: 64}}\n"
        f"rollout: {{max_response_tokens: 64}}\n"
    )
    bench = tmp_path / "bench.jsonl"
    bench.write_text("{}\n")
    commands = [
        ["convert", "to-megatron", str(source), str(tmp_path / "out")],
        ["convert", "verify", str(source)],
        ["train", str(config)],
        ["eval", str(config), "--bench", f"b={bench}", "--max-tokens", "64"],
        ["plan", str(config), "--gpus", "1", "--gpu", "h100-80g"],
    ]

    sentences = []
    for words in commands:
        assert main(words) == 2, words
        sentences.append(capsys.readouterr().err)
    assert len(set(sentences)) == 1, sentences
    assert not (tmp_path / "run").exists()


def test_a_plan_needs_no_weights(source: Path) -> None:
    (source / SINGLE).unlink()
    assert not has_weights(source)
    assert check_model(source, required=False).num_layers == 2
    with pytest.raises(WeightsError, match=r"has no model.safetensors"):
        check_model(source)


# Which files are meant.


def cut(source: Path, *, index: bool) -> Path:
    """Cuts the single file of a model into two shards."""
    tensors = load_file(source / SINGLE)
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, source / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if index:
        (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return source


def test_shards_without_an_index_come_back_with_one(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    before = load_file(source / SINGLE)
    cut(source, index=False)
    (source / SINGLE).unlink()
    checkpoint = hf_to_megatron(source, tmp_path / "megatron").out
    exported = megatron_to_hf(checkpoint, tmp_path / "hf").out
    model = AutoModelForCausalLM.from_pretrained(exported, dtype="auto").state_dict()
    assert all(torch.equal(model[name], tensor) for name, tensor in before.items())


def test_a_single_file_of_another_name_comes_back_under_the_usual_one(
    source: Path, tmp_path: Path
) -> None:
    (source / SINGLE).rename(source / "weights.safetensors")
    checkpoint = hf_to_megatron(source, tmp_path / "megatron").out
    exported = megatron_to_hf(checkpoint, tmp_path / "hf").out
    assert (exported / SINGLE).read_bytes() == (source / "weights.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda source: cut(source, index=True), (SINGLE, INDEX)),
        (lambda source: both_bins(source), ("pytorch_model.bin", "model-00001-of-00002")),
    ],
    ids=["index beside single", "bin beside shards"],
)
def test_two_sets_of_weights_are_refused(
    source: Path, make: Callable[[Path], Path], names: tuple[str, ...]
) -> None:
    with pytest.raises(WeightsError, match="remove the weights that are not meant") as error:
        HfWeights(make(source))
    assert all(name in str(error.value) for name in names)


def both_bins(source: Path) -> Path:
    cut(source, index=False)
    torch.save(load_file(source / SINGLE), source / "pytorch_model.bin")
    (source / SINGLE).unlink()
    return source


def test_an_index_of_the_single_file_is_no_second_set(source: Path) -> None:
    names = load_file(source / SINGLE)
    (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    open_model(source)


def test_a_tied_file_that_kept_only_the_output_layer_is_converted(
    tied: Path, tmp_path: Path
) -> None:
    """transformers ties the embedding to it, and so does the conversion."""
    from transformers import AutoModelForCausalLM

    before = load_file(tied / SINGLE)["model.embed_tokens.weight"]

    def keep_output(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    with_tensors(tied, keep_output)
    theirs = AutoModelForCausalLM.from_pretrained(tied, dtype="auto").state_dict()
    assert torch.equal(theirs["model.embed_tokens.weight"], before)

    checkpoint = hf_to_megatron(tied, tmp_path / "megatron").out
    exported = HfWeights(megatron_to_hf(checkpoint, tmp_path / "hf").out)
    assert torch.equal(exported.read("model.embed_tokens.weight"), before)


# Side files.


def test_side_files_templates_and_code_come_along(source: Path, tmp_path: Path) -> None:
    (source / "additional_chat_templates").mkdir()
    files = {
        "additional_chat_templates/tool_use.jinja": "{{ messages }}",
        "chat_template.jinja": "{{ messages }}",
        "modeling_own.py": "from .helper import x",
        "helper.py": "x = 1",
        "LICENSE": "as you like",
    }
    for name, text in files.items():
        (source / name).write_text(text)
    (source / "tf_model.h5.index.json").write_text("{}")
    without_code = {file.name for file in side_files(source)}

    assert "helper.py" not in without_code, "Python files without an auto_map are not the model's"

    with_config(source, auto_map={"AutoModelForCausalLM": "modeling_own.Model"})
    checkpoint = hf_to_megatron(source, tmp_path / "megatron").out
    back = megatron_to_hf(checkpoint, tmp_path / "hf").out
    weights = {name: tensor for name, tensor in load_file(source / SINGLE).items()}
    write_hf(tmp_path / "trained", weights.items(), source=source, dtype="bf16")

    for exported in (back, tmp_path / "trained"):
        assert {name: (exported / name).read_text() for name in files} == files
        assert not (exported / "tf_model.h5.index.json").exists()


def test_links_out_of_the_model_are_not_followed(source: Path, tmp_path: Path) -> None:
    """A private file of this machine must not be published with the weights."""
    secret = tmp_path / "secret"
    secret.write_text("HF_TOKEN=hf_secret")
    weights = load_file(source / SINGLE)
    checkpoint = hf_to_megatron(source, tmp_path / "megatron").out

    for directory in (source, checkpoint / "hf"):
        link = directory / "NOTICE.txt"
        link.symlink_to(secret)
        with pytest.raises(WeightsError, match=r"NOTICE.txt is a link to .*secret, outside"):
            side_files(directory)

    with pytest.raises(WeightsError, match="outside the model's directory"):
        hf_to_megatron(source, tmp_path / "out")
    with pytest.raises(WeightsError, match="outside the model's directory"):
        megatron_to_hf(checkpoint, tmp_path / "out")
    with pytest.raises(WeightsError, match="outside the model's directory"):
        write_hf(tmp_path / "out", weights.items(), source=source, dtype="bf16")
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*out*"))

    for link in (source / "NOTICE.txt", checkpoint / "hf/NOTICE.txt"):
        link.unlink()
        link.symlink_to("config.json")
        side_files(link.parent)  # within the model it is a file of the model


def test_a_hub_snapshot_is_links_to_its_own_blobs(source: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    checkpoint = hf_to_megatron(snapshot, tmp_path / "megatron").out
    exported = megatron_to_hf(checkpoint, tmp_path / "hf").out

    assert (exported / SINGLE).read_bytes() == (source / SINGLE).read_bytes()

    (snapshot / "NOTICE.txt").symlink_to("../../../secret")
    with pytest.raises(WeightsError, match="leads nowhere"):
        open_model(snapshot)


# What --overwrite may delete.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: (out / "mine.txt").write_text("mine"), "mine.txt, which no conversion wrote"),
        (lambda out: (out / "iter_0000010").mkdir() or None, None),
        (lambda out: (out / "config.json").write_text("{}"), "was changed since"),
        (lambda out: (out / MANIFEST).unlink(), "has no readable checksums.json"),
        (lambda out: (out / "link").symlink_to("/"), "link, which no conversion wrote"),
    ],
    ids=["another file", "an empty directory", "an edited file", "no manifest", "a link"],
)
def test_overwrite_deletes_only_what_a_conversion_wrote(
    source: Path, tmp_path: Path, make: Callable[[Path], Any], message: str | None
) -> None:
    checkpoint = hf_to_megatron(source, tmp_path / "megatron").out
    out = megatron_to_hf(checkpoint, tmp_path / "hf").out
    make(out)
    before = sorted(out.rglob("*"))
    if message is None:
        megatron_to_hf(checkpoint, out, overwrite=True)
        return
    with pytest.raises(WeightsError, match=message):
        megatron_to_hf(checkpoint, out, overwrite=True)
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("where", ["itself", "its parent", "within", "its parent by a link"])
def test_out_and_source_may_not_touch(source: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "alias").symlink_to(tmp_path)
    out = {
        "itself": source,
        "its parent": tmp_path,
        "within": source / "out",
        "its parent by a link": tmp_path / "alias" / "model",
    }[where]
    with pytest.raises(WeightsError, match="are one within the other"):
        hf_to_megatron(source, out, overwrite=True)
    assert (source / SINGLE).exists() and not (source / "out").exists()


def test_out_may_not_hold_the_files_that_the_source_links_to(source: Path, tmp_path: Path) -> None:
    checkpoint = hf_to_megatron(source, tmp_path / "megatron").out
    out = megatron_to_hf(checkpoint, tmp_path / "hf").out
    (source / SINGLE).unlink()
    (source / SINGLE).symlink_to(out / SINGLE)
    with pytest.raises(WeightsError, match="are one within the other"):
        hf_to_megatron(source, out, overwrite=True)
    assert (out / SINGLE).exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_out_that_cannot_be_replaced_is_refused_early(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    file = tmp_path / "file"
    link = tmp_path / "link"
    dangling = tmp_path / "dangling"
    file.write_text("mine")
    (tmp_path / "directory").mkdir()
    link.symlink_to("directory")
    dangling.symlink_to("nowhere")
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == mounted)
    before = sorted(tmp_path.rglob("*"))

    for out, message in (
        (file, "is a file"),
        (link, "is a link to directory"),
        (dangling, "is a link to nowhere"),
        (mounted, "is a mount point"),
    ):
        with pytest.raises(WeightsError, match=message):
            hf_to_megatron(source, out, overwrite=overwrite)

    with pytest.raises(WeightsError, match=r"Not a directory|File exists"):
        hf_to_megatron(source, file / "out", overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_out_that_appears_meanwhile_is_left_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    out = tmp_path / "megatron"
    finish = transfer._finish

    def appears(*arguments: Any) -> None:
        finish(*arguments)
        out.mkdir()
        (out / "mine.txt").write_text("mine")

    monkeypatch.setattr(transfer, "_finish", appears)
    with pytest.raises(WeightsError, match="is left alone; the finished weights are in"):
        hf_to_megatron(source, out, overwrite=overwrite)

    monkeypatch.undo()
    assert (out / "mine.txt").read_text() == "mine"

    shutil.rmtree(out)
    again = hf_to_megatron(source, out)
    assert again.resumed_bytes == again.num_bytes


def test_a_partial_that_no_journal_knows_is_left_alone(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".megatron.partial"
    partial.mkdir()
    (partial / "mine.txt").write_text("mine")
    with pytest.raises(WeightsError, match="no journal says that a conversion wrote it"):
        hf_to_megatron(source, tmp_path / "megatron")
    assert (partial / "mine.txt").exists()


# The export of a training run.


def test_an_old_export_is_there_until_the_new_one_has_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "weights"
    synced = []
    weights = load_file(source / SINGLE)
    write_hf(target, weights.items(), source=source, dtype="bf16")
    monkeypatch.setattr(stream, "fsync", lambda path: synced.append(path.name))
    renames: list[tuple[str, bool]] = []
    rename = Path.rename

    def noted(self: Path, new: Path) -> Path:
        complete = any((place / SINGLE).exists() for place in (target, tmp_path / ".weights.old"))
        renames.append((Path(new).name, complete))
        return rename(self, new)

    monkeypatch.setattr(Path, "rename", noted)
    write_hf(target, weights.items(), source=source, dtype="bf16")
    assert renames == [(".weights.old", True), ("weights", True)]
    assert synced[-2:] == [".weights.partial", tmp_path.name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "weights"]


def test_an_export_with_files_of_others_is_set_aside(source: Path, tmp_path: Path) -> None:
    weights = load_file(source / SINGLE)
    for text in ("first", "second"):
        write_hf(tmp_path / "weights", weights.items(), source=source, dtype="bf16")
        (tmp_path / "weights/notes.md").write_text(text)
    write_hf(tmp_path / "weights", weights.items(), source=source, dtype="bf16")
    kept = [(tmp_path / f"weights.old-{n}/notes.md").read_text() for n in (1, 2)]
    assert kept == ["first", "second"]


# Checkpoints of Megatron-LM.


def test_a_checkpoints_own_arguments_are_compared(source: Path, tmp_path: Path) -> None:
    checkpoint = hf_to_megatron(source, tmp_path / "megatron", layout=LegacyLayout()).out
    for name, value in (
        ("rotary_base", 1_000_000),
        ("norm_epsilon", 1e-5),
        ("apply_layernorm_1p", True),
        ("num_attention_heads", 8),
        ("use_rope_scaling", True),
        ("window_size", 128),
    ):
        changed = Path(shutil.copytree(checkpoint, tmp_path / name))

        def change(state: dict[str, Any], name: str = name, value: Any = value) -> None:
            setattr(state["args"], name, value)

        changed_state(changed, change)
        with pytest.raises(WeightsError, match=f"was trained with {name} {value}"):
            megatron_to_hf(changed, tmp_path / "hf")
        with pytest.raises(WeightsError, match=f"was trained with {name} {value}"):
            check_model(source, changed)


@pytest.mark.parametrize("stored", ["common.pt", "shards"])
def test_the_arguments_of_torch_dist_are_compared(
    source: Path, tmp_path: Path, stored: str
) -> None:
    """megatron-core 0.16 has them in common.pt, 0.19 in the shards; the converter writes both."""
    checkpoint = hf_to_megatron(source, tmp_path / "megatron").out
    if stored == "shards":
        (checkpoint / "release/common.pt").unlink()
    with_config(source, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    with pytest.raises(WeightsError, match="rotary_base 10000 instead of 500000"):
        megatron_to_hf(checkpoint, tmp_path / "hf", hf_config=source)


def test_arguments_of_unknown_classes_are_inert(source: Path, tmp_path: Path) -> None:
    """A fork's object of arguments is not imported, and the weights are read all the same."""
    checkpoint = hf_to_megatron(source, tmp_path / "megatron", layout=LegacyLayout()).out

    def strange(state: dict[str, Any]) -> None:
        state["args"].timeout = datetime.timedelta(minutes=3)
        state["args"].device = torch.device("cpu")
        state["args"].own = argparse.ArgumentParser
        state["args"].types = OrderedDict(a={1, 2}, b=frozenset({3}), c=range(3))

    changed_state(checkpoint, strange)
    exported = megatron_to_hf(checkpoint, tmp_path / "hf").out
    assert (exported / SINGLE).read_bytes() == (source / SINGLE).read_bytes()
    assert describe(checkpoint)["format"].startswith("Megatron torch")


def test_an_object_in_the_place_of_a_tensor_is_named(source: Path, tmp_path: Path) -> None:
    checkpoint = hf_to_megatron(source, tmp_path / "megatron", layout=LegacyLayout()).out
    strange = {"decoder.final_layernorm.weight": datetime.timedelta(1)}
    changed_state(checkpoint, lambda state: state["model"].update(strange))
    with pytest.raises(WeightsError, match=r"is a datetime.timedelta, not a plain tensor"):
        megatron_to_hf(checkpoint, tmp_path / "hf")


@pytest.mark.parametrize("heights", [(1, 3, 3, 1), (0, 4, 4, 0), (2, 2, 2, 2)], ids=str)
def test_stages_with_unequal_numbers_of_layers_are_joined(
    tiny_model: ModelMaker, tmp_path: Path, heights: tuple[int, ...]
) -> None:
    """Stages that account for the embedding hold fewer layers, and each numbers its own layers from
    0.
    """
    source = tiny_model("qwen2", dtype="bfloat16")
    whole = hf_to_megatron(source, tmp_path / "whole", layout=LegacyLayout()).out
    state = torch.load(whole / "release/mp_rank_00/model_optim_rng.pt", weights_only=False)
    staged = tmp_path / "staged"
    first = 0
    last_stage = len(heights) - 1
    for stage, height in enumerate(heights):
        model = {}
        for name, tensor in state["model"].items():
            words = name.split(".")
            if words[1] == "layers":
                number = int(words[2]) - first
                if 0 <= number < height:
                    model[".".join([*words[:2], str(number), *words[3:]])] = tensor
                continue
            # Outside the layers: the embedding is in the first stage, all else in the last.
            own_stage = 0 if words[0] == "embedding" else last_stage
            if stage == own_stage:
                model[name] = tensor
        first += height
        folder = staged / f"mp_rank_00_{stage:03d}"
        folder.mkdir(parents=True)
        torch.save({**state, "model": model}, folder / "model_optim_rng.pt")
    exported = megatron_to_hf(staged, tmp_path / "hf", hf_config=source).out

    assert (exported / SINGLE).read_bytes() == (source / SINGLE).read_bytes()

    shutil.rmtree(staged / "mp_rank_00_003")
    with pytest.raises(WeightsError, match=r"layers where config.json asks for 8|has no tensor"):
        megatron_to_hf(staged, tmp_path / "no", hf_config=source)


def test_verify_reads_the_checkpoint_that_the_tracker_names(source: Path, tmp_path: Path) -> None:
    checkpoint = hf_to_megatron(source, tmp_path / "megatron").out
    shutil.copytree(checkpoint / "release", checkpoint / "iter_0000010")
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("10")
    for directory in (checkpoint, checkpoint / "release", checkpoint / "iter_0000010"):
        assert verify(open_as_hf(directory), None).problems == []
    file = checkpoint / "release/__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert verify(open_as_hf(checkpoint), None).problems == []
    assert len(verify(open_as_hf(checkpoint / "release"), None).problems) >= 1


def test_other_formats_and_trackers_are_named(source: Path, tmp_path: Path) -> None:
    architecture = Architecture.read(source)
    checkpoints = tmp_path / "checkpoints"
    zarr = checkpoints / "iter_0000005"
    (zarr / "decoder.layers.mlp.linear_fc1.weight").mkdir(parents=True)
    (zarr / "decoder.layers.mlp.linear_fc1.weight/.zarray").write_text("{}")
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    tracker.write_text("5")

    for directory in (checkpoints, zarr):
        with pytest.raises(WeightsError, match=r"format 'zarr', which is not read"):
            open_megatron(directory, architecture)
        with pytest.raises(WeightsError, match=r"format 'zarr', which is not read"):
            describe(directory)

    (zarr / "metadata.json").write_text('{"sharded_backend": "fsdp_dtensor"}')
    with pytest.raises(WeightsError, match=r"format 'fsdp_dtensor', which is not read"):
        open_megatron(checkpoints, architecture)

    tracker.write_text("9" * 5000)
    with pytest.raises(WeightsError, match="which is neither 'release' nor an iteration"):
        open_megatron(checkpoints, architecture)

    tracker.unlink()
    tracker.mkdir()
    with pytest.raises(WeightsError, match=r"tracker|latest_.*cannot be read \(Is a directory\)"):
        open_megatron(checkpoints, architecture)


# Comparisons take each side's own description.


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-5}, {"rope_parameters": {"rope_theta": 5e5}}], ids=str
)
def test_verify_compares_the_descriptions(source: Path, tmp_path: Path, change: Any) -> None:
    other = with_config(Path(shutil.copytree(source, tmp_path / "other")), **change)
    checkpoint = hf_to_megatron(source, tmp_path / "megatron").out
    for a, b in ((source, other), (checkpoint, other)):
        report = verify(open_as_hf(a), open_as_hf(b))
        assert report.identical == report.tensors
        assert len(report.problems) == 1 and "the models differ" in report.problems[0]


def test_peak_memory_is_this_programs_own() -> None:
    """Across exec the kernel hands on getrusage's figure, for example that of a
    launcher of 400 MB.
    """
    program = (
        "import os, sys; block = bytearray(400 * 2**20); "
        "os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
    )
    question = (
        "from megatron_real.commands.convert import peak_memory_bytes; print(peak_memory_bytes())"
    )
    words = [sys.executable, "-c", program, question]
    completed = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert 2**20 < int(completed.stdout) < 300 * 2**20
