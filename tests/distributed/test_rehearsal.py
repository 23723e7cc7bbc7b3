"""Rehearsals: every layout kind on a tiny model, figures against closed forms,
and planted faults that must be caught.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_real.objective.registry import OBJECTIVES
from megatron_real.rehearsal import transformer_engine
from megatron_real.rehearsal.launch import rehearse
from megatron_real.rehearsal.report import RankReport, Request
from tests.amount import on_first_version
from tests.distributed import test_plan_memory as plan_memory
from tests.distributed.world import World

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="a rehearsal needs g++"),
    pytest.mark.skipif(
        torch.version.cuda is not None, reason="a rehearsal needs a build of torch without CUDA"
    ),
    pytest.mark.xdist_group("rehearsal"),  # the layouts are rehearsed by one worker, once
]

HIDDEN = 128
FFN = 256
LAYERS = 4
HEADS = 4
KV_HEADS = 2
VOCABULARY = 512
TINY = {
    "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": LAYERS, "hidden_size": HIDDEN,
    "intermediate_size": FFN, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
PROMPT = 32
RESPONSE = 96
TOKENS = 256
WORDS = (
    "model.layers=local",
    f"data.max_prompt_tokens={PROMPT}",
    f"rollout.max_response_tokens={RESPONSE}",
    f"batch.max_tokens={TOKENS}",
    "rollout.engine=vllm",
    "rollout.group_size=4",
    "rollout.sync.probe_every=0",
)

# name -> (GPUs, rank, further words)
LAYOUTS: dict[str, tuple[int, int, str]] = {
    "dp": (4, 1, ""),
    "tp": (2, 1, "parallel.tp=2"),
    "sp": (2, 0, "parallel.tp=2 parallel.sp=true"),
    "more-tp-than-kv-heads": (4, 3, "parallel.tp=4 parallel.sp=true"),
    "first-stage": (2, 0, "parallel.pp=2"),
    "last-stage": (2, 1, "parallel.pp=2"),
    "interleaved": (4, 1, "parallel.pp=2 parallel.vpp=2"),
    "interleaved-last": (4, 3, "parallel.pp=2 parallel.vpp=2"),
    "cp": (2, 1, "parallel.cp=2"),
    "all": (16, 9, "parallel.tp=2 parallel.sp=true parallel.pp=2 parallel.cp=2"),
    "padded": (2, 0, "batch.layout=padded"),
    "logits": (2, 0, "parallel.tp=2 model.logprobs=logits"),
    "full": (1, 0, "model.recompute=full"),
    "selective": (1, 0, "model.recompute=selective"),
    "split": (2, 0, "batch.placement=split"),
    "logits-split": (2, 0, "parallel.tp=2 model.logprobs=logits batch.placement=split"),
    "placed-dp": (2, 0, "batch.placement=dp"),
    "offload": (2, 0, "rollout.offload_optimizer=true"),
    "lag": (2, 0, "rollout.engine=vllm-server rollout.max_lag=1"),
    "mismatch": (2, 0, "rollout.exclude_mismatch=0.5"),
    "fp32": (2, 0, "model.dtype=fp32"),
    "entropy": (2, 0, "parallel.tp=2 objective.name=grpo objective.entropy_bonus=0.01"),
    "kl": (2, 0, "objective.kl.to=reference objective.kl.coefficient=0.1"),
    "te": (4, 1, "model.layers=te"),
    "te-sp": (2, 0, "model.layers=te parallel.tp=2 parallel.sp=true"),
    "te-last-stage": (4, 3, "model.layers=te parallel.tp=2 parallel.sp=true parallel.pp=2"),
    "te-interleaved": (4, 1, "model.layers=te parallel.pp=2 parallel.vpp=2"),
    "te-cp": (2, 1, "model.layers=te parallel.cp=2"),
    "te-cp-first": (4, 0, "model.layers=te parallel.tp=2 parallel.sp=true parallel.cp=2"),
    "te-full": (1, 0, "model.layers=te model.recompute=full"),
    "te-selective": (1, 0, "model.layers=te model.recompute=selective"),
    "te-offload": (2, 0, "model.layers=te rollout.offload_optimizer=true"),
    **{f"objective-{name}": (2, 1, f"objective.name={name} parallel.tp=2") for name in OBJECTIVES},
}

# Each layout takes 2 s: these see every kind of schedule, collective and phase once, and the closed
# forms use them.
DEFAULT = [
    "dp", "tp", "interleaved-last", "all", "logits-split", "full", "offload", "lag", "mismatch",
]  # fmt: skip
if not on_first_version():
    DEFAULT = ["dp", "tp", "all", "full", "mismatch"]
TE = pytest.mark.skipif(
    transformer_engine.root() is None,
    reason="TransformerEngine's Python is missing: docs/testing.md",
)


def row(name: str) -> Any:
    """A test's parameter: layouts that are not of the default run in the grid alone."""
    marks = []
    if name not in DEFAULT:
        marks.append(pytest.mark.grid)
    if name.startswith("te"):
        marks.append(TE)
    return pytest.param(name, marks=marks)


