"""The figures of `megatron-real plan` against values derived by hand.

Its memory is measured in tests/distributed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_real import cli, config
from megatron_real.config import Config, ParallelConfig
from megatron_real.plan.devices import DEVICES
from megatron_real.plan.layouts import Estimate, ranked, told_apart
from megatron_real.plan.measured import Rates, measured, measured_device
from megatron_real.plan.memory import (
    ENGINE_ASLEEP,
    Shapes,
    in_flight,
    kv_bytes_per_token,
    stage_memory,
    stage_parameters,
)
from megatron_real.plan.speed import Cluster, PlannedRun, _decay, step_time
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rows import append_row
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.published import published_model

ROOT = Path(__file__).parents[2]
R1_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
RECIPE = ["trainer.steps=1000", "rollout.kv_cache_mib=32768"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(R1_7B))
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{path: {tmp_path / 'model'}}}\n")
    return path


def planned(
    file: Path, *words: str, gpus: int = 32, gpu: str = "h100-80g", **known: float
) -> PlannedRun:
    read = config.load(file, [*RECIPE, *words])
    return PlannedRun(Architecture.from_config(R1_7B), read, Cluster(DEVICES[gpu], gpus, **known))


def plan(file: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    code = cli.main(["plan", str(file), *RECIPE, "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def gpu_day(share: float = 0.5, *, rehearsed: bool = False, machine: str = "NVIDIA H100") -> str:
    """Returns JSON as tools/gpu_day.py writes it: two stages with a utilization, and one that was
    left out.
    """
    stages = {
        "head": {"status": "left out", "reason": "3 s were left"},
        "step-1.5b": {
            "status": "done",
            "machine": f"{machine}, torch 2.13.0",
            "train_utilization": {"billions": 1.5, "share": share / 2},
        },
        "step-7b": {
            "status": "done",
            "machine": f"{machine}, torch 2.13.0",
            "train_utilization": {"billions": 7.6, "share": share},
        },
    }
    return json.dumps({"rehearsed_on_a_cpu": rehearsed, "stages": stages})


REHEARSED = [
    # model, GPUs, stage, micro-batches, GiB at the peak of a gradient, further words
    ("r1-distill-qwen-7b", 16, 0, 3, 62.19, ()),
    ("r1-distill-qwen-7b", 16, 0, 3, 34.19, ("parallel.tp=4",)),
    ("r1-distill-qwen-7b", 16, 0, 4, 50.67, ("parallel.pp=2",)),
    ("r1-distill-qwen-7b", 16, 1, 4, 34.58, ("parallel.pp=2",)),
    ("r1-distill-qwen-32b", 32, 0, 4, 51.55, ("parallel.tp=8", "parallel.pp=2")),
    ("r1-distill-qwen-32b", 32, 1, 4, 38.49, ("parallel.tp=8", "parallel.pp=2")),
    ("r1-distill-llama-70b", 64, 0, 8, 68.03, ("parallel.tp=8", "parallel.pp=4")),
    ("r1-distill-llama-70b", 64, 3, 8, 38.06, ("parallel.tp=8", "parallel.pp=4")),
]
"""With TransformerEngine's layers, by the commands of docs/rehearsal.md."""


@pytest.mark.parametrize(("model", "gpus", "stage", "micro_batches", "gib", "words"), REHEARSED)
def test_planned_memory_equals_that_of_rehearsals_at_true_sizes(
    model: str, gpus: int, stage: int, micro_batches: int, gib: float, words: tuple[str, ...]
) -> None:
    path = published_model(model)
    recipe = config.load(
        str(ROOT / "examples/configs/real_7b.yaml"), (*words, f"model.path={path}")
    )
    memory = stage_memory(
        Architecture.read(path),
        recipe,
        dp=config.check_world(recipe, gpus),
        shapes=Shapes(micro_batches, layers="te", device="cuda"),
    )[stage]
    assert memory.resident.total + memory.update.total == pytest.approx(gib * 2**30, rel=0.01)


