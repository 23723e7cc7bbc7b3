"""The stages of gpu_day.py, each in a process of its own: `python tools/gpu_stages.py STAGE
OUT.json [--rehearse]`.

A stage writes its rows to OUT.json after each of them, and ends with an error where a check fails.
With --rehearse sizes are tiny and the device may be a CPU; without a GPU and without it, a stage
refuses to run.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]

SHAPES: dict[str, dict[str, int]] = {
    "1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
    },
    "7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    },
}  # fmt: skip
"""DeepSeek-R1-Distill-Qwen's config.json, and a model for the rehearsal."""


class Report:
    """The stage's rows, on disk after each."""

    def __init__(self, file: Path, rehearse: bool) -> None:
        from bench_machine import describe

        self.file = file
        self.rehearse = rehearse
        self.rounds = 3
        """How often a benchmark measures."""
        if rehearse:
            self.rounds = 1
        self.content: dict[str, Any] = {"machine": describe(), "rows": []}

    def row(self, **columns: Any) -> None:
        """Adds a row; an error must be at most its bound."""
        self.content["rows"].append(columns)
        print(columns, flush=True)
        self._write()
        if "bound" in columns and not columns["error"] <= columns["bound"]:
            raise AssertionError(f"{columns}: the error is above its bound")

    def note(self, **values: Any) -> None:
        """Adds values beside the rows: `skipped` with its reason,
        `train_utilization` for the plan.
        """
        self.content.update(values)
        self._write()

    def _write(self) -> None:
        self.file.write_text(json.dumps(self.content), encoding="utf-8")


def kernels(report: Report) -> None:
    """Log-probs and gradients by the kernels and by torch's operators,
    each against float64 on the same device.
    """
    from megatron_real.policy import logprobs

    shapes = [(512, 256, 5003, 1024), (64, 128, 16384, 8192)]
    # A GPU rounds as torch's operators do, in another order.
    share_of_torch = 1.5
    if report.rehearse:
        shapes = [(24, 16, 131, 23)]
        # Triton's interpreter cuts off the bits of bf16 that a GPU rounds.
        share_of_torch = 3.0

    cases = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
    for tokens, hidden, vocab, chunk in shapes:
        for dtype, fp32_logits in cases:
            inputs = _head_inputs(tokens, hidden, vocab, dtype)
            options: dict[str, Any] = {"chunk_size": chunk, "fp32_logits": fp32_logits}
            logits_dtype = dtype
            if fp32_logits:
                logits_dtype = torch.float32
            if logprobs.kernels_for(inputs[0], logits_dtype) is None:
                raise AssertionError("there are no kernels: Triton does not import here")

            hidden_TH, weight_VH, target_T = inputs
            exact = _head_outputs(hidden_TH.double(), weight_VH.double(), target_T, **options)
            by_kernels = _head_outputs(hidden_TH, weight_VH, target_T, **options)
            with logprobs.without_kernels():
                by_torch = _head_outputs(hidden_TH, weight_VH, target_T, **options)
            for name, expected in exact.items():
                error = float((by_kernels[name].double() - expected).norm() / expected.norm())
                of_torch = float((by_torch[name].double() - expected).norm() / expected.norm())
                bound = share_of_torch * of_torch + 1e-6
                report.row(
                    output=name, T=tokens, H=hidden, V=vocab, dtype=str(dtype),
                    fp32_logits=fp32_logits, error=error, error_of_torch=of_torch, bound=bound,
                )  # fmt: skip


