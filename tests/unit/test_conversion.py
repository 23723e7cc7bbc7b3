"""HF <-> Megatron conversion gives identical bytes there and back, reads every kind of source, and
refuses in one sentence.
"""

from __future__ import annotations

import collections
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_real.cli import main
from megatron_real.conversion.convert import LegacyLayout, hf_to_megatron, megatron_to_hf
from megatron_real.conversion.verify import open_as_hf, verify
from megatron_real.weights import WeightsError
from megatron_real.weights.hf import HfWeights
from megatron_real.weights.transfer import MANIFEST, Limits, check_manifest

FORMATS = {
    "torch_dist": {},
    "torch_dist-chunks": {"tp_chunks": 2},
    "torch-te": {"layout": LegacyLayout(tp=2, pp=1, layers="te")},
    "torch-local-pp": {"layout": LegacyLayout(tp=1, pp=4, layers="local")},
    "torch-tp-pp": {"layout": LegacyLayout(tp=2, pp=2)},
}


@pytest.fixture
def source(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen2", dtype="bfloat16", num_hidden_layers=8)


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != MANIFEST}


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen2", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"head_dim": 16}),
    ],
    ids=["qwen2", "llama-tied", "llama-biases", "qwen3"],
)
def test_round_trip_is_the_identical_file(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    options: dict[str, Any],
    family: str,
    sizes: dict[str, Any],
) -> None:
    source = tiny_model(family, dtype="bfloat16", **sizes)
    converted = hf_to_megatron(source, tmp_path / "megatron", **options)
    exported = megatron_to_hf(converted.out, tmp_path / "hf")
    assert files_of(exported.out) == files_of(source)
    assert check_manifest(converted.out) == check_manifest(exported.out) == []


def test_blocks_smaller_than_a_row_and_many_workers_give_the_same_file(
    source: Path, tmp_path: Path
) -> None:
    # One byte of memory: every block is then a part of a row.
    limits = Limits(workers=7, max_memory=1)
    converted = hf_to_megatron(source, tmp_path / "megatron", tp_chunks=2, limits=limits)
    assert files_of(megatron_to_hf(converted.out, tmp_path / "hf", limits=limits).out) == files_of(
        source
    )


def test_many_files_come_back_as_they_were(source: Path, tmp_path: Path) -> None:
    """transformers cuts the weights into shards; the export has the same shards and the
    same index.
    """
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(
        tmp_path / "cut", max_shard_size="50KB"
    )
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 3
    converted = hf_to_megatron(tmp_path / "cut", tmp_path / "megatron")
    assert files_of(megatron_to_hf(converted.out, tmp_path / "hf").out) == files_of(
        tmp_path / "cut"
    )


def test_shards_of_a_size_load_in_transformers(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    converted = hf_to_megatron(source, tmp_path / "megatron")
    exported = megatron_to_hf(converted.out, tmp_path / "hf", max_shard_bytes=60_000).out
    assert len(list(exported.glob("model-*.safetensors"))) == 3
    before = AutoModelForCausalLM.from_pretrained(source, dtype="auto").state_dict()
    after = AutoModelForCausalLM.from_pretrained(exported, dtype="auto").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bin_files_and_hub_snapshots_convert_to_the_same_checkpoint(
    source: Path, tmp_path: Path
) -> None:
    """Sources are pytorch_model.bin, whole and in parts, and a hub snapshot whose files
    are links.
    """
    weights = HfWeights(source)
    tensors = {name: weights.read(name) for name in weights.names}
    whole, parts, snapshot = (tmp_path / kind for kind in ("whole", "parts", "snapshot"))
    for directory in (whole, parts, snapshot):
        directory.mkdir()
        shutil.copy(source / "config.json", directory)
    torch.save(collections.OrderedDict(tensors), whole / "pytorch_model.bin")
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2])):
        torch.save(
            {name: torch.nn.Parameter(tensors[name]) for name in part},
            parts / f"pytorch_model-{i}.bin",
        )
        weight_map |= dict.fromkeys(part, f"pytorch_model-{i}.bin")
    (parts / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "blob").write_bytes((source / "model.safetensors").read_bytes())
    (snapshot / "model.safetensors").symlink_to("../blob")

    for directory in (whole, parts, snapshot):
        converted = hf_to_megatron(directory, tmp_path / f"{directory.name}-megatron")
        exported = HfWeights(megatron_to_hf(converted.out, tmp_path / f"{directory.name}-hf").out)
        assert all(torch.equal(exported.read(name), tensors[name]) for name in tensors)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("F32", torch.float32), ("F16", torch.float16)])