def test_rates_of_a_gpu_day_take_the_place_of_published_ones(tmp_path: Path) -> None:
    file = tmp_path / "gpu-day.json"
    file.write_text(gpu_day(0.5))
    device = measured_device(file, DEVICES["h100-80g"])
    assert device.train_utilization(int(7.6e9)) == 0.5
    assert device.train_utilization(int(1.5e9)) == 0.25
    assert device.sources[0] == f"training: measured by tools/gpu_day.py, {file}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (gpu_day(rehearsed=True), "was rehearsed on a CPU"),
        (gpu_day(machine="NVIDIA A100-SXM4-80GB"), "was measured on NVIDIA A100-SXM4-80GB, not on"),
        (gpu_day(50), "has a utilization of 25.0; it must be above 0 and at most 1"),
        ('{"rehearsed_on_a_cpu": false, "stages": {}}', "has no utilization of a train step"),
        ("[1]", "is not the JSON that tools/gpu_day.py writes"),
        (None, "is not the JSON that tools/gpu_day.py writes"),
    ],
)
def test_an_invalid_file_of_rates_is_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "gpu-day.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        measured_device(file, DEVICES["h100-80g"])


def test_the_parameters_of_7b_equal_those_computed_by_hand() -> None:
    """Qwen2 7B: 28 layers of 3584 x 4608 + 4608 (q, k, v), 3584 x 3584, 3 x 3584 x 18944 and two
    norms; embedding and head of 152064 x 3584; the last norm. Its published count is 7,615,616,512.
    """
    a = Architecture.from_config(R1_7B)
    assert stage_parameters(a, ParallelConfig(), 0) == a.num_parameters == 7_615_616_512


@pytest.mark.parametrize(("tp", "pp"), [(1, 4), (2, 1), (4, 2), (4, 7)])
def test_every_parameter_is_on_one_stage_and_one_rank_but_norms_on_all(tp: int, pp: int) -> None:
    a = Architecture.from_config(R1_7B)
    shards = sum(
        tp * stage_parameters(a, ParallelConfig(tp=tp, pp=pp), stage) for stage in range(pp)
    )
    # Each of the tp ranks holds every norm whole: two in each of 28 layers, and the last one.
    norms = (2 * 28 + 1) * 3584
    assert shards == a.num_parameters + (tp - 1) * norms


def test_a_tied_head_on_another_stage_is_a_copy() -> None:
    a = dataclasses.replace(Architecture.from_config(R1_7B), tied=True)
    both = sum(stage_parameters(a, ParallelConfig(pp=2), stage) for stage in range(2))
    assert both - stage_parameters(a, ParallelConfig(), 0) == 152064 * 3584


@pytest.mark.parametrize(
    ("pp", "vpp", "micro_batches", "expected"),
    [(1, 1, 8, [1]), (4, 1, 8, [4, 3, 2, 1]), (4, 1, 2, [2, 2, 2, 1]), (2, 2, 8, [5, 3])],
)
def test_micro_batches_in_flight_are_those_of_1f1b(
    pp: int, vpp: int, micro_batches: int, expected: list[int]
) -> None:
    """1F1B warms up with as many forward passes as stages follow; interleaved, with two for each
    and (vpp - 1) x pp more.
    """
    parallel = ParallelConfig(pp=pp, vpp=vpp)
    assert [in_flight(parallel, stage, micro_batches) for stage in range(pp)] == expected


def test_resident_bytes_equal_those_computed_by_hand(file: Path) -> None:
    """In bf16 a parameter takes 2 bytes of weight and 4 of gradient; 12 of master weight and
    moments are shared by the 8 data-parallel ranks.
    """
    run = planned(file, "parallel.tp=4", "parallel.sp=true")
    (stage,) = stage_memory(run.architecture, run.config, dp=run.dp, shapes=Shapes(micro_batches=1))
    n = stage.resident.parameters
    assert (stage.resident.weights, stage.resident.gradients) == (2 * n, 4 * n)
    assert stage.resident.optimizer == 12 * n // 8

    whole = dataclasses.replace(
        run.config, optimizer=dataclasses.replace(run.config.optimizer, distributed=False)
    )
    assert (
        stage_memory(run.architecture, whole, dp=8, shapes=Shapes(1))[0].resident.optimizer
        == 12 * n
    )