ROWS = [row(name) for name in LAYOUTS]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "config.json").write_text(json.dumps(TINY))
    file = folder / "run.yaml"
    file.write_text(f"model: {{path: {folder}}}\n")
    return file


def request_of(file: Path, gpus: int, rank: int, words: str) -> Request:
    return Request(str(file), (*WORDS, *words.split()), gpus=gpus, rank=rank, micro_batches=2)


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest, config_file: Path) -> Mapping[str, RankReport]:
    """The default layouts, and those of the grid that a selected test names.

    One process rehearses all of them: it imports torch and megatron-core once.
    """
    here = [item for item in request.session.items if item.path == request.path]
    calls = [item.callspec for item in here if hasattr(item, "callspec")]
    named = {call.params.get("name") for call in calls}
    names = tuple(name for name in LAYOUTS if name in DEFAULT or name in named)
    if transformer_engine.root() is None:
        names = tuple(name for name in names if not name.startswith("te"))
    requests = [request_of(config_file, *LAYOUTS[name]) for name in names]
    return dict(zip(names, rehearse(requests), strict=True))


@pytest.mark.parametrize("name", ROWS)
def test_every_layout_runs(reports: Mapping[str, RankReport], name: str) -> None:
    report = reports[name]
    assert not report.fault

    names = [phase.name for phase in report.phases]
    assert names[:5] == ["build", "pack", "old_logprobs", "gradient", "optimizer"]


SYNCS_AT_MOST = 2
"""A micro-batch: scores to the host, weights back.

What a pass does once does not count with the micro-batches.
"""
OF_A_PASS = 5
"""Loss, figures, scores, and megatron-core's count of tokens, which it reads once an update."""


@pytest.mark.parametrize("name", ROWS)
def test_a_pass_does_not_wait_for_the_device_in_a_layer(
    reports: Mapping[str, RankReport], name: str
) -> None:
    report = reports[name]
    for phase in report.phases:
        assert phase.syncs_in_layers == 0, dict(phase.syncs)
    assert report.phase("pack").num_syncs == 0
    assert report.phase("old_logprobs").num_syncs == 0
    gradient = report.phase("gradient")
    allowed = SYNCS_AT_MOST * report.micro_batches + OF_A_PASS
    assert gradient.num_syncs <= allowed, dict(gradient.syncs)