def test_weights_are_cast_to_the_dtype_that_is_asked_for(
    source: Path, tmp_path: Path, dtype: str, torch_dtype: torch.dtype
) -> None:
    converted = hf_to_megatron(source, tmp_path / "megatron", dtype=dtype)
    exported = megatron_to_hf(converted.out, tmp_path / "hf").out
    before = HfWeights(source)
    after = HfWeights(exported)
    assert all(torch.equal(after.read(n), before.read(n).to(torch_dtype)) for n in before.names)
    assert json.loads((exported / "config.json").read_text())["dtype"] == str(
        torch_dtype
    ).removeprefix("torch.")
    narrow = HfWeights(megatron_to_hf(converted.out, tmp_path / "narrow", dtype="BF16").out)
    assert all(narrow.tensor(name).dtype == "BF16" for name in narrow.names)


def test_a_value_that_does_not_fit_is_refused(source: Path, tmp_path: Path) -> None:
    directory = edited(source, tmp_path, **{"model.norm.weight": lambda t: t * 1e6})
    with pytest.raises(
        WeightsError, match=r"final_layernorm.* which F16 cannot hold; take another --dtype"
    ):
        hf_to_megatron(directory, tmp_path / "out", dtype="F16")
    assert not (tmp_path / "out").exists()


