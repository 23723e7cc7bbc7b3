"""Log-probs of target tokens, forward and backward: ours against megatron-core's cross entropy.

    # a CPU: T 1024, H 1536, V 151936, bf16
    python tools/bench_logprobs.py
    python tools/bench_logprobs.py --dtype fp32 --tokens 512
    # an 80 GB GPU: the 7B model
    python tools/bench_logprobs.py --tokens 8192 --hidden 3584 --vocab 152064

Two tables. The first starts from hidden states and ends with the gradients of hidden states and
output weight:

    naive        log_softmax of the fp32 logits
    megatron     logits = hidden @ weight.T, then megatron-core's vocab_parallel_cross_entropy: the
                 baseline
    ours/logits  the same logits, then vocab_parallel_logprobs
    ours/linear  linear_logprobs: no logits beyond a chunk
    ours/torch   the same by torch's operators, on a GPU where Triton's kernels are its default
    liger        Liger's fused linear cross entropy for tensor parallelism, on a GPU where it is
                 installed

The second starts from given logits and ends with their gradient: megatron-core's cross entropy
against vocab_parallel_logprobs alone. (megatron-core overwrites fp32 logits in place, ours never
writes to its input; the logits are therefore made anew, outside the clock, before each call.)

Times are the fastest of several rounds, each of which times all paths in turn. Where neighbours
share the cores, add --cpu-time: processor time of one thread.

Memory is the peak of live bytes during forward and backward, inputs and their gradients aside. It
is read from the profiler's record of every allocation and release of torch's allocator, on the CPU
and on a GPU alike, so temporaries within an operator count, and a gradient is left out exactly: by
the address of the allocation that became it, not by subtracting its size from a peak at which it
may not have existed.

To reach (bf16): ours/logits no slower than megatron at no more memory; ours/linear at most 1.4
times megatron's time (1.35 on a GPU) with at least 8 times less memory.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from bench_machine import add_options, apply_options, interleaved, show
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from megatron_real.config import ParallelConfig
from megatron_real.parallel import cpu
from megatron_real.parallel.groups import join_world, set_up
from megatron_real.policy import logprobs
from megatron_real.policy.logprobs import linear_logprobs, vocab_parallel_logprobs

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MIB = 2.0**20


def naive(logits_TV: Tensor, target_T: Tensor) -> Tensor:
    return logits_TV.float().log_softmax(-1).gather(1, target_T.unsqueeze(1)).squeeze(1)


def megatron(logits_TV: Tensor, target_T: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return -vocab_parallel_cross_entropy(logits_TV.unsqueeze(1), target_T.unsqueeze(1)).squeeze(1)


def without_kernels(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor) -> Tensor:
    with logprobs.without_kernels():  # backward does as forward did
        return linear_logprobs(hidden_TH, weight_VH, target_T)


def liger(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyTPFunction as Liger,
    )

    return -Liger.apply(hidden_TH, weight_VH, target_T, dist.group.WORLD)


def peak_extra_bytes(run: Callable[[], Any], inputs: Iterable[Tensor]) -> int:
    """Peak of live bytes that `run` allocates, without the storages that end as
    the inputs' gradients.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
        torch.cuda.synchronize()
    gradients = {x.grad.untyped_storage().data_ptr() for x in inputs if x.grad is not None}
    events = [(e.extra_fields.ptr, e.extra_fields.alloc_size) for e in _allocations(recorded)]
    # The allocator gives an address many times: a gradient is the last that was there.
    last = {ptr: i for i, (ptr, size) in enumerate(events) if size > 0}

    # Addresses that `run` allocated and still holds; it also releases what it did not allocate.
    ours: set[int] = set()
    live = 0
    peak = 0
    for i, (ptr, size) in enumerate(events):
        if size > 0 and not (ptr in gradients and last[ptr] == i):
            ours.add(ptr)
            live += size
        elif size < 0 and ptr in ours:
            ours.remove(ptr)
            live += size
        peak = max(peak, live)
    return peak