@pytest.mark.parametrize("name", [row("dp"), row("te")])
def test_flops_are_those_of_the_closed_form(reports: Mapping[str, RankReport], name: str) -> None:
    report = reports[name]
    tokens = report.tokens * report.micro_batches
    sequences = report.sequences * report.micro_batches
    length = report.tokens // report.sequences
    head_dim = HIDDEN // HEADS
    qkv = HIDDEN * head_dim * (HEADS + 2 * KV_HEADS)
    matrices = qkv + HIDDEN * HIDDEN + 3 * HIDDEN * FFN
    # Two products of L x L / 2 x D for each head; the backward pass makes five.
    attention = sequences * HEADS * head_dim * length**2 * 2
    targets = tokens - sequences * (PROMPT - 1)
    head = 2 * targets * HIDDEN * VOCABULARY
    layers_forward = LAYERS * (2 * tokens * matrices + attention)
    assert report.phase("old_logprobs").flops == layers_forward + head
    # The head makes its gradient with the logits: one product for them, and two with their
    # gradient.
    layers_backward = LAYERS * (4 * tokens * matrices + attention * 5 // 2)
    assert report.phase("gradient").flops == layers_forward + layers_backward + 3 * head


def test_bytes_are_those_of_the_closed_form(reports: Mapping[str, RankReport]) -> None:
    data_parallel = reports["dp"]
    reduced = [c for c in data_parallel.phase("gradient").collectives if "reduce_scatter" in c.call]
    assert sum(c.num_bytes for c in reduced) == 4 * data_parallel.parameters

    # Under overlap_param_gather the first forward pass after an update gathers the parameters.
    collectives = data_parallel.phase("old_logprobs").collectives
    gathered = [c for c in collectives if "all_gather" in c.call]
    assert sum(c.num_bytes for c in gathered) == 2 * data_parallel.parameters // 4

    tensor_parallel = reports["tp"]
    forward = [
        c
        for c in tensor_parallel.phase("old_logprobs").collectives
        if c.call == "all_reduce" and c.dtype == "bfloat16"
    ]
    # The embedding's output, and two of each layer.
    calls = tensor_parallel.micro_batches * (1 + 2 * LAYERS)
    assert sum(c.calls for c in forward) == calls
    assert sum(c.num_bytes for c in forward) == calls * tensor_parallel.tokens * HIDDEN * 2


def gathered_over_data(report: RankReport, phase: str) -> int:
    """Bytes of this rank's shard that a phase gives to its data-parallel group."""
    return sum(
        c.num_bytes
        for c in report.phase(phase).collectives
        if "all_gather" in c.call and c.group.startswith("data_parallel")
    )


def test_parameters_are_gathered_once_after_an_update(reports: Mapping[str, RankReport]) -> None:
    """What comes first after an update gathers them, a checkpoint or a pass;
    what comes later, such as the stream, does not again.
    """
    report = reports["dp"]
    assert gathered_over_data(report, "sharded state") == 2 * report.parameters // 4
    assert gathered_over_data(report, "stream") == 0

    report = reports["mismatch"]
    assert gathered_over_data(report, "mismatch") == 2 * report.parameters // 2
    assert gathered_over_data(report, "sharded state") == 0


@pytest.mark.grid
def test_the_peak_of_memory_is_that_of_torch_on_a_cpu(
    world: World, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The same update of the same model, with fake CUDA tensors and with torch's own allocator."""
    config, (measured,) = plan_memory.measure(world, tiny_model, "plain")
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: {config.model.path}}}\n")
    words = (
        "model.layers=local", "model.dtype=fp32", "data.max_prompt_tokens=8",
        f"rollout.max_response_tokens={plan_memory.LENGTH - 8}", "rollout.engine=vllm",
        f"batch.max_tokens={config.batch.max_tokens}", "batch.placement=split",
        "rollout.group_size=2", "objective.one_class_groups=keep", "rollout.sync.probe_every=0",
    )  # fmt: skip
    (report,) = rehearse([Request(str(file), words, gpus=1, rank=0, micro_batches=1)])
    assert not report.fault
    assert report.tokens == config.batch.max_tokens
    assert report.parameters == measured["parameters"]
    assert report.resident == pytest.approx(measured["held"], rel=0.03)
    for phase, name in (("gradient", "update"), ("old_logprobs", "old_logprobs")):
        added = report.phase(phase).peak - report.resident
        assert added == pytest.approx(measured[name], rel=0.03), phase


