"""Runs one rank of a layout: its own Policy, on fake CUDA tensors, through the parts of a step.

    build           model, DDP's gradient buffers, distributed optimizer with its states
    pack            the rollouts of an update become micro-batches on the device
    old_logprobs    the pass without gradients
    gradient        forward and backward over all micro-batches, DDP's reduction
    optimizer       norm, clipping, Adam, the all-gather of parameters
    token_stats, mismatch, snapshot, make_room, take_room_back, sharded state, stream
                    where the configuration has them

worker.py has loaded the device before this module is imported.
"""

# mypy: disable-error-code="method-assign,assignment"
# Kernels that only a GPU has are replaced by what torch knows of their shapes.

from __future__ import annotations

import dataclasses
import logging
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import megatron.core
import torch
from megatron.core import utils as megatron_utils
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_real import config as configuration
from megatron_real import pinned
from megatron_real.batching import minibatches
from megatron_real.checkpoint.state import sharded_state
from megatron_real.config import Config
from megatron_real.parallel import groups as layout
from megatron_real.parallel.groups import ProcessGroups
from megatron_real.plan.memory import Shapes, stage_memory
from megatron_real.policy import layers
from megatron_real.policy.optimizer_state import begin
from megatron_real.policy.policy import Policy, PolicySettings
from megatron_real.policy.snapshot import Snapshot
from megatron_real.policy.train_step import Batch
from megatron_real.records import Completion, Prompt, Rollout, Status, Verdict
from megatron_real.rehearsal import device
from megatron_real.rehearsal.meter import Meter
from megatron_real.rehearsal.report import Phase, RankReport, Request
from megatron_real.rehearsal.world import World
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.mapping import Entry, Rectangle

_HOLDERS = 12
"""How many of the lines that hold memory at its peak a phase names."""


def rehearse(request: Request, world: World) -> RankReport:
    """Runs the parts of a step on one rank and reports what they need, or what broke.

    Args:
        request: which rank of which configuration.
        world: with its functions installed; no rank has joined it in this process.
    """
    began = time.perf_counter()
    device.install(request.gpu)
    _replace_kernels()
    libraries: Any = pinned
    config = configuration.load(request.config, request.overrides)
    dp = configuration.check_world(config, request.gpus)
    # Before join_world, which reads rank and size from there.
    world.place(request.rank, request.gpus)
    layout.join_world(config.trainer.timeout_minutes)

    # A scalar made by torch.tensor(..., device="cuda") is made on the CPU and moved as a fake.
    FakeTensorMode.avoid_device_init = True
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        # No driver is here to lock host memory: the meter counts it.
        libraries._pinned = meter.pinned
        rehearsal = _Rehearsal(request, config, dp, world, meter)
        try:
            rehearsal.run()
        # Of whatever kind: it is what a rehearsal looks for.
        except Exception as error:
            # The innermost lines of this project and of libraries that led to it, without those of
            # torch and of the rehearsal itself.
            frames = [
                f"{frame.filename.rpartition('site-packages/')[2].rpartition('/megatron_real/')[2]}"
                f":{frame.lineno}"
                for frame in traceback.extract_tb(error.__traceback__)
                if "/torch/" not in frame.filename and "/rehearsal/" not in frame.filename
            ]
            where = " < ".join(reversed(frames[-4:]))
            text = str(error).strip().splitlines() or [""]
            rehearsal.set(fault=f"{type(error).__name__}: {text[0]} (at {where})")

    rehearsal.set(seconds=time.perf_counter() - began, groups=world.groups())
    return rehearsal.report


