"""vLLM in the training processes: one engine on each `rollout.tp` neighbouring ranks.

It works on GPUs and on CPUs alike. The processes that train are those that generate (vLLM's
external launcher: every rank of an engine runs the same schedule), so weights go from model to
model without a file or a socket between them. On a GPU the engine sleeps while the policy trains.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import glob
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_real.config import Config
from megatron_real.parallel.collective import shared
from megatron_real.parallel.cpu import device
from megatron_real.records import Completion, Prompt, Sampling
from megatron_real.rollout.engines.engine import InTrainer, TensorPart
from megatron_real.rollout.engines.tokenizer import completion_of, eos_ids, load_tokenizer

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads stay where they are
    "VLLM_NO_USAGE_STATS": "1",
}
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
# When vLLM prefills a prompt in part, it turns the prompt's seeded generator back, which a CPU's
# generator cannot do. So prompts are prefilled as a whole.
_ON_CPU = {"enforce_eager": True, "enable_chunked_prefill": False}


def missing(config: Config) -> str:
    """Says why vLLM cannot be used here; empty if it can.

    It imports vLLM, which takes seconds.
    """
    # vLLM reads the environment when it is imported. The engine is to live in this process.
    os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override the configuration
    try:
        import vllm  # noqa: F401
    except Exception as error:  # a build for other libraries fails in many ways
        return f"vllm does not import ({type(error).__name__}: {' '.join(str(error).split())})"
    return ""


def build(config: Config, *, say: Callable[[str], None]) -> VllmEngine:
    """Builds the engine; collective over all ranks."""
    try:
        return VllmEngine(config)
    except BaseException:
        # Whatever ended it, Ctrl-C too: the next run of this process finds no groups of this one.
        # Of several ranks, each learns of another's failure by the lifeline and ends.
        if dist.get_world_size() == 1:
            _leave_groups()
        raise


def engine_arguments(config: Config) -> dict[str, Any]:
    """Returns vLLM's arguments, by vLLM's own names.

    They are common to servers and to engines in the training processes.
    """
    rollout = config.rollout
    overrides: dict[str, Any] = {}
    if config.model.fp32_head:
        overrides["head_dtype"] = "float32"

    return {
        "model": config.model.path,
        "dtype": _DTYPES[config.model.dtype],
        "load_format": "dummy",  # weights come by sync
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # the model's own would add its top_p, top_k or penalties
        "max_model_len": config.data.max_prompt_tokens + rollout.max_response_tokens,
        "max_num_seqs": rollout.max_sequences,
        "kv_cache_memory_bytes": rollout.kv_cache_mib << 20,
        # Unused beside an explicit size, but vLLM checks it against the memory that is free.
        "gpu_memory_utilization": 0.01,
        # Of the distribution that is sampled from, after temperature, top_p and top_k.
        "logprobs_mode": "processed_logprobs",
        "tensor_parallel_size": rollout.tp,
        "seed": config.trainer.seed,
        "disable_log_stats": True,
        **(_ON_CPU if device().type == "cpu" else {}),
        # After ours, so that the user's own arguments win.
        **rollout.vllm,
        # Joined, because the user's overrides would otherwise drop the head's dtype.
        "hf_overrides": {**overrides, **rollout.vllm.get("hf_overrides", {})},
    }


class VllmEngine(InTrainer):
    """One rank's part of a vLLM engine.

    It begins asleep and without weights: a sync wakes it.
    """

    name = "vllm"

    def __init__(self, config: Config) -> None:
        """Builds the engine; collective over all ranks.

        Raises:
            ValueError: vLLM refuses the model or an argument; gives vLLM's reason.
        """
        rollout = config.rollout
        self.tokenizer = load_tokenizer(config.model)
        self.eos = eos_ids(config.model.path, self.tokenizer.eos_token_id)
        self.tp = rollout.tp
        self.at_once = rollout.max_sequences
        self.kv_cache_bytes = rollout.kv_cache_mib << 20
        self.sleep_level = rollout.sleep_level if device().type == "cuda" else 0

        from vllm import LLM

        _check_arguments(rollout.vllm)
        with plain_weights(), own_shared_memory(rollout.tp):
            self.llm = LLM(
                **engine_arguments(config),
                enable_sleep_mode=self.sleep_level > 0,
                distributed_executor_backend="external_launcher",
            )
        # vLLM's own clean-up ends the process groups of the whole process: at exit, where the job
        # has ended them already, with a traceback; and when the engine is collected, in the middle
        # of whatever runs then. It also thaws at exit the objects that vLLM froze, which libraries
        # would report as leaks: that part is done here.
        finalizer = getattr(self.llm.llm_engine.engine_core, "_finalizer", None)
        if finalizer:
            finalizer.detach()
            atexit.register(gc.unfreeze)
        (self.model,) = self.llm.collective_rpc(lambda worker: worker.get_model())
        # Asleep from the beginning: the policy and its optimizer are built next, and want the room.
        self.finish_inference()

    def parts(self) -> dict[str, TensorPart]:
        """See `InTrainer`."""
        # Imported here: it imports vLLM's layers, which a server's client has no use for.
        from megatron_real.rollout.engines.vllm_weights import parts_of

        return parts_of(self.model)

    def prepare_for_inference(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self.sleep_level:
            self._check_budget()
            self.llm.wake_up(tags=["weights"])
        self.model.load_weights(weights)
        pack(self.model)
        # Only now: while the weights come, each tensor of the stream takes memory, too.
        if self.sleep_level:
            self.llm.wake_up(tags=["kv_cache"])
        # What the cache holds was computed with the weights before.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: a request is still running")

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> Iterator[tuple[int, int, Completion]]:
        rows = iter(range(len(prompts)))
        return self.generate_as_room(prompts, sampling, seeds=seeds, rows=rows)

    def generate_as_room(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        rows: Iterator[int],
    ) -> Iterator[tuple[int, int, Completion]]:
        """Yields completions as they finish.

        Each has a seed of its own, so that no answer depends on what is decoded beside it.
        """
        engine: Any = self.llm.llm_engine
        # The core's client first, then the core itself, which is in this process.
        scheduler = engine.engine_core.engine_core.scheduler
        places: dict[str, tuple[int, int]] = {}
        exhausted = False

        while places or not exhausted:
            # Nobody can take what vLLM has accepted, so it gets no more than it decodes. The same
            # sequences run together as if it had all at once. Where the KV cache is full, requests
            # wait in vLLM.
            _, num_waiting = scheduler.get_request_counts()
            while num_waiting == 0 and not exhausted and len(places) < self.at_once:
                i = next(rows, None)
                if i is None:
                    exhausted = True
                    break
                for k in range(sampling.num_samples):
                    request = f"{i}-{k}"
                    places[request] = (i, k)
                    inputs: Any = {"prompt_token_ids": list(prompts[i].token_ids)}
                    engine.add_request(request, inputs, self._parameters(sampling, seeds[i] + k))

            # rows have ended, and all that was begun is done.
            if not places:
                continue

            assert engine.has_unfinished_requests(), "vLLM finishes every request"
            for output in engine.step():
                i, k = places.pop(output.request_id)
                sampled = output.outputs[0]
                logprobs = sampled.logprobs.logprobs
                yield i, k, completion_of(sampled.token_ids, logprobs, self.tokenizer, self.eos)

    def finish_inference(self) -> None:
        if self.sleep_level:
            self.llm.sleep(level=self.sleep_level)

    def close(self) -> None:
        """Frees weights and KV cache, and leaves vLLM's process groups.

        vLLM keeps the groups in globals of its module.
        """
        core: Any = self.llm.llm_engine.engine_core
        core.engine_core.model_executor.shutdown()
        core.engine_core.scheduler.shutdown()

        _leave_groups()
        _forget_frames()
        atexit.unregister(gc.unfreeze)

        # vLLM froze all objects of its start, the engine among them: frozen ones are never
        # collected.
        gc.unfreeze()
        del self.llm, self.model
        gc.collect()  # the engine is a ring of references

        if device().type == "cuda":
            torch.cuda.empty_cache()

    def _parameters(self, sampling: Sampling, seed: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            # vLLM takes a signed number of 64 bits.
            seed=seed % 2**63,
            stop_token_ids=self.eos,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,  # the whole text at once, below
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _check_budget(self) -> None:
        """Checks whether the GPU has room for the weights and the cache.

        Waking takes the memory of both, and an out-of-memory error names neither.

        Raises:
            RuntimeError: it has not.
        """
        torch.cuda.empty_cache()
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        free, _ = torch.cuda.mem_get_info()
        if weights + self.kv_cache_bytes > free:
            raise RuntimeError(
                f"vLLM needs {weights:,} bytes for its weights and {self.kv_cache_bytes:,} for its "
                f"KV cache, but the GPU has {free:,} free: "
                f"{weights + self.kv_cache_bytes - free:,} bytes are missing; lower "
                "rollout.kv_cache_mib, raise rollout.tp, or shard the policy further (parallel.*)"
            )


def _leave_groups() -> None:
    """Leaves the process groups of vLLM and not the world, which is the job's to leave.

    vLLM's own function for it, destroy_distributed_environment, ends the world as well.
    """
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = None
    parallel_state._NODE_COUNT = None


def _forget_frames() -> None:
    """Releases the job that imported vLLM's reader of audio.

    That module keeps the error of a library that is not installed. The error's traceback keeps the
    frames of all callers, and those keep the policy and everything else of the job.
    """
    from vllm.multimodal.media import audio

    error = getattr(audio, "_torchcodec_import_exc", None)
    if error is not None:
        error.__traceback__ = None


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Checks the names in rollout.vllm.

    Raises:
        ValueError: vLLM has no such argument.
    """
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for name in arguments:
        if name not in known:
            raise ValueError(
                f"rollout.vllm.{name} is no argument of vLLM's engine; see vllm.EngineArgs for the "
                "names"
            )