def edited(
    source: Path, tmp_path: Path, **changes: Callable[[torch.Tensor], torch.Tensor | None]
) -> Path:
    """Copies an HF directory with changed tensors; a change that returns None drops the tensor."""
    from safetensors.torch import save_file

    directory = tmp_path / "edited"
    shutil.copytree(source, directory)
    weights = HfWeights(source)
    tensors = {name: weights.read(name) for name in weights.names}
    for name, change in changes.items():
        value = change(tensors.get(name, torch.zeros(2)))
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": lambda t: None}, "lacks model.norm.weight"),
        ({"model.extra": lambda t: t}, "has model.extra, for which its config.json has no place"),
        (
            {"model.norm.weight": lambda t: t[:-1]},
            r"shape \[31\] where config.json asks for \[32\]",
        ),
        ({"model.norm.weight": lambda t: t.to(torch.int8)}, "dtype I8; supported are"),
    ],
    ids=["missing", "extra", "shape", "quantised"],
)
def test_tensors_that_do_not_fit_the_config_are_named(
    source: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        hf_to_megatron(edited(source, tmp_path, **changes), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edited"]


def test_only_an_equal_copy_of_the_tied_embedding_is_left_out(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Some tied models carry lm_head.weight: an equal one is left out, a different one
    is refused.
    """
    source = tiny_model("llama", dtype="bfloat16", tie_word_embeddings=True)
    embedding = HfWeights(source).read("model.embed_tokens.weight")
    equal = edited(source, tmp_path, **{"lm_head.weight": lambda _: embedding.clone()})
    converted = hf_to_megatron(equal, tmp_path / "megatron")
    assert (
        "lm_head.weight"
        not in HfWeights(megatron_to_hf(converted.out, tmp_path / "hf").out).tensors
    )
    shutil.rmtree(equal)
    other = edited(source, tmp_path, **{"lm_head.weight": lambda _: embedding + 1})
    with pytest.raises(WeightsError, match="differs from the embedding"):
        hf_to_megatron(other, tmp_path / "no")


def test_verify_finds_one_changed_element(source: Path, tmp_path: Path) -> None:
    checkpoint = hf_to_megatron(source, tmp_path / "megatron").out
    report = verify(open_as_hf(checkpoint), open_as_hf(source))
    assert not report.problems and report.identical == report.tensors == len(
        HfWeights(source).names
    )

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] += 0.25
        return tensor

    name = "model.layers.2.self_attn.k_proj.weight"
    other = edited(source, tmp_path, **{name: change})
    report = verify(open_as_hf(checkpoint), open_as_hf(other))
    assert report.worst == name and report.identical == report.tensors - 1
    assert report.max_abs_difference == pytest.approx(0.25, abs=2e-3)
    assert [name in problem for problem in report.problems] == [True]
    assert not verify(open_as_hf(checkpoint), open_as_hf(other), atol=0.3).problems


def test_verify_counts_nans_and_widens(source: Path, tmp_path: Path) -> None:
    wide = hf_to_megatron(source, tmp_path / "wide", dtype="F32").out
    assert not verify(open_as_hf(wide), open_as_hf(source)).problems

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1] = float("nan")
        return tensor

    report = verify(
        open_as_hf(edited(source, tmp_path, **{"model.norm.weight": spoil})), open_as_hf(source)
    )
    assert report.nans == 1
    assert "1 NaN values" in report.problems[0] and "differs by up to inf" in report.problems[1]


@pytest.mark.parametrize("position", [0.3, 0.6, 0.9])
def test_a_flipped_bit_is_found_by_the_manifest(
    source: Path, tmp_path: Path, position: float
) -> None:
    out = hf_to_megatron(source, tmp_path / "megatron").out
    file = out / "release/__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[int(len(data) * position)] ^= 1
    file.write_bytes(data)
    assert len(check_manifest(out)) == 1
    assert main(["convert", "verify", str(out)]) in (1, 2)


def test_the_command_line_converts_verifies_and_inspects(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(tmp_path / "megatron")
    exported = str(tmp_path / "hf")
    assert main(["convert", "to-megatron", str(source), checkpoint, "--json"]) == 0

    summary = json.loads(capsys.readouterr().out)
    assert summary["bytes"] == sum(
        t.shape[0] * t.columns * 2 for t in HfWeights(source).tensors.values()
    )
    options = ["--max-shard-size", "60KB", "--dtype", "fp32"]
    assert main(["convert", "to-hf", checkpoint, exported, *options]) == 0
    assert main(["convert", "verify", checkpoint, exported]) == 0

    capsys.readouterr()
    assert main(["convert", "inspect", checkpoint, "--json"]) == 0

    report = json.loads(capsys.readouterr().out)
    assert report["format"] == "Megatron torch_dist" and report["architecture"]["num_kv_heads"] == 2
    assert main(["convert", "inspect", exported]) == 0
    assert "HF safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["to-megatron", "{source}", "{source}"], "exists already"),
        (["to-megatron", "{tmp}/none", "{tmp}/out"], "no config.json"),
        (["to-megatron", "{source}", "{tmp}/out", "--tp", "2"], "are of --format torch"),
        (
            ["to-megatron", "{source}", "{tmp}/out", "--layers", "local"],
            "--layers is of --format torch",
        ),
        (
            ["to-megatron", "{source}", "{tmp}/out", "--format", "torch", "--tp-chunks", "2"],
            "--tp-chunks is of --format torch_dist",
        ),
        (
            ["to-megatron", "{source}", "{tmp}/out", "--tp-chunks", "3"],
            "does not divide the model's num_key_value_heads",
        ),
        (
            ["to-megatron", "{source}", "{tmp}/out", "--format", "torch", "--pp", "3"],
            "--pp 3 does not divide",
        ),
        (["to-megatron", "{source}", "{tmp}/out", "--workers", "0"], "--workers is 0"),
        (["to-hf", "{source}", "{tmp}/out"], "give a Megatron checkpoint"),
        (["verify", "{tmp}/none"], "give a Megatron checkpoint"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[2:]) or value[0],
)
def test_a_wrong_command_is_refused_in_one_sentence(
    source: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *(word.format(source=source, tmp=tmp_path) for word in words)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (["release"], "says 'release', but there is no"),
        (["release/mp_rank_01", "release/mp_rank_00"], "has 0 of 1 x 1 mp_rank directories"),
        (["release/mp_rank_00"], "has 1 of 2 x 1 mp_rank directories"),
    ],
    ids=["the checkpoint", "all ranks", "a rank"],
)
def test_a_checkpoint_with_parts_lost_is_one_sentence(
    source: Path, tmp_path: Path, lost: list[str], message: str
) -> None:
    checkpoint = hf_to_megatron(
        source, tmp_path / "megatron", layout=LegacyLayout(tp=2, pp=1, layers="te")
    ).out
    for name in lost:
        shutil.rmtree(checkpoint / name)
    with pytest.raises(WeightsError, match=message):
        megatron_to_hf(checkpoint, tmp_path / "hf")


def test_an_explicit_dtype_is_that_of_all_tensors(source: Path, tmp_path: Path) -> None:
    """This holds too where the recorded files have matrices in that dtype and other tensors not."""
    mixed = shutil.copytree(source, tmp_path / "mixed")
    tensors = load_file(mixed / "model.safetensors")
    for name, tensor in tensors.items():
        if "norm" in name:
            tensors[name] = tensor.float()
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    checkpoint = hf_to_megatron(mixed, tmp_path / "megatron").out
    kept, cast = (
        megatron_to_hf(checkpoint, tmp_path / str(dtype), dtype=dtype).out
        for dtype in (None, "BF16")
    )

    assert {t.dtype for t in load_file(kept / "model.safetensors").values()} == {
        torch.bfloat16,
        torch.float32,
    }
    assert {t.dtype for t in load_file(cast / "model.safetensors").values()} == {torch.bfloat16}


def test_verify_finds_tensors_that_share_bytes(source: Path, tmp_path: Path) -> None:
    """Two norms of one shape lie on one storage: every element of both is read from the
    same place.
    """
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"] = tensors[
        "model.layers.1.input_layernorm.weight"
    ]
    shared = shutil.copytree(
        source, tmp_path / "shared", ignore=shutil.ignore_patterns("*.safetensors")
    )
    torch.save(tensors, shared / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="two tensors share the bytes"):
        verify(open_as_hf(shared), None)


def test_checkpoints_without_a_config_ask_for_one(source: Path, tmp_path: Path) -> None:
    checkpoint = hf_to_megatron(source, tmp_path / "megatron").out
    shutil.rmtree(checkpoint / "hf")
    with pytest.raises(WeightsError, match="--hf-config"):
        megatron_to_hf(checkpoint, tmp_path / "hf")
    exported = megatron_to_hf(checkpoint, tmp_path / "hf", hf_config=source).out
    assert files_of(exported)["model.safetensors"] == files_of(source)["model.safetensors"]


def test_another_models_config_is_refused(
    tiny_model: Callable[..., Path], source: Path, tmp_path: Path
) -> None:
    checkpoint = hf_to_megatron(source, tmp_path / "megatron").out
    with pytest.raises(WeightsError, match="they do not belong together"):
        megatron_to_hf(
            checkpoint, tmp_path / "hf", hf_config=tiny_model("qwen2", intermediate_size=128)
        )
    with pytest.raises(WeightsError, match=r"linear_qkv.bias, for which .* has no place"):
        megatron_to_hf(checkpoint, tmp_path / "hf", hf_config=tiny_model("llama"))


def test_overwrite_replaces_an_earlier_conversion(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "megatron"
    hf_to_megatron(source, out, layout=LegacyLayout(tp=2))
    hf_to_megatron(source, out, overwrite=True)
    assert not (out / "release/mp_rank_00").exists() and (out / "release/.metadata").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["megatron"]