def test_kv_bytes_of_a_token_equal_those_computed_by_hand(file: Path) -> None:
    """Key and value of 28 layers x 4 heads x 128 x 2 bytes; a rank holds at least one head."""
    run = planned(file)
    assert kv_bytes_per_token(run.architecture, run.config) == 57_344

    # 28 ranks share 4 KV heads: each rank still holds one.
    wide = planned(file, "rollout.tp=28").config
    assert kv_bytes_per_token(run.architecture, wide) == 57_344 // 4


def test_a_sleeping_engine_leaves_the_update_its_memory(file: Path) -> None:
    asleep, awake = (
        Estimate(planned(file, f"rollout.sleep_level={level}")).stages[0] for level in (2, 0)
    )
    assert (
        awake.peaks["update"] - asleep.peaks["update"]
        == sum(asleep.engine.values()) - ENGINE_ASLEEP
    )
    assert sum(asleep.engine.values()) > 40 << 30
    assert awake.peaks["rollout"] == asleep.peaks["rollout"]


def test_the_counts_of_the_recipes_step_equal_those_computed_by_hand(file: Path) -> None:
    """128 prompts x 8, 32 prompts an update; 256 + 4096 tokens: 3 rollouts in 16,384, 32 a rank:
    11 micro-batches.
    """
    run = planned(file, "parallel.tp=4")
    assert run.dp == 8
    assert run.rollouts == 1024
    assert run.config.updates_per_step == 4
    assert run.mean_tokens == 4352
    assert run.micro_batches == 11

    # With interleaved stages the number is rounded up to a multiple of the 4 stages.
    assert planned(file, "parallel.pp=4", "parallel.vpp=7").micro_batches == 12


@pytest.mark.parametrize(
    ("words", "passes"),
    [
        pytest.param(("batch.placement=split",), (0.75, 0, 3.75), id="real, groups cut"),
        pytest.param(("objective.name=grpo", "batch.placement=split"), (0.75, 0, 3), id="tokens"),
        pytest.param(("objective.name=disco",), (0.75, 0, 4), id="the minibatch, no free first"),
        pytest.param(("objective.kl.to=reference",), (0.75, 1, 3), id="a reference"),
        pytest.param(("objective.kl.to=old",), (0.75, 0, 3), id="KL to what is known anyway"),
    ],
)
def test_passes_are_those_of_the_objective(
    file: Path, words: tuple[str, ...], passes: tuple[float, float, float]
) -> None:
    """Counts forward passes of a step: old log-probs of 3 of 4 minibatches, the reference, and the
    updates, with a scoring pass where scores are coupled beyond a training pass.
    """
    run = planned(file, *words, gpus=1, train_utilization=0.4)
    # 1024 rollouts of 4352 tokens, with half of that as mean context; an H100's peak is 989
    # TFLOP/s.
    forward = 1024 * 4352 * run.architecture.flops_per_token(2176) / (989e12 * 0.4)
    seconds = step_time(run)
    counted = (seconds.old_logprobs, seconds.reference, seconds.update)
    assert counted == pytest.approx(tuple(n * forward for n in passes))
    parts = seconds.sync + seconds.rollout + sum(counted)
    assert seconds.total == pytest.approx(parts)


def test_the_time_of_an_update_on_one_gpu_is_work_over_speed(file: Path) -> None:
    """One GPU has no traffic: an update is 3 forward passes at the given share of 989 TFLOP/s, or 4
    when recomputed; the old log-probs are those of 3 of 4 minibatches.
    """
    run = planned(file, gpus=1, train_utilization=0.4)
    forward = 1024 * 4352 * run.architecture.flops_per_token(2176) / (989e12 * 0.4)
    seconds = step_time(run)
    assert seconds.update == pytest.approx(3 * forward)
    assert seconds.old_logprobs == pytest.approx(0.75 * forward)
    assert step_time(
        planned(file, "model.recompute=full", gpus=1, train_utilization=0.4)
    ).update == pytest.approx(4 * forward)