class _Rehearsal:
    """The parts of a step, and the report that grows with them."""

    def __init__(
        self, request: Request, config: Config, dp: int, world: World, meter: Meter
    ) -> None:
        self._config = config
        self._dp = dp
        self._world = world
        self._meter = meter
        self._load = _Load.of(request, config, dp)
        self.report = RankReport(
            rank=request.rank,
            place={},
            versions={"torch": torch.__version__, "megatron-core": megatron.core.__version__},
        )

    def set(self, **values: Any) -> None:
        """Sets fields of the report."""
        self.report = dataclasses.replace(self.report, **values)

    def run(self) -> None:
        """Runs all parts in the order of a step."""
        config = self._config
        groups = layout.set_up(config.parallel, timeout_minutes=config.trainer.timeout_minutes)
        architecture = Architecture.read(config.model.path)
        self._place(groups, architecture)

        policy = self._phase("build", lambda: self._build(architecture, groups))
        self.set(resident=self._meter.live)

        def pack() -> Batch:
            """Returns all rollouts of the rehearsed update as one minibatch, packed."""
            (minibatch,) = minibatches(
                self._load.rollouts(),
                config.objective,
                groups_per_minibatch=self._load.num_sequences,
            )
            return policy.packer.pack(minibatch, off_policy=False)

        batch = self._phase("pack", pack)
        micro = batch.micro_batches[0]
        self.set(
            tokens=micro.tokens_T.numel(),
            micro_batches=len(batch.micro_batches),
            sequences=len(micro.positions),
            placement=batch.plan.placement,
        )

        self._phase("old_logprobs", lambda: policy.step.old_logprobs(batch))
        # A rollout's first minibatch has none; the pass over it is the one that most runs make most
        # often.
        batch.has_old_logprobs = False
        for results in batch.results:
            results.forget("old_logprob_T")
        self._phase("gradient", lambda: policy.gradient(batch))
        self._phase("optimizer", lambda: policy.apply_gradients(finite=True))
        self._others(policy, batch, groups)

    def _build(self, architecture: Architecture, groups: ProcessGroups) -> Policy:
        """Builds the policy with its optimizer's states, and reports their sizes."""
        settings = PolicySettings.of(self._config)
        # The updates of the run set the learning rate's schedule alone: any number will do.
        policy = Policy(settings, architecture, _NamesAndShapes(), groups, num_updates=10)
        # The states that the first update would make: they belong to what stays between passes.
        begin(policy.optimizer)
        parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
        gradients = [buffer.grad_data for chunk in policy.ddp for buffer in chunk.buffers]
        self.set(
            parameters=sum(parameter.numel() for parameter in parameters),
            model_bytes=sum(tensor.nbytes for tensor in [*parameters, *gradients]),
        )
        return policy

    def _others(self, policy: Policy, batch: Batch, groups: ProcessGroups) -> None:
        """Runs what only some configurations have, and what happens once in many steps."""
        rollout = self._config.rollout
        self._phase("token_stats", lambda: policy.token_stats([batch]))
        if rollout.exclude_mismatch is not None or rollout.sync.probe_every:
            # One for each data-parallel rank.
            probes = self._load.rollouts()[: self._dp]
            self._phase("mismatch", lambda: policy.mismatch(probes))
        if rollout.max_lag:
            snapshot = Snapshot(policy)

            def swap() -> None:
                with snapshot.swapped_in():
                    pass

            self._phase("snapshot", snapshot.take)
            self._phase("snapshot in and out", swap)
        if rollout.offload_optimizer:
            self._phase("make_room", policy.make_room)
            self._phase("take_room_back", policy.take_room_back)
            self._phase("gradient after room", lambda: policy.gradient(batch))
        self._phase("sharded state", lambda: sharded_state(policy))
        if groups.pp.size() == 1:
            self._phase("stream", lambda: sum(1 for _ in policy.stream()))
        else:
            self.set(skipped=("stream: the other pipeline stages would have to say what they own",))

    def _phase(self, name: str, action: Callable[[], Any]) -> Any:
        """Runs a part and adds what was counted to the report, of a part that breaks too."""
        meter = self._meter
        meter.restart()
        # What the parts before have sent is theirs.
        self._world.take()
        before = meter.live
        try:
            return action()
        finally:
            holders = sorted(meter.holders.items(), key=lambda held: -held[1])
            phase = Phase(
                name=name,
                before=before,
                peak=meter.peak,
                after=meter.live,
                flops=sum(meter.flops.values()),
                kernels=sum(meter.kernels.values()),
                syncs=dict(meter.syncs.most_common()),
                syncs_in_layers=meter.syncs_in_layers,
                collectives=self._world.take(),
                holders=dict(held for held in holders[:_HOLDERS] if held[1] > 0),
                pinned_host=meter.pinned_host,
                guesses=dict(meter.guesses.most_common()),
            )
            self.set(phases=(*self.report.phases, phase))

    def _place(self, groups: ProcessGroups, architecture: Architecture) -> None:
        """Reports where in the layout the rank is, and what `plan` says of it."""
        config = self._config
        kind: Any = "local"
        # launch.py has settled what `auto` means.
        if config.model.layers == "te":
            kind = "te"
        shapes = Shapes(self._load.micro_batches, layers=kind, device="cuda")
        stages = stage_memory(architecture, config, dp=self._dp, shapes=shapes)
        stage = stages[groups.pp.rank()]
        self.set(
            place={axis: getattr(groups, axis).rank() for axis in ("tp", "pp", "cp", "dp")},
            versions={**self.report.versions, "layers": kind},
            plan={
                "parameters": stage.resident.parameters,
                "resident": stage.resident.total,
                "old_logprobs": stage.resident.total + stage.old_logprobs.total,
                "gradient": stage.resident.total + stage.update.total,
                "engine": sum(stage.engine.values()),
                "engine_sleeps": stage.engine_sleeps,
                "rollout": stage.peaks["rollout"],
                "sync": stage.peaks["sync"],
            },
        )