@contextmanager
def plain_weights() -> Iterator[None]:
    """Within it, models are built whose weights can be loaded into and read back.

    On a CPU, vLLM packs each loaded weight for oneDNN and drops the original. Here the originals
    stay, and `pack` packs them after each sync.
    """
    from vllm.model_executor.layers import utils

    def unpacked(layer: Any, remove_weight: bool) -> None:
        # What vLLM itself does with a layer that it does not pack.
        layer.cpu_linear = nn.functional.linear

    packing = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = unpacked
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = packing


@contextmanager
def own_shared_memory(tp: int) -> Iterator[None]:
    """Gives this job a name of its own for the memory in which an engine's ranks meet on a CPU.

    vLLM derives the name from the address at which ranks meet, which is `env://` in every job: two
    jobs on a node would share it, and a job that was killed leaves its memory behind, with which
    the next one would fail. Collective over all ranks.
    """
    if tp == 1 or device().type != "cpu":
        yield
        return

    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    job = shared(uuid.uuid4().hex[:12], group=dist.group.WORLD)
    vllms_name_of = _CPUSHMDistributed.make_group_name
    names: list[str] = []

    def name_of(communicator: Any) -> str:
        names.append(f"{job}{vllms_name_of(communicator).replace('/', '')}")
        return names[-1]

    _CPUSHMDistributed.make_group_name = staticmethod(name_of)
    try:
        yield
    finally:
        _CPUSHMDistributed.make_group_name = staticmethod(vllms_name_of)
        # By now all ranks of the engine have opened it. vLLM would leave the names behind.
        for name in names:
            for part in Path("/dev/shm").glob(f"{glob.escape(name)}_*"):
                part.unlink(missing_ok=True)


def pack(model: Any) -> None:
    """Packs the weights of all matrix products anew.

    On a GPU no layer is packed, and nothing happens.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            continue  # rows are looked up in it; nothing is multiplied by it
        if hasattr(layer, "cpu_linear"):
            layer.cpu_linear = None  # frees the old copy first
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
