"""Shipped configurations load, and wrong ones are refused in one sentence with the value and the
remedy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import pytest
from omegaconf import OmegaConf

from megatron_real import bounds, cli, config
from megatron_real.config import Config
from megatron_real.config.describe import every_setting
from megatron_real.config.engines import ENGINES
from megatron_real.objective.registry import OBJECTIVES, make_objective

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    sizes = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 151936,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "intermediate_size": 8960,
        "max_position_embeddings": 16384,
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(sizes))
    return tmp_path / "model"


@pytest.fixture
def file(tmp_path: Path, model: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"model:\n  path: {model}\nrollout:\n  num_prompts: 64\n")
    return path


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples/configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_shipped_configurations_load(path: Path, model: Path) -> None:
    config.load(path, [f"model.path={model}"])


def test_overrides_replace_values_of_the_file(file: Path) -> None:
    loaded = config.load(
        file, ["optimizer.lr=1e-6", "parallel.tp=4", "megatron.overlap_grad_reduce=true"]
    )
    assert (loaded.optimizer.lr, loaded.parallel.tp, loaded.rollout.num_prompts) == (1e-6, 4, 64)
    assert loaded.megatron == {"overlap_grad_reduce": True}


REFUSED = {
    "trainer.stepz=3": "unknown key trainer.stepz; did you mean steps?",
    "optimiser.lr=3": "unknown key optimiser; did you mean optimizer?",
    "trainer.steps=many": "trainer.steps is 'many'; it takes a whole number",
    "trainer.steps=0": "trainer.steps is 0; it must be above 0",
    "trainer.timeout_minutes=60": "= 60 is not above trainer.hang_minutes = 60: collectives would",
    "trainer=3": "trainer is 3; it is a section and takes keys below it",
    "parallel.sp=maybe": "parallel.sp is 'maybe'; it takes true or false",
    "objective.variant=grpo": "objective.variant is 'grpo'; it takes one of anchored, vanilla, bce",
    "objective.tau=0": "objective.tau is 0.0; it must be above 0",
    "objective.name=ppo": "objective.name is 'ppo'; it takes one of real, grpo, ",
    "objective.clip_high=0.3": (
        "objective.clip_high is a setting of dapo, gspo, cispo, not of real; set "
        "objective.name=dapo, or leave it out"
    ),
    "objective.name=grpo objective.tau=1": (
        "objective.tau is a setting of real, disco, conspo, not of grpo; "
    ),
    "objective.name=grpo objective.clp=1": "unknown key objective.clp of grpo; did you mean clip?",
    "objective.name=grpo objective.clip=0": "objective.clip is 0.0; it must be above 0",
    "objective.kl.to=ref": "objective.kl.to is 'ref'; it takes one of none, reference, old",
    "objective.kl.coefficient=-1": "objective.kl.coefficient is -1.0; it must be 0 or above",
    "objective=grpo": "objective is 'grpo'; it is a section and takes keys below it",
    "objective.name=dapo rollout.group_size=1": "which leaves no loss to objective.name=dapo",
    "rollout.top_p=0.9": "or set rollout.allow_truncated_sampling=true",
    "rollout.num_prompts=65": (
        "batch.minibatch_prompts = 32 does not divide rollout.num_prompts = 65"
    ),
    "model.fp32_head=true model.logprobs=logits": "model.fp32_head needs model.logprobs=linear",
    "rollout.group_size=1": "rollout.group_size = 1 makes every group one-class",
    "rollout.retries=-1": "rollout.retries is -1; it must be 0 (off) or above",
    "rollout.offload_optimizer=true model.dtype=fp32": "with model.dtype=fp32 and rollout.engine=",
    "rollout.keep_every=10": "set rollout.keep_steps=1, or rollout.keep_every=0",
    "rollout.refill_rounds=-1": "rollout.refill_rounds is -1; it must be 0 (off) or above",
    "rollout.max_lag=1": "rollout.max_lag = 1 needs rollout.engine=vllm-server, not auto",
    "rollout.max_lag=2": "rollout.max_lag is 2; it takes one of 0, 1",
    "rollout.engine=vllm-server rollout.max_lag=1 rollout.refill_rounds=1": (
        "set the former or the latter to 0"
    ),
    "rollout.num_servers=2": "need rollout.engine=vllm-server, not auto",
    "rollout.engine=vllm-server rollout.servers=[a:1]": (
        "rollout.servers has 'a:1'; an address is of the form http://"
    ),
    "rollout.engine=vllm-server model.dtype=fp64": (
        "model.dtype = fp64 is not known to rollout.engine=vllm"
    ),
    "labels.excluded=[wrong,ok]": (
        "labels.excluded is 'ok'; it takes one of wrong, unparsable, timeout, crashed"
    ),
    "labels.verifier=own.py:judge labels.require_think=true": "which is given the whole text",
    "batch.max_tokens=100": "raise it to at least 9216",
    "parallel.sp=true": "parallel.sp=true needs parallel.tp > 1",
    "parallel.vpp=2": "parallel.vpp = 2 needs parallel.pp > 1",
    "parallel.tp=8": (
        "parallel.tp = 8 does not divide the model's 12 attention heads; take one of [1, 2, 3, "
        "4, 6, 12]"
    ),
    "parallel.pp=3": "does not divide the model's 28 layers",
    "data.max_prompt_tokens=9000 batch.max_tokens=20000": (
        "exceeds the model's max_position_embeddings 16384"
    ),
    "model.path=/nowhere": "model.path is '/nowhere', which has no config.json",
    "megatron.hidden_dropuot=0": (
        "unknown key megatron.hidden_dropuot; did you mean hidden_dropout?"
    ),
    "megatron.hidden_dropout=0.1": "dropout makes pi_theta differ from pi_old",
    "megatron.num_moe_experts=8": "mixture-of-experts models are not supported",
    "megatron.lora_rank=8": "LoRA is not supported",
    "megatron.tensor_model_parallel_size=2": "is set by parallel.tp; set that instead",
    "rollout.tis_clip=2": (
        "unknown key rollout.tis_clip; the mismatch between engine and trainer is not weighted away"
    ),
    "rollout.is_fast=1": "unknown key rollout.is_fast; known here: allow_truncated_sampling, ",
    "rollout.engine=sglang": (
        "rollout.engine is sglang; it takes one of auto, vllm, vllm-server, transformers"
    ),
    "rollout.engine=vllm rollout.tp=3": (
        "rollout.tp = 3 neither divides the model's 2 key-value heads nor is a multiple"
    ),
    "given.x=1": "unknown key given; known here",
    "data.suffix=${nothing}": "Interpolation key 'nothing' not found",
    "rollout.sync.probe_every=-1": "rollout.sync.probe_every is -1; it must be 0 (off) or above",
    "rollout.sleep_level=3": "rollout.sleep_level is 3; it takes one of 0, 1, 2",
    "rollout.exclude_mismatch=0": "rollout.exclude_mismatch is 0.0; it must be above 0, or null",
    "rollout.engine=transformers rollout.tp=2": (
        "rollout.tp = 2 needs rollout.engine=vllm or vllm-server, not transformers; set "
        "rollout.tp=1"
    ),
    "rollout.engine=vllm model.dtype=fp64": (
        "model.dtype = fp64 is not known to rollout.engine=vllm"
    ),
    "rollout.engine=vllm rollout.tp=5": (
        "rollout.tp = 5 does not divide the model's 12 attention heads"
    ),
    "rollout.engine=vllm rollout.kv_cache_mib=100": "does not hold one sequence",
    "rollout.vllm.seed=1": "rollout.vllm.seed is set by trainer.seed; set that instead",
    "optimizer.beta2=1": "optimizer.beta2 is 1.0; it must lie in [0, 1)",
    "optimizer.lr=.inf": "optimizer.lr is inf; it must be above 0",
    "rollout.top_k=-1": "rollout.top_k is -1; it must be 0 (off) or above",
    "oops": "override 'oops' has no '='",
}


@pytest.mark.parametrize(("words", "message"), REFUSED.items(), ids=REFUSED)
def test_an_invalid_setting_is_refused_in_one_sentence(
    file: Path, words: str, message: str
) -> None:
    with pytest.raises(ValueError) as refused:
        config.load(file, words.split())
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_layout_must_divide_the_world() -> None:
    layout = Config(parallel=config.ParallelConfig(tp=2, pp=2))
    assert config.check_world(layout, 8) == 2
    with pytest.raises(ValueError, match="tp 2 x pp 2 x cp 1 = 4 does not divide the 6 processes"):
        config.check_world(layout, 6)
    with pytest.raises(
        ValueError,
        match=r"rollout.tp = 4 does not divide the 6 processes; take one of \[1, 2, 3, 6\]",
    ):
        config.check_world(Config(rollout=config.RolloutConfig(tp=4)), 6)


def test_fewer_rollouts_than_data_parallel_ranks_are_warned_of() -> None:
    """An update has 32 groups of 8: 256 ranks get one rollout each; of 512 ranks at least 256 get
    none.
    """
    layout = Config(
        rollout=config.RolloutConfig(num_prompts=128, group_size=8),
        batch=config.BatchConfig(minibatch_prompts=32),
    )
    assert config.too_few_sequences(layout, 256) == ""
    sentence = config.too_few_sequences(layout, 512)
    assert "512 data-parallel ranks share the 256 rollouts of an update" in sentence
    assert "at least 256 of them idle" in sentence and "batch.minibatch_prompts to 64" in sentence


def test_the_smallest_kv_cache_holds_one_sequence(file: Path) -> None:
    """R1-Distill 1.5B in bf16 needs 2 x 28 layers x 2 KV heads x 128 x 2 bytes = 28,672 bytes a
    token.

    9216 tokens are 72 blocks of 128, plus one: 73 x 128 x 28,672 bytes = 255.5 MiB, half of it on
    each of two ranks.
    """
    for tp, enough in ((1, 256), (2, 128)):
        words = ["rollout.engine=vllm", f"rollout.tp={tp}"]
        config.load(file, [*words, f"rollout.kv_cache_mib={enough}"])
        with pytest.raises(ValueError, match=f"raise it to at least {enough}"):
            config.load(file, [*words, f"rollout.kv_cache_mib={enough - 1}"])


def test_a_qwen3_without_head_dim_needs_its_whole_kv_cache(file: Path, model: Path) -> None:
    """The sizes of Qwen3-0.6B: 2 x 28 layers x 8 KV heads x 128 x 2 bytes = 114,688 bytes a token.

    73 blocks of 128, as above, are 1022 MiB. With hidden_size / num_attention_heads = 64 it would
    be half.
    """
    values = json.loads((model / "config.json").read_text()) | {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    }
    (model / "config.json").write_text(json.dumps(values))
    config.load(file, ["rollout.engine=vllm", "rollout.kv_cache_mib=1022"])
    with pytest.raises(ValueError, match="raise it to at least 1022"):
        config.load(file, ["rollout.engine=vllm", "rollout.kv_cache_mib=1021"])


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("trainer.run_dir=a #1", "a #1"),
        ("trainer.run_dir=2024", "2024"),
        ("trainer.run_dir=1e3", "1e3"),
        ("trainer.run_dir=true", "true"),
        ("trainer.run_dir=[a]: {b}", "[a]: {b}"),
        ('trainer.run_dir="a"', '"a"'),
        ("trainer.run_dir=a=b", "a=b"),
        ("trainer.run_dir=", ""),
        ("trainer.run_dir=runs/${rollout.num_prompts}", "runs/64"),
    ],
)
def test_text_on_the_command_line_is_taken_letter_by_letter(
    file: Path, word: str, text: str
) -> None:
    assert config.load(file, [word]).trainer.run_dir == text


def test_other_settings_on_the_command_line_are_typed_by_their_field(file: Path) -> None:
    words = [
        "optimizer.lr=1e-6",
        "trainer.profile=[1, 2]",
        "rollout.servers=[http://a:1]",
        "rollout.engine=vllm-server",
        "rollout.exclude_mismatch=null",
        "rollout.vllm.max_logprobs=5",
        "rollout.sync={probe_every: 3}",
        "trainer.steps=${rollout.num_prompts}",
    ]
    loaded = config.load(file, words)

    assert (loaded.optimizer.lr, loaded.trainer.profile, loaded.trainer.steps) == (1e-6, (1, 2), 64)
    assert loaded.rollout.servers == ("http://a:1",)
    assert (loaded.rollout.exclude_mismatch, loaded.rollout.sync.probe_every) == (None, 3)
    assert loaded.rollout.vllm == {"max_logprobs": 5}


def test_what_comes_from_the_environment_is_written_as_it_was_given(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "canary-1234")
    monkeypatch.setenv("RATE", "1e-5")
    text = (
        file.read_text() + "  vllm: {hf_token: '${oc.env:SECRET}', tags: [a, '${oc.env:SECRET}']}\n"
    )
    file.write_text(text + "data:\n  suffix: again ${rollout.vllm.hf_token}\n")
    loaded = config.load(
        file, ["trainer.run_dir=runs/${oc.env:SECRET}", "optimizer.lr=${oc.env:RATE}"]
    )

    assert loaded.rollout.vllm["hf_token"] == "canary-1234"
    assert loaded.rollout.vllm["tags"][1] == "canary-1234"
    assert loaded.trainer.run_dir == "runs/canary-1234"
    assert loaded.data.suffix == "again canary-1234"
    assert loaded.optimizer.lr == 1e-5

    written = config.to_dict(loaded)
    assert "canary" not in json.dumps(written) + json.dumps(config.to_plain(loaded))
    assert written["optimizer"]["lr"] == "${oc.env:RATE}"
    assert written["rollout"]["vllm"]["tags"] == ["a", "${oc.env:SECRET}"]
    assert "canary" not in repr(loaded.given)

    OmegaConf.save(OmegaConf.create(written), file)
    assert config.load(file) == loaded  # the written file gives the same run

    elsewhere = dataclasses.replace(loaded.trainer, run_dir="elsewhere")
    changed = dataclasses.replace(loaded, trainer=elsewhere)
    assert config.to_dict(changed)["trainer"]["run_dir"] == "elsewhere"


def test_a_refusal_names_a_value_from_the_environment_as_it_was_given(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "canary-1234")
    for word in (
        "rollout.tp=${oc.env:SECRET}",
        "rollout.servers=['${oc.env:SECRET}']",
        "rollout.engine=${oc.env:SECRET}",  # a sentence without quotes around the value
    ):
        with pytest.raises(ValueError, match=r"rollout.* \$\{oc.env:SECRET\}") as refused:
            config.load(file, ["rollout.engine=vllm-server", word])
        assert "canary" not in "".join(traceback.format_exception(refused.value))


def test_a_file_says_only_what_differs_from_its_base(file: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    more = tmp_path / "more/more.yaml"
    more.write_text(
        "base: ../run.yaml\nrollout:\n  group_size: 4\nlabels:\n  excluded: [crashed]\n"
    )
    most = tmp_path / "most.yaml"
    most.write_text("base: more/more.yaml\nrollout:\n  group_size: 6\nlabels:\n")
    loaded = config.load(most, ["labels.workers=3"])

    assert (loaded.rollout.num_prompts, loaded.rollout.group_size) == (64, 6)
    assert (loaded.labels.excluded, loaded.labels.workers) == (("crashed",), 3)

    file.write_text("base: most.yaml\n")
    with pytest.raises(ValueError, match=r"most.yaml -> more.yaml -> run.yaml -> most.yaml"):
        config.load(most)

    most.write_text("base: nowhere.yaml\n")
    with pytest.raises(ValueError, match=r"base is 'nowhere.yaml', but there is no file"):
        config.load(most)

    (tmp_path / "other.yaml").write_text("")
    with pytest.raises(ValueError, match="unknown key base"):
        config.load(tmp_path / "other.yaml", ["base=most.yaml"])


def test_another_objective_begins_with_its_own_settings(file: Path, tmp_path: Path) -> None:
    file.write_text(file.read_text() + "objective:\n  variant: bce\n  tau: 0.25\n")
    loaded = config.load(file)
    assert (loaded.objective.name, config.to_dict(loaded)["objective"]["tau"]) == ("real", 0.25)
    assert next(iter(config.to_dict(loaded)["objective"])) == "name"
    assert config.load(file, ["objective.name=real"]) == loaded

    dapo = make_objective("dapo", clip_high=0.3)
    assert config.load(file, ["objective.clip_high=0.3", "objective.name=dapo"]).objective == dapo

    (tmp_path / "dapo.yaml").write_text("base: run.yaml\nobjective:\n  name: dapo\n")
    assert config.load(tmp_path / "dapo.yaml", ["objective.clip_high=0.3"]).objective == dapo

    (tmp_path / "mixed.yaml").write_text("base: run.yaml\nobjective:\n  name: grpo\n  tau: 1\n")
    with pytest.raises(ValueError, match=r"objective.tau is a setting of .*, not of grpo"):
        config.load(tmp_path / "mixed.yaml")


def test_the_written_configuration_names_its_objective(file: Path) -> None:
    words = ["objective.name=gspo", "objective.kl.to=old", "objective.kl.coefficient=0.002"]
    loaded = config.load(file, words)
    OmegaConf.save(OmegaConf.create(config.to_dict(loaded)), file)
    assert config.load(file) == loaded


def test_a_reference_must_be_of_the_models_architecture(
    file: Path, model: Path, tmp_path: Path
) -> None:
    reference = tmp_path / "2024"  # a text, although it looks like a number
    shutil.copytree(model, reference)
    words = ["objective.kl.to=reference", f"objective.kl.reference_path={reference}"]
    config.load(file, words)
    values = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 14}
    (reference / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="has num_layers 14 where the model has 28"):
        config.load(file, words)
    shutil.rmtree(reference)
    with pytest.raises(ValueError, match=r"objective.kl.reference_path is .* no config.json"):
        config.load(file, words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "holds a list, not sections"),
        ("trainer: {steps: 1, steps: 2}\n", "run.yaml: while constructing a mapping"),
        ("trainer:\n  run_dir: 2024\n", "trainer.run_dir is 2024; it takes text: put it in quotes"),
        ("trainer: [\n", "run.yaml: while parsing a flow node"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_sentence(
    file: Path, text: str, message: str
) -> None:
    file.write_text(text)
    with pytest.raises(ValueError) as refused:
        config.load(file)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_command_line_refuses_before_it_imports_torch(file: Path) -> None:
    code = (
        "import sys; from megatron_real.cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'megatron.core'} & sys.modules.keys(); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "train", str(file), "parallel.tp=8"]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert completed.returncode == 2
    assert completed.stderr.startswith("megatron-real: parallel.tp = 8 does not divide")
    assert completed.stderr.count("\n") == 1


def test_the_table_of_engines_in_the_docs_is_that_of_the_code() -> None:
    def cells(values: Iterable[object]) -> str:
        words = {True: "yes", False: "no"}
        return " | ".join(words[v] if isinstance(v, bool) else str(v) for v in values)

    engines = ENGINES.values()
    text = (ROOT / "docs/rollouts.md").read_text()
    assert f"| | {' | '.join(f'`{name}`' for name in ENGINES)} |" in text

    for start, values in (
        ("needs the package", [engine.package for engine in engines]),
        ("processes (and GPUs) of its own", [engine.own_processes for engine in engines]),
        ("may lag", [engine.may_lag for engine in engines]),
        ("tensor parallel", [engine.tensor_parallel for engine in engines]),
        ("KV cache of a fixed size", [engine.sized_kv_cache for engine in engines]),
        ("`model.dtype`", [", ".join(engine.dtypes) for engine in engines]),
        ("`auto` may take it", [engine.automatic for engine in engines]),
    ):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
        assert line.endswith(f"| {cells(values)} |"), line


def test_every_setting_is_documented() -> None:
    listed = {setting.path: setting for setting in every_setting()}
    assert [path for path, setting in listed.items() if not setting.meaning] == []
    assert {"objective.name", "objective.kl.to", "rollout.sync.probe_bound"} < listed.keys()
    assert "given" not in listed


def test_settings_are_listed_as_they_are_declared(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "rollout.group_size", "rollout.exclude_mismatch"]) == 0
    assert capsys.readouterr().out == (
        "rollout.group_size = 8   (whole number, above 0)\n"
        "    Completions per prompt (G).\n"
        "rollout.exclude_mismatch = null   (number or null, above 0)\n"
        "    Excludes a rollout whose mean |difference| (nats) is beyond this; costs one\n"
        "    more forward pass a step.\n"
    )
    assert cli.main(["config", "objective.one_class"]) == 0
    assert "= skip   (one of skip, keep)  [real]\n" in capsys.readouterr().out
    assert cli.main(["config", "objective.entropy"]) == 0
    assert "[" not in capsys.readouterr().out, "a setting of every objective"
    assert cli.main(["config", "nothing"]) == 2
    assert "no setting begins with nothing" in capsys.readouterr().err


@dataclass(frozen=True)
class Inner:
    size: Annotated[int, bounds.Positive] = 1


@dataclass(frozen=True)
class Outer:
    clip: Annotated[float, bounds.AtLeast(1)] = 1.0
    share: Annotated[float | None, bounds.Between(0, 0.5)] = None
    kind: Annotated[str, bounds.OneOf(("a", "b"))] = "a"
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"clip": 0.9}, "outer.clip is 0.9; it must be 1 or above"),
        ({"clip": math.nan}, "outer.clip is nan; it must be 1 or above"),
        ({"share": 0.6}, "outer.share is 0.6; it must lie in [0, 0.5], or null"),
        ({"inner": Inner(size=0)}, "outer.inner.size is 0; it must be above 0"),
        ({"kind": "c"}, "outer.kind is c; it takes one of a, b"),
    ],
    ids=str,
)
def test_a_value_beyond_the_bound_of_its_field_is_refused(
    settings: dict[str, Any], sentence: str
) -> None:
    bounds.check_bounds(Outer(share=0.5, clip=1.0))
    with pytest.raises(ValueError) as refused:
        bounds.check_bounds(Outer(**settings), "outer.")
    assert str(refused.value) == sentence


def test_every_number_has_a_bound() -> None:
    """A threshold may be any number. The default of every number is within its bound."""
    unbounded = []
    sections = {section.name: getattr(Config(), section.name) for section in fields(Config)}
    sections["rollout.sync"] = Config().rollout.sync
    for name in OBJECTIVES:
        sections[name] = make_objective(name)
        sections[f"{name}.kl"] = make_objective(name).kl
    for section, values in sections.items():
        if not dataclasses.is_dataclass(values):
            continue
        for name, hint in bounds.hints(type(values)).items():
            plain = bounds.plain_hint(hint)
            if plain in (int, float, int | None, float | None):
                is_bounded = hasattr(hint, "__metadata__")
                if not is_bounded:
                    unbounded.append(f"{section}.{name}")

    assert unbounded == ["labels.threshold"]