def test_the_pipeline_bubble_is_counted(file: Path) -> None:
    """(pp - 1) / (micro-batches x vpp) of the time is idle."""
    flat, piped = (
        step_time(planned(file, *words, gpus=8)).old_logprobs for words in ((), ("parallel.pp=2",))
    )
    count = planned(file, "parallel.pp=2", gpus=8).micro_batches
    assert piped / flat == pytest.approx(1 + 1 / count)


def test_the_time_of_decoding_is_that_of_reading_weights_and_cache(file: Path) -> None:
    """With one sequence an engine, each of the 8192 steps reads the weights and, on average, half
    of the longest context.
    """
    words = ("rollout.num_prompts=8", "rollout.group_size=4", "batch.minibatch_prompts=8")
    run = planned(file, *words, decode_utilization=0.5, mean_response=8192)
    read = run.weight_bytes + (256 + 4096) * 57_344
    assert step_time(run).rollout == pytest.approx(8192 * read / (3350e9 * 0.5), rel=0.01)


SERVERS = ["rollout.engine=vllm-server", "rollout.num_servers=4", "rollout.tp=2"]


def test_servers_decode_on_gpus_of_their_own(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """4 servers of 2 GPUs decode as fast as 8 training GPUs with rollout.tp=2, and the policy keeps
    its GPUs to itself.
    """
    inside, apart = (
        Estimate(planned(file, "parallel.tp=4", *words, gpus=8))
        for words in (["rollout.tp=2"], SERVERS)
    )

    assert (
        apart.seconds.rollout == inside.seconds.rollout
        and apart.seconds.update == inside.seconds.update
    )

    sent = 7_615_616_512 * 2
    assert apart.seconds.sync - inside.seconds.sync == pytest.approx(
        sent / 1e9 / DEVICES["h100-80g"].network_gb
    )
    assert apart.server == inside.stages[0].engine and apart.stages[0].engine == {}

    (stage,) = apart.stages
    assert stage.peaks["rollout"] == stage.resident.total
    assert stage.sync == 3 * 152064 * 3584 * 2 == inside.stages[0].sync * 3 / 2, (
        "the embedding is more than a bucket"
    )
    assert apart.gpu_hours == 16 * apart.hours
    assert {made.run.config.rollout.tp for made in ranked(apart.run)} == {2}

    full = dataclasses.replace(apart.run.config.rollout, kv_cache_mib=80 << 10)
    run = dataclasses.replace(apart.run, config=dataclasses.replace(apart.run.config, rollout=full))
    assert Estimate(run).peak <= apart.budget and not Estimate(run).fits, (
        "a server has no room for its cache"
    )
    assert cli.main(["plan", str(file), *RECIPE, "--gpus", "8", "parallel.tp=4", *SERVERS]) == 0

    output = capsys.readouterr().out
    assert "8 x h100-80g and 8 that serve: " in output
    assert "a GPU that serves: 42.09 GiB (weights 7.09, kv_cache 32.00, overhead 3.00)" in output


def test_rollouts_ahead_are_hidden_behind_training(file: Path) -> None:
    """Of two stages that run beside each other, the shorter one costs nothing."""
    for gpus, servers, hidden in ((64, 1, "training"), (1, 64, "rollout")):
        words = ["rollout.engine=vllm-server", f"rollout.num_servers={servers}"]
        now, ahead = (
            step_time(planned(file, *words, f"rollout.max_lag={lag}", gpus=gpus)) for lag in (0, 1)
        )
        training = ahead.old_logprobs + ahead.update
        assert ahead.ahead == {"training": training, "rollout": ahead.rollout}[hidden]
        assert ahead.total == pytest.approx(ahead.sync + max(ahead.rollout, training))
        assert now.ahead == 0 and ahead.old_logprobs == pytest.approx(now.old_logprobs * 4 / 3)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_decay_gives_the_mean(share: float) -> None:
    rate = _decay(share)
    points = 100_000
    mean = sum(math.exp(-rate * (i + 0.5) / points) for i in range(points)) / points
    assert mean == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_utilization_lies_between_the_measured(device: Any) -> None:
    for billions, share in device.utilization.items():
        assert device.train_utilization(int(billions * 1e9)) == pytest.approx(share, rel=1e-6)
    sizes = sorted(device.utilization)
    between = device.train_utilization(int((sizes[0] + sizes[1]) / 2 * 1e9))
    assert between == pytest.approx(
        (device.utilization[sizes[0]] + device.utilization[sizes[1]]) / 2, rel=1e-6
    )
    assert device.train_utilization(10**12) == device.utilization[sizes[-1]]


@pytest.mark.parametrize("gpus", [8, 16, 32, 64])
def test_ranked_layouts_pass_the_checks_of_a_run(file: Path, gpus: int) -> None:
    layouts = ranked(planned(file, gpus=gpus))
    assert len({made.run.config.parallel for made in layouts}) == len(layouts) > 3
    for made in layouts:
        assert config.check_world(made.run.config, gpus) == made.run.dp
        config.check_model(made.run.config)
        assert made.peak <= made.budget
    best = min(made.seconds.total for made in layouts)
    assert layouts[0].seconds.total < best * 1.05


@pytest.mark.parametrize("gpus", [8, 16, 32, 64])
@pytest.mark.parametrize("size", ["1.5b", "7b"])
def test_the_shipped_recipes_fit_in_80_gb(
    file: Path, size: str, gpus: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory with R1-Distill-Qwen's config.json of that size stands in for the model."""
    small = {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    }
    architecture = R1_7B
    if size == "1.5b":
        architecture = R1_7B | small | {"vocab_size": 151936}
    model = file.parent / "model"
    (model / "config.json").write_text(json.dumps(architecture))
    recipe = ROOT / f"examples/configs/real_{size}.yaml"

    assert (
        cli.main(
            ["plan", str(recipe), "--gpus", str(gpus), "--gpu", "a100-80g", f"model.path={model}"]
        )
        == 0
    )
    assert "fits: " in capsys.readouterr().out


def test_the_json_and_the_exit_code_say_whether_a_layout_fits(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = plan(
        file, capsys, "--gpus", "32", "parallel.tp=4", "parallel.sp=true", "--price", "2"
    )
    assert code == 0 and report["layout"]["fits"] and report["layout"]["dp"] == 8

    layout = report["layout"]
    assert layout["seconds"]["step"] == pytest.approx(
        sum(s for n, s in layout["seconds"].items() if n != "step")
    )
    assert layout["usd"] == pytest.approx(layout["seconds"]["step"] * 1000 / 3600 * 32 * 2)
    assert (
        layout["peak_bytes"] == max(report["memory"][0]["peaks"].values()) <= report["budget_bytes"]
    )
    assert len(report["best"]) == 5 and report["not_modelled"] == []

    code, report = plan(
        file,
        capsys,
        "--gpus",
        "1",
        "--gpu",
        "a100-40g",
        "megatron.num_distributed_optimizer_instances=1",
    )

    assert code == 1 and not report["layout"]["fits"] and report["best"] == []
    assert report["not_modelled"] == ["megatron.num_distributed_optimizer_instances"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus is 0; it must be above 0"),
        (
            ["--gpus", "8", "--train-utilization", "1.5"],
            "--train-utilization is 1.5; it must be above 0 and at most 1",
        ),
        (
            ["--gpus", "8", "parallel.tp=8"],
            "parallel.tp = 8 does not divide the model's 28 attention heads",
        ),
        (["--gpus", "12", "parallel.pp=7"], "does not divide the 12 processes"),
        (["--gpus", "8", "parallel.pp=8"], "does not divide the model's 28 layers"),
        (["--gpus", "512"], "512 data-parallel ranks share the 256 rollouts of an update"),
        (["--gpus", "8", "rollout.kv_cache_mib=100"], "does not hold one sequence"),
        (
            ["--gpus", "8", "rollout.engine=vllm-server", "rollout.num_servers=3"],
            "3 servers cannot be shared equally by 8 processes",
        ),
    ],
)
def test_an_invalid_plan_is_refused_in_one_sentence(
    file: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(file), *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("megatron-real: ") and err.count("\n") == 1


def test_a_plan_imports_no_torch_and_shows_every_part(file: Path) -> None:
    code = (
        "import sys; from megatron_real.cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'megatron.core'} & sys.modules.keys(); sys.exit(code)"
    )
    words = [
        "plan",
        str(file),
        "--gpus",
        "16",
        "parallel.pp=2",
        "parallel.tp=2",
        "model.recompute=full",
        *RECIPE,
    ]
    completed = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, timeout=240
    )
    assert completed.returncode == 0, completed.stderr

    for part in (
        "weights",
        "optimizer",
        "engine: kv_cache",
        "peak of rollout",
        "GPU-hours",
        "tp=2 pp=2 dp=4",
    ):
        assert part in completed.stdout


def test_ranking_leaves_the_configuration_as_it_is(file: Path) -> None:
    """It tries other layouts on copies."""
    run = planned(file)
    before = config.to_dict(run.config)
    ranked(run)
    assert isinstance(run.config, Config) and config.to_dict(run.config) == before


def test_a_bare_name_is_planned_under_the_fastest_layout(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # there is no file
    assert cli.main(["plan", "--model", "r1-distill-qwen-7b"]) == 0
    output = capsys.readouterr().out
    assert "r1-distill-qwen-7b, 7.62B parameters, on 8 x h100-80g: " in output
    assert max(map(len, output.splitlines())) <= 80
    assert cli.main(["plan", "r1-distill-qwen-7b"]) == 0
    assert capsys.readouterr().out == output
    assert cli.main(["plan"]) == 2
    assert "nothing says what is planned" in capsys.readouterr().err


def test_several_numbers_of_gpus_are_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "r1-distill-qwen-7b", "--gpus", "1,8,16", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["sweep"]
    assert [row["gpus"] for row in rows] == [1, 8, 16]
    assert rows[0]["layout"] is None, "7B does not train on one GPU of 80 GB"
    assert rows[2]["layout"]["seconds"]["step"] < rows[1]["layout"]["seconds"]["step"]
    assert cli.main(["plan", "r1-distill-qwen-7b", "--gpus", "1,8,16"]) == 0
    table = capsys.readouterr().out
    assert "1: none fits" in table
    assert max(map(len, table.splitlines())) <= 80


def test_a_model_too_large_for_an_engine_of_one_gpu_gets_a_larger_engine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """131 GiB of weights exceed the GPU: rollout.tp=1 must not hide that 70B trains with engines of
    8 GPUs.
    """
    assert cli.main(["plan", "r1-distill-llama-70b", "--gpus", "8,32"]) == 0
    output = capsys.readouterr().out
    assert "8: none fits" in output
    taken = "No layout fits with engines of rollout.tp=1; taken are rollout.tp=8 on 32 GPUs."
    assert taken in " ".join(output.split())
    assert max(map(len, output.splitlines())) <= 80

    assert cli.main(["plan", "r1-distill-llama-70b", "--gpus", "8"]) == 1
    assert re.search(r"nearest that works: .*, rollout.tp=8\)", capsys.readouterr().out)


def test_the_engine_of_a_model_that_fits_is_as_configured(file: Path) -> None:
    """Larger engines are only the last resort: 7B fits on one GPU, and on two where two are asked
    for.
    """
    assert {made.run.config.rollout.tp for made in ranked(planned(file))} == {1}
    wider = ranked(planned(file, "rollout.tp=2"))
    assert {made.run.config.rollout.tp for made in wider} <= {1, 2}


def test_memory_that_the_kv_cache_leaves_free_is_reported(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The larger cache that the sentence names fits, and its step takes the seconds that were
    promised.
    """
    assert cli.main(["plan", str(file), "parallel.tp=4", "rollout.kv_cache_mib=4096"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    promise = re.search(r"with (rollout.kv_cache_mib=\d+) a step takes ([\d.]+) s", output)
    assert promise is not None
    words = ["parallel.tp=4", promise[1]]
    assert cli.main(["plan", str(file), *words, "--json"]) == 0
    layout = json.loads(capsys.readouterr().out)["layout"]
    assert f"{told_apart(layout['seconds']['step']):g}" == promise[2]

    assert cli.main(["plan", str(file), *words]) == 0
    assert "stay free while" not in capsys.readouterr().out


def test_too_few_gpus_are_answered_with_the_nearest_number_that_works(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["plan", "r1-distill-qwen-7b", "--gpus", "2"]) == 1
    output = capsys.readouterr().out
    assert "The nearest that works: 4 x h100-80g" in output
    assert "2 x h200-141g" in output


def test_a_file_s_layout_that_does_not_divide_the_gpus_is_replaced(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(f"{file.read_text()}parallel: {{tp: 4, sp: true}}\n")
    assert cli.main(["plan", str(file), "--gpus", "6", "--gpu", "b200-180g"]) == 0
    assert "the configured layout does not divide 6 GPUs" in capsys.readouterr().out


def test_the_ranking_is_in_the_order_of_its_seconds(file: Path) -> None:
    seconds = [told_apart(made.seconds.total) for made in ranked(planned(file, gpus=32))]
    assert seconds == sorted(seconds)
    assert (
        told_apart(467.2) == 470
        and told_apart(0.0123) == 0.0125
        and told_apart(117.48) == 115
        and told_apart(0.0) == 0.0
    )


def test_a_run_s_own_rates_take_the_place_of_published_ones(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match="which has no metrics"):
        measured(run, Rates())
    for length, mfu in ((100.0, 0.2), (300.0, None), (None, 0.4)):
        append_row(run.metrics, {"step": 1, "response_tokens_mean": length, "mfu": mfu})

    rates = measured(run, Rates(decode=0.5))
    assert rates.train == pytest.approx(0.3)
    assert dataclasses.replace(rates, train=None) == Rates(decode=0.5, mean_response=200.0)
    assert measured(run, Rates(train=0.1, mean_response=7.0)).train == 0.1


def test_a_stage_that_is_hidden_adds_no_time(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ahead = ["rollout.engine=vllm-server", "rollout.max_lag=1", "parallel.tp=4", "--gpus", "8"]
    cli.main(["plan", str(file), *RECIPE, *ahead])
    output = capsys.readouterr().out
    assert " s of the rollout are hidden behind training" in output
    assert "-" not in [cell[:1] for line in output.splitlines() for cell in line.split()[1:2]]


def test_a_sweep_costs_what_its_runs_cost(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are two seeds of a cheap variant, and two of one with a reference policy."""
    kl = "kl: {to: reference, estimator: k3, coefficient: 0.001}"
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"base: {file.name}\nout: runs/none\nseeds: [1, 2]\nbudget: 1024000\n"
        f"variants:\n  real: {{}}\n  grpo: {{objective: {{name: grpo, {kl}}}}}\n"
    )
    words = ["--json", "--gpus", "32", "rollout.kv_cache_mib=32768", "parallel.tp=4"]

    assert cli.main(["plan", str(sweep), *words]) == 0

    planned_sweep = json.loads(capsys.readouterr().out)
    objective = [
        "objective.name=grpo",
        "objective.kl.to=reference",
        "objective.kl.coefficient=0.001",
    ]
    alone = [plan(file, capsys, "--gpus", "32", "parallel.tp=4", *more) for more in ([], objective)]
    hours = [whole["layout"]["gpu_hours"] for _, whole in alone]

    assert hours[0] < hours[1], "a reference policy takes time"

    of_variants = [layout["gpu_hours"] for layout in planned_sweep["variants"].values()]
    assert of_variants == pytest.approx(hours)
    assert planned_sweep["total"]["gpu_hours"] == pytest.approx(2 * sum(hours))
    assert cli.main(["plan", str(sweep), "--gpus", "8,16"]) == 2
    assert "one number of GPUs" in capsys.readouterr().err


def test_scoring_beside_an_engine_that_is_awake_counts(file: Path) -> None:
    without, with_it = (
        Estimate(planned(file, *words)).stages[0]
        for words in ([], ["rollout.exclude_mismatch=0.5"])
    )
    scoring = with_it.peaks["rollout"] - without.peaks["rollout"]
    assert scoring == without.old_logprobs.total > 0