def _allocations(recorded: Any) -> list[Any]:
    def walk(events: Iterable[Any]) -> Iterator[Any]:
        for event in events:
            if (
                event.tag == _EventType.Allocation
                and event.extra_fields.device.type == cpu.device().type
            ):
                yield event
            yield from walk(event.children)

    return sorted(
        walk(recorded.profiler.kineto_results.experimental_event_tree()),
        key=lambda e: e.start_time_ns,
    )


def compare(
    title: str,
    paths: Mapping[str, Callable[[], Any]],
    inputs: Sequence[Tensor],
    renew: Callable[[], None],
    options: argparse.Namespace,
) -> None:
    """Times and measures the paths, forward and backward, and prints their table;
    `megatron` is the baseline. `renew` prepares the inputs of a run.
    """
    gradient_T = torch.rand(options.tokens, device=cpu.device())

    def prepare(name: str) -> Callable[[], None]:
        renew()
        return lambda: paths[name]().backward(gradient_T)

    seconds = interleaved({name: partial(prepare, name) for name in paths}, options)
    memory = {name: peak_extra_bytes(prepare(name), inputs) for name in paths}
    rows = [
        {
            "path": name,
            "seconds": seconds[name],
            "x megatron's time": seconds[name] / seconds["megatron"],
            "peak MiB": memory[name] / MIB,
            "x less than megatron": memory["megatron"] / max(memory[name], 1),
        }
        for name in paths
    ]
    show(title, rows, options)


def from_hidden(options: argparse.Namespace, sizes: str) -> None:
    dtype = DTYPES[options.dtype]
    device = cpu.device()
    hidden_TH = (
        torch.randn(options.tokens, options.hidden, device=device).to(dtype).requires_grad_()
    )
    weight_VH = (
        torch.randn(options.vocab, options.hidden, device=device)
        .mul_(0.05)
        .to(dtype)
        .requires_grad_()
    )
    target_T = torch.randint(options.vocab, (options.tokens,), device=device)

    def renew() -> None:
        hidden_TH.grad = None
        weight_VH.grad = None

    paths: dict[str, Callable[[], Any]] = {
        "naive": lambda: naive(hidden_TH @ weight_VH.t(), target_T),
        "megatron": lambda: megatron(hidden_TH @ weight_VH.t(), target_T),
        "ours/logits": lambda: vocab_parallel_logprobs(hidden_TH @ weight_VH.t(), target_T),
        "ours/linear": lambda: linear_logprobs(hidden_TH, weight_VH, target_T),
    }
    if device.type == "cuda":
        paths["ours/torch"] = lambda: without_kernels(hidden_TH, weight_VH, target_T)
        if importlib.util.find_spec("liger_kernel"):
            paths["liger"] = lambda: liger(hidden_TH, weight_VH, target_T)
    compare(f"From hidden states: {sizes}", paths, [hidden_TH, weight_VH], renew, options)


def from_logits(options: argparse.Namespace, sizes: str) -> None:
    logits_TV = torch.empty(
        options.tokens, options.vocab, dtype=DTYPES[options.dtype], device=cpu.device()
    )
    logits_TV.requires_grad_()
    target_T = torch.randint(options.vocab, (options.tokens,), device=cpu.device())

    def renew() -> None:
        logits_TV.grad = None
        logits_TV.data.normal_(0, 2)

    paths: dict[str, Callable[[], Any]] = {
        "megatron": lambda: megatron(logits_TV, target_T),
        "ours/logits": lambda: vocab_parallel_logprobs(logits_TV, target_T),
    }
    compare(f"From given logits: {sizes}", paths, [logits_TV], renew, options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024, help="T")
    parser.add_argument("--hidden", type=int, default=1536, help="H")
    parser.add_argument("--vocab", type=int, default=151936, help="V")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    add_options(parser, rounds=5)
    options = parser.parse_args()
    apply_options(options)
    join_world(timeout_minutes=5)
    set_up(ParallelConfig())
    torch.manual_seed(0)
    sizes = f"T {options.tokens}, H {options.hidden}, V {options.vocab}, {options.dtype}"
    from_hidden(options, sizes)
    from_logits(options, sizes)


if __name__ == "__main__":
    main()