def _head_inputs(tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> list[Tensor]:
    from megatron_real.parallel import cpu
    from megatron_real.policy.logprobs import NO_TARGET

    torch.manual_seed(0)
    hidden_TH = torch.randn(tokens, hidden, device=cpu.device())
    weight_VH = torch.randn(vocab, hidden, device=cpu.device()) * 0.2
    target_T = torch.randint(vocab, (tokens,), device=cpu.device())
    # The last token of every sequence predicts nothing: the kernels must skip it.
    target_T[::5] = NO_TARGET
    return [hidden_TH.to(dtype), weight_VH.to(dtype), target_T]


def _head_outputs(
    hidden: Tensor, weight: Tensor, target_T: Tensor, **options: Any
) -> dict[str, Tensor]:
    from megatron_real.policy.logprobs import linear_logprobs

    # Leaves of their own: three ways share the inputs, and gradients would add up.
    hidden_TH = hidden.detach().clone().requires_grad_()
    weight_VH = weight.detach().clone().requires_grad_()
    logprob_T = linear_logprobs(hidden_TH, weight_VH, target_T, temperature=0.6, **options)
    assert isinstance(logprob_T, Tensor)
    logprob_T.sum().backward()
    assert hidden_TH.grad is not None and weight_VH.grad is not None
    return {"logprob": logprob_T.detach(), "hidden": hidden_TH.grad, "weight": weight_VH.grad}


def parity(report: Report) -> None:
    """One minibatch's gradient in one process, against transformers' model and
    the printed equation in float64.
    """
    from bench_model import shared_directory, write_model

    from megatron_real.config import BatchConfig, Config, DataConfig, ModelConfig, RolloutConfig
    from megatron_real.config import OptimizerConfig as Optimizer
    from tests.distributed import jobs, reference

    kinds: list[Literal["te", "local"]] = ["local"]
    if importlib.util.find_spec("transformer_engine") and torch.cuda.is_available():
        kinds.append("te")
    shape = {**SHAPES["tiny"], "vocab_size": 101, "max_position_embeddings": 256}
    samples = reference.minibatch(1, vocab=101)
    bounds: dict[Literal["fp32", "bf16"], float] = {"fp32": 1e-3, "bf16": 1e-1}
    with shared_directory() as directory:
        write_model(directory, **shape)
        loss, expected = reference.gradient(directory, None, samples)
        for kind in kinds:
            for dtype, bound in bounds.items():
                config = Config(
                    model=ModelConfig(path=str(directory), dtype=dtype, layers=kind),
                    data=DataConfig(max_prompt_tokens=16),
                    rollout=RolloutConfig(
                        max_response_tokens=16, temperature=reference.TEMPERATURE
                    ),
                    batch=BatchConfig(max_tokens=256),
                    optimizer=Optimizer(distributed=False),
                )  # fmt: skip
                result = jobs.gradient(config, None, samples)
                gradients = {k: torch.from_numpy(g) for k, g in result["gradients"].items()}
                difference = sum(
                    float((g - expected[k]).square().sum()) for k, g in gradients.items()
                )
                size = sum(float(expected[k].square().sum()) for k in gradients)
                report.row(
                    layers=kind, dtype=dtype, loss=float(result["loss"]),
                    loss_in_float64=float(loss), error=(difference / size) ** 0.5, bound=bound,
                )  # fmt: skip


def head(report: Report) -> None:
    """tools/bench_logprobs.py at the two models' shapes."""
    sizes = [(8192, 3584, 152064), (8192, 1536, 152064)]
    if report.rehearse:
        sizes = [(64, 64, 512)]
    for tokens, hidden, vocab in sizes:
        arguments = ["--tokens", tokens, "--hidden", hidden, "--vocab", vocab]
        for table in _benchmark("logprobs", *arguments, "--rounds", report.rounds):
            for row in table["rows"]:
                report.row(table=table["title"], **row)


def step(report: Report, shape: str) -> None:
    """An update at a model's shape on one device: seconds, MFU,
    and the peak of memory beside the plan's.
    """
    from bench_policy import rollouts

    from megatron_real.config import BatchConfig, Config, DataConfig, ModelConfig, RolloutConfig
    from megatron_real.parallel.groups import join_world, set_up
    from megatron_real.plan.memory import Shapes, stage_memory
    from megatron_real.policy.policy import Policy, PolicySettings
    from megatron_real.runs.peak import peak_tflops
    from megatron_real.weights.architecture import Architecture
    from megatron_real.weights.hf import HfWeights

    join_world(timeout_minutes=5)
    tokens = 8192
    length = 2048
    sizes = SHAPES[shape]
    if report.rehearse:
        tokens = 512
        length = 64
        sizes = SHAPES["tiny"]
    sizes = {**sizes, "max_position_embeddings": 16384}
    config = Config(
        model=ModelConfig(dtype="bf16"),
        data=DataConfig(max_prompt_tokens=32),
        rollout=RolloutConfig(max_response_tokens=length, num_prompts=2, group_size=4),
        batch=BatchConfig(minibatch_prompts=2, max_tokens=tokens),
    )
    on_gpu = torch.cuda.is_available()
    device: Literal["cuda", "cpu"] = "cpu"
    if on_gpu:
        device = "cuda"
    # As the policy chooses: TransformerEngine's layers need both the package and a GPU.
    te = on_gpu and importlib.util.find_spec("transformer_engine") is not None
    layer_kind: Literal["te", "local"] = "local"
    if te:
        layer_kind = "te"
    shapes = Shapes(2, layer_kind, device)

    def planned(num_layers: int) -> int:
        architecture = Architecture.from_config(
            _hf_config({**sizes, "num_hidden_layers": num_layers})
        )
        (stage,) = stage_memory(architecture, config, dp=1, shapes=shapes)
        return stage.resident.total + stage.update.total

    layers = sizes["num_hidden_layers"]
    if on_gpu:
        # A tenth for the CUDA context, NCCL, and what the allocator cannot use.
        available = torch.cuda.get_device_properties(0).total_memory * 0.9
        layers = max((n for n in range(1, layers + 1) if planned(n) <= available), default=1)
    with tempfile.TemporaryDirectory() as folder:
        write_empty_model(Path(folder), {**sizes, "num_hidden_layers": layers})
        model = dataclasses.replace(config.model, path=folder)
        config = dataclasses.replace(config, model=model)
        architecture = Architecture.read(folder)
        policy = Policy(
            PolicySettings.of(config), architecture, HfWeights(folder), set_up(config.parallel),
            num_updates=100,
        )  # fmt: skip
    # Matrices of zeros would draw less power, and so run faster, than any that compute.
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.data.normal_(0, 0.02)
    # The optimizer holds a copy in fp32, which the next update would write over them.
    policy.optimizer.reload_model_params()

    trained = rollouts([[length] * 4] * 2, prompt_tokens=32, vocab=sizes["vocab_size"])
    best = _fastest_update(policy, trained, report.rounds)
    # Three: backward computes two products for each of forward's. A token sees half of its
    # sequence on average.
    counts = [rollout.num_tokens for rollout in trained]
    flops = sum(3 * n * architecture.flops_per_token(n / 2) for n in counts)
    peak_memory = 0
    peak = None
    if on_gpu:
        peak_memory = torch.cuda.max_memory_allocated()
        peak = peak_tflops(torch.cuda.get_device_name())
    utilization = None
    if peak:
        utilization = flops / best / 1e12 / peak
    report.row(
        shape=shape, layers=layers, tokens=sum(counts), seconds=best,
        tflops=flops / best / 1e12, MFU=utilization or "unknown", peak_gib=peak_memory / 2**30,
        planned_gib=planned(layers) / 2**30, te_layers=te,
    )  # fmt: skip
    if utilization:
        # A part of the layers stands for the whole model: its matrices have the same shapes.
        whole = Architecture.from_config(_hf_config(sizes))
        report.note(
            train_utilization={"billions": whole.num_parameters / 1e9, "share": utilization}
        )


def _fastest_update(policy: Any, rollouts: Sequence[Any], rounds: int) -> float:
    """Seconds of the fastest update on the same rollouts, after one that warms up."""
    seconds = []
    for _ in range(1 + rounds):
        (batch,) = policy.prepare(rollouts)
        torch.cuda.synchronize()
        began = time.perf_counter()
        policy.update(batch)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def training(report: Report) -> None:
    """Six steps at once, and six with an end after three: metrics and weights must be equal,
    bit for bit.
    """
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        _python("tools/make_tiny_model.py", "--out", base)
        runs = {name: Path(folder) / name for name in ("whole", "resumed")}

        def train(run: Path, steps: int) -> None:
            _python(
                "-m", "megatron_real", "train", ROOT / "examples/configs/quickstart.yaml",
                f"trainer.run_dir={run}", f"trainer.steps={steps}", f"model.path={base}",
                f"data.train={base}/train.jsonl", "data.heldout=", "checkpoint.every=3",
                "trainer.tensorboard=false", "rollout.num_prompts=16", "batch.minibatch_prompts=8",
            )  # fmt: skip

        # The second life of a run must not know that there was a first one.
        train(runs["whole"], 6)
        train(runs["resumed"], 3)
        train(runs["resumed"], 6)
        rows = {name: _rows(run / "metrics.jsonl") for name, run in runs.items()}
        for whole, resumed in zip(rows["whole"], rows["resumed"], strict=True):
            report.row(
                step=whole["step"], loss=whole["loss"], loss_resumed=resumed["loss"],
                error=abs(whole["loss"] - resumed["loss"]), bound=0.0,
            )  # fmt: skip


def save(report: Report) -> None:
    """tools/bench_checkpoint.py."""
    arguments = ["--parameters", 500, "--saves", 2]
    if report.rehearse:
        arguments = ["--parameters", 20, "--saves", 1]
    for table in _benchmark("checkpoint", *arguments):
        for row in table["rows"]:
            report.row(**row)


def sync(report: Report) -> None:
    """tools/bench_weight_sync.py, where vLLM is."""
    if importlib.util.find_spec("vllm") is None:
        report.note(skipped="vLLM is not installed")
        return
    for table in _benchmark("weight_sync", "--rounds", report.rounds):
        for row in table["rows"]:
            report.row(table=table["title"], **row)


STAGES: dict[str, Callable[[Report], None]] = {
    "kernels": kernels,
    "parity": parity,
    "head": head,
    "step-1.5b": lambda report: step(report, "1.5b"),
    "step-7b": lambda report: step(report, "7b"),
    "training": training,
    "save": save,
    "sync": sync,
}


def write_empty_model(directory: Path, shape: dict[str, int]) -> None:
    """Writes config.json and weights of zeros, as a file with a hole that takes
    no space and no time.
    """
    from megatron_real.weights.architecture import Architecture
    from megatron_real.weights.mapping import hf_shapes

    hf = _hf_config(shape)
    (directory / "config.json").write_text(json.dumps(hf), encoding="utf-8")
    header: dict[str, Any] = {}
    end = 0
    for name, dims in hf_shapes(Architecture.from_config(hf)).items():
        size = 2 * int(torch.Size(dims).numel())
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _hf_config(shape: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, **shape,
    }  # fmt: skip


def _benchmark(name: str, *arguments: object) -> list[dict[str, Any]]:
    """Returns the tables of a benchmark: each has a title and its rows."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        _python(f"tools/bench_{name}.py", *arguments, "--json", results)
        tables: list[dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))["tables"]
        return tables


def _python(*arguments: object) -> str:
    """Standard output of a Python command line that must succeed."""
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} failed: {done.stderr[-3000:]}")
    return done.stdout


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description="One stage of gpu_day.py.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.rehearse:
        sys.exit("there is no GPU here; --rehearse runs tiny sizes on the CPU")
    from megatron_real.parallel import cpu

    cpu.enable()
    STAGES[options.stage](Report(options.out, options.rehearse))


if __name__ == "__main__":
    main()