@pytest.mark.parametrize("name", ["dp", "tp", "all", "full"])
def test_memory_is_near_the_plans(reports: Mapping[str, RankReport], name: str) -> None:
    report = reports[name]
    assert report.parameters == report.plan["parameters"]
    assert report.resident == pytest.approx(report.plan["resident"], rel=0.03)


def test_groups_have_the_runs_timeout(reports: Mapping[str, RankReport]) -> None:
    for group in reports["all"].groups:
        if group.name == "expert_data_parallel_group_gloo":
            continue  # megatron-core gives it none; dense models never use it
        assert group.timeout_minutes == 75.0, group


FAULTS = {
    "device": ("dist.all_reduce(torch.zeros(4, device='cpu'))", "on a group of nccl"),
    "dtype": ("dist.all_reduce(cuda.to(torch.int16))", "NCCL has no such dtype"),
    "strides": ("dist.broadcast(cuda.view(2, 4).t(), src=0)", "is not contiguous"),
    "size": ("dist.all_gather_into_tensor(cuda[:3], cuda[:2])", "do not make"),
    "mixed": ("cuda + torch.zeros(8, 1)", "device"),
    "sync": ("cuda.sum().item()", "item @ planted:1"),
    "pageable": ("cuda.to('cpu', non_blocking=True)", "pageable copy cuda to cpu @ planted:1"),
    "none": ("cuda.sum()", "nothing"),
}
SCRIPT = """
import json, sys
from datetime import timedelta
from megatron_real.rehearsal import device
device.load()
import torch, torch.distributed as dist
device.install("h100-80g")
from megatron_real.rehearsal.world import World
from megatron_real.rehearsal.meter import Meter
from torch._subclasses.fake_tensor import FakeTensorMode
world = World()
world.install()
world.place(0, 2)
dist.init_process_group("nccl", timeout=timedelta(minutes=1), device_id=torch.device("cuda:0"))
findings = {}
with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
    cuda = torch.zeros(8, device="cuda:0")
    for name, line in json.loads(sys.argv[1]).items():
        meter.restart()
        try:
            exec(compile(line, "planted", "exec"))
            findings[name] = " ".join(meter.syncs) or "nothing"
        except Exception as error:
            findings[name] = f"{error}"
print(json.dumps(findings))
"""


@pytest.fixture(scope="module")
def findings() -> Mapping[str, str]:
    """What is reported of each planted line, in one process."""
    lines = json.dumps({name: line for name, (line, _) in FAULTS.items()})
    words = [sys.executable, "-c", SCRIPT, lines]
    process = subprocess.run(words, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    findings: dict[str, str] = json.loads(process.stdout.splitlines()[-1])
    return findings


@pytest.mark.one_version
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(findings: Mapping[str, str], fault: str) -> None:
    assert FAULTS[fault][1] in findings[fault]


@pytest.mark.one_version
def test_the_optimizer_leaves_through_one_pinned_buffer(reports: Mapping[str, RankReport]) -> None:
    """Each way has one wait for the copies and one of megatron-core's, and the pinned buffer is no
    larger than what is copied.
    """
    report = reports["offload"]
    leave = report.phase("make_room")
    assert sum("pageable" in site for site in leave.syncs) == 0, dict(leave.syncs)
    assert leave.num_syncs <= 2 and report.phase("take_room_back").num_syncs <= 1
    state = 12 * report.parameters // 2  # over two data-parallel ranks
    assert state <= leave.pinned_host <= 1.02 * state

    snapshot = reports["lag"].phase("snapshot in and out")
    assert snapshot.num_syncs == 2, dict(snapshot.syncs)