@dataclass(frozen=True)
class _Load:
    """The rollouts of a rehearsed update: equal sequences that fill every micro-batch."""

    prompt_tokens: int
    """Tokens of each prompt."""
    tokens: int
    """Tokens of each sequence in a micro-batch: its last one predicts nothing and is left out."""
    per_micro_batch: int
    """Sequences of a micro-batch."""
    micro_batches: int
    """Micro-batches on each data-parallel rank."""
    num_sequences: int
    """Sequences over all data-parallel ranks."""
    group_size: int
    """Completions of a prompt."""
    with_reference: bool
    """Whether they carry a reference policy's log-probs."""

    @classmethod
    def of(cls, request: Request, config: Config, dp: int) -> _Load:
        """Returns the load that fills each micro-batch up to batch.max_tokens."""
        parallel = config.parallel
        longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        # As many of the longest as fit, and one more if there is room to spare: full to the budget.
        per_micro_batch = max(1, -(-config.batch.max_tokens // longest))
        # Context parallelism cuts a sequence in 2 * cp equal pieces, and sequence parallelism each
        # rank's share of it in tp.
        multiple = math.lcm(2 * parallel.cp, parallel.cp * parallel.tp)
        tokens = config.batch.max_tokens // per_micro_batch // multiple * multiple
        # Enough that a pipeline fills, and that what the first micro-batch allocates is used again.
        micro_batches = request.micro_batches or max(3, 2 * parallel.pp)
        # megatron-core's interleaved schedule takes multiples of the pipeline's size only.
        if parallel.vpp > 1:
            micro_batches = -(-micro_batches // parallel.pp) * parallel.pp
        return cls(
            prompt_tokens=max(1, min(config.data.max_prompt_tokens, tokens // 4)),
            tokens=tokens,
            per_micro_batch=per_micro_batch,
            micro_batches=micro_batches,
            num_sequences=per_micro_batch * micro_batches * dp,
            group_size=config.rollout.group_size,
            with_reference=config.objective.needs_reference,
        )

    def rollouts(self) -> list[Rollout]:
        """Returns the rollouts, one right and one wrong in turn, so that no group is one-class."""
        # The last token predicts nothing and is left out of the micro-batch: hence one more.
        num_response = self.tokens + 1 - self.prompt_tokens
        prompt = Prompt("rehearsal/0", "", tuple(range(self.prompt_tokens)), ("1",))
        answer = Completion(tuple(range(num_response)), (-0.5,) * num_response, "", True)
        reference_logprobs = None
        if self.with_reference:
            reference_logprobs = answer.logprobs
        return [
            Rollout(
                prompt,
                group=i // self.group_size,
                sample=i % self.group_size,
                completion=answer,
                verdict=Verdict(Status.OK, i % 2, float(i % 2)),  # type: ignore[arg-type]
                reference_logprobs=reference_logprobs,
            )
            for i in range(self.num_sequences)
        ]


@dataclass(frozen=True)
class _Shape:
    """A piece of a weight that has no bytes."""

    shape: tuple[int, ...]
    dtype: str = "bf16"

    def blocks(self, _files: Any, _block_bytes: int) -> tuple[()]:
        """Returns no blocks: there is nothing to copy."""
        return ()


class _NamesAndShapes:
    """Weights that only have names and shapes.

    Loading them checks that every parameter is named and fits.
    """

    dtype = "bf16"

    def megatron_piece(self, entry: Entry, rectangle: Rectangle) -> Any:
        """Returns the shape of the rectangle that a rank would read."""
        return _Shape(entry.shape_of(rectangle))


def _replace_kernels() -> None:
    """Replaces what runs on a GPU and has no operation on fake CUDA tensors."""
    local: Any = layers
    local.scaled_dot_product_attention = _flash_attention
    # Flash attention aligns its mask to the lower right by itself.
    local.causal_lower_right = lambda _queries, _keys: None
    torch.nn.Module.to = _checked_to

    state = torch.zeros(16, dtype=torch.uint8)
    random: Any = megatron_random
    random._get_cuda_rng_state = lambda *_, **__: state
    random._set_cuda_rng_state = lambda *_, **__: None
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)

    from megatron.core.optimizer import clip_grads

    # megatron-core's own norm, where neither TransformerEngine nor apex is installed.
    if clip_grads.l2_norm_impl.__name__ == "local_multi_tensor_l2_norm":
        clip_grads.l2_norm_impl = _norm_as_megatron_core

    # The original exchanges a tensor's data in place, which a fake one has not; a detached one
    # shares its storage in the same way.
    viewless: Any = megatron_utils
    viewless._kernel_make_viewless_tensor = lambda tensor, requires_grad: (
        tensor.detach().requires_grad_(requires_grad)
    )
    # A GPU runs the compiled ones: one kernel, which writes its output alone.
    swiglu: Any = fused_bias_swiglu
    swiglu.swiglu = _fused_swiglu
    swiglu.swiglu_back = _fused_swiglu_back

    # The original compares the shards of all ranks, and there is only one here.
    from megatron.core.dist_checkpointing import state_dict_utils

    state_dict_utils.validate_sharding_integrity = lambda *_, **__: None


def _flash_attention(
    query_BALD: Tensor,
    key_BKLD: Tensor,
    value_BKLD: Tensor,
    attn_mask: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Runs what torch runs on a GPU for the local layers in bf16: causal flash attention.

    It takes keys and values of fewer heads as they are.
    """
    # The three after the values: dropout, causal, and no mask for debugging.
    attended = torch.ops.aten._scaled_dot_product_flash_attention(
        query_BALD, key_BKLD, value_BKLD, 0.0, True, False, scale=scale
    )
    return attended[0]


def _norm_as_megatron_core(
    _chunk_size: int, _flag: Tensor, tensor_lists: list[list[Tensor]], *_: Any
) -> tuple[Tensor, None]:
    """Returns the norm as megatron-core computes it without TransformerEngine or apex.

    It reads one number back for each tensor.
    """
    norms = [[float(torch.norm(tensor)) for tensor in tensors] for tensors in tensor_lists]
    total = float(torch.norm(torch.tensor(norms)))
    return torch.tensor([total], dtype=torch.float, device="cuda"), None


def _fused_swiglu(y_TF: Tensor) -> Tensor:
    """Returns silu of the first half times the second, as one kernel that writes only that."""
    device.launched("swiglu")
    return torch.empty(
        (*y_TF.shape[:-1], y_TF.shape[-1] // 2), dtype=y_TF.dtype, device=y_TF.device
    )


def _fused_swiglu_back(gradient_TF: Tensor, y_TF: Tensor) -> Tensor:
    """Returns the gradient of `_fused_swiglu`, as one kernel."""
    device.launched("swiglu_back")
    return torch.empty_like(y_TF)


def _checked_to(module: torch.nn.Module, *_: Any, **__: Any) -> torch.nn.Module:
    """Returns the module as it is, after a check that it was built on the GPU.

    Module.to exchanges parameters in place, which fake ones do not allow.

    Raises:
        RuntimeError: a parameter or a buffer, which the message names, is not on the GPU.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.device.type != "cuda":
            raise RuntimeError(f"{name} was built on the {tensor.device}, not on the GPU")
    return module
