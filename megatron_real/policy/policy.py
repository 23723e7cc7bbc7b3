"""The policy on Megatron: model, optimizer and the updates of one step's rollouts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from megatron_real.batching import Layout, Minibatch, minibatches, plan
from megatron_real.config import Config
from megatron_real.policy.layout import Groups
from megatron_real.policy.microbatch import Alignment, micro_batch
from megatron_real.policy.model import build_model
from megatron_real.policy.train_step import Batch, Gradient, TokenStats, TrainStep
from megatron_real.records import EXCLUDED, Rollout
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.mapping import Weights
from megatron_real.weights.stored import torch_dtype
from megatron_real.weights.stream import load_weights, stream_hf


@dataclass(frozen=True)
class Update:
    """One optimizer update."""

    gradient: Gradient
    """Loss, scores and weights."""
    grad_norm: float
    """Global L2 norm before clipping; NaN or inf where the update was skipped for it."""
    lr: float
    """Learning rate it was made with."""
    skipped: bool
    """The loss or the gradient was not finite: weights and optimizer are as before."""
    skipped_in_a_row: int
    """Updates skipped up to this one without one that was made in between."""


class Policy:
    """The trained model on this rank's place in the layout.

    Example:
        policy = Policy(config, architecture, groups, num_updates=4000)
        policy.load(HfWeights(config.model.path))
        batches = policy.prepare(rollouts)
        updates = [policy.update(batch) for batch in batches]
    """

    def __init__(self, config: Config, architecture: Architecture, groups: Groups, *, num_updates: int) -> None:
        """Builds model and optimizer; `num_updates` is the length of the learning-rate schedule."""
        self.config, self.architecture, self.groups = config, architecture, groups
        self.chunks = build_model(
            architecture,
            model=config.model,
            parallel=config.parallel,
            megatron=config.megatron,
            temperature=config.rollout.temperature,
            groups=groups.megatron,
        )
        self.ddp = _wrap(self.chunks, config)
        self.step = TrainStep(self.ddp, groups, config.objective, mismatch_bound=config.rollout.mismatch_bound)
        self._num_updates = num_updates
        self.skipped_in_a_row = 0
        """Updates skipped since the last one that was made."""
        self.optimizer: MegatronOptimizer | None = None
        self.scheduler: OptimizerParamScheduler | None = None

    def load(self, weights: Weights) -> None:
        """Fills the model from HF weights, then builds the optimizer, whose master weights are copies of them."""
        load_weights(self.chunks, weights, self.architecture, tp_rank=self.groups.tp.rank(), tp=self.groups.tp.size())
        if self.config.model.dtype != "fp64":  # megatron-core's optimizers know no fp64; exactness tests need none
            self.optimizer = _optimizer(self.config, self.ddp)
            self.scheduler = _scheduler(self.config, self.optimizer, self._num_updates)

    def prepare(self, rollouts: Sequence[Rollout], *, lagging: bool = False) -> list[Batch]:
        """Cuts one step's rollouts into the batches of its updates and computes the old log-probs that they need.

        The first batch needs none, unless the rollouts lag behind: it is trained on by the very weights that generated
        them. Lagging rollouts want their weights in the model while this runs (snapshot.py).
        """
        batches = self.cut(rollouts, lagging=lagging)
        for batch in batches[0 if lagging else 1 :]:
            self.step.old_logprobs(batch)
        return batches

    def cut(self, rollouts: Sequence[Rollout], *, lagging: bool = False) -> list[Batch]:
        """The batches of a step's updates, without old log-probs."""
        cut = minibatches(
            rollouts,
            groups_per_minibatch=self.config.batch.minibatch_prompts,
            one_class_groups=self.config.objective.one_class_groups,
        )
        return [self.pack(minibatch, needs_scores=lagging or i > 0) for i, minibatch in enumerate(cut)]

    def pack(self, minibatch: Minibatch, *, needs_scores: bool) -> Batch:
        """Plans the minibatch over all ranks and builds this rank's micro-batches."""
        parallel, rollouts = self.config.parallel, minibatch.rollouts
        alignment = Alignment(
            cp=parallel.cp,
            cp_rank=self.groups.cp.rank(),
            tp=parallel.tp if parallel.sp else 1,
            padded=self.config.batch.layout == "padded",
        )
        planned = plan(
            [alignment.length(rollouts[i]) for i in minibatch.kept],
            [rollouts[i].group for i in minibatch.kept],
            layout=Layout(
                dp=self.groups.dp.size(),
                max_tokens=alignment.up(self.config.batch.max_tokens),
                padded=alignment.padded,
                pp=parallel.pp,
                count_multiple=parallel.pp if parallel.vpp > 1 else 1,
            ),
            placement=self.config.batch.placement,
            needs_scores=needs_scores,
            cost=lambda length: length * self.architecture.flops_per_token(length / 2),
        )
        mine = planned.micro_batches[self.groups.dp.rank()]
        label_R = torch.full((len(rollouts),), EXCLUDED)
        label_R[list(minibatch.kept)] = torch.tensor([rollouts[i].label for i in minibatch.kept], dtype=torch.int64)
        device = torch.cuda.current_device()
        return Batch(
            minibatch=minibatch,
            plan=planned,
            micro_batches=[micro_batch(rollouts, [minibatch.kept[k] for k in members], alignment) for members in mine],
            label_R=label_R.to(device),
            group_R=torch.tensor([r.group for r in rollouts], device=device),
        )

    def gradient(self, batch: Batch) -> Gradient:
        """Zeroes the gradient buffers and fills them with the gradient of the minibatch's loss."""
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        return self.step.gradient(batch)

    def update(self, batch: Batch) -> Update:
        """One optimizer update; a loss or gradient that is not finite leaves everything as it was."""
        assert self.optimizer is not None and self.scheduler is not None, "load() builds the optimizer"
        gradient = self.gradient(batch)
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.prepare_grads()
        norm = self.optimizer.get_grad_norm()
        grad_norm = float(norm) if norm is not None else 0.0
        finite = math.isfinite(gradient.loss) and math.isfinite(grad_norm)
        if finite:
            self.optimizer.step()
            self.scheduler.step(increment=1)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        return Update(gradient, grad_norm, lr, not finite, self.skipped_in_a_row)

    def mismatch(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Mean |log-prob here - in the engine| (nats) of each rollout under the present weights; 0 for an empty one.
        Collective over the world."""
        answered = tuple(i for i, r in enumerate(rollouts) if r.completion.token_ids)
        whole = Minibatch(tuple(rollouts), kept=answered, num_groups=len({r.group for r in rollouts}))
        return self.step.mismatch(self.pack(whole, needs_scores=False)).tolist()

    def token_stats(self, batches: Sequence[Batch]) -> TokenStats:
        """Token-level figures of the step over all ranks. Collective over the world."""
        sums, largest = torch.zeros(5, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        if self.groups.is_last_stage and self.groups.tp.rank() == 0:  # tensor-parallel ranks have the same log-probs
            for batch in batches:
                sums += batch.tokens.sums
                largest[0] = max(float(largest), batch.tokens.largest)
        device = torch.cuda.current_device()
        sums, largest = sums.to(device), largest.to(device)
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return TokenStats(sums.cpu(), float(largest))

    def gather_parameters(self) -> None:
        """Brings every parameter up to the last update: under overlap_param_gather the next forward pass would."""
        for chunk in self.ddp:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Every HF (name, tensor) on every rank, one at a time. Collective: all ranks consume all of it."""
        self.gather_parameters()
        return stream_hf(self.chunks, self.architecture, tp_group=self.groups.tp, pp_group=self.groups.pp)


def _wrap(chunks: Sequence[nn.Module], config: Config) -> list[DistributedDataParallel]:
    """Megatron's DDP around each chunk, and the hooks that its schedules look for in the model's config."""
    wide = config.model.dtype == "bf16"
    values = {"grad_reduce_in_fp32": wide, "use_distributed_optimizer": _distributed(config)}
    ddp_config = DistributedDataParallelConfig(**values | _fields_of(DistributedDataParallelConfig, config.megatron))
    wrapped = [
        DistributedDataParallel(
            chunk.config,
            ddp_config,
            chunk,
            disable_bucketing=i > 0,  # later chunks' gradients arrive together
        )
        for i, chunk in enumerate(chunks)
    ]
    shared: Any = chunks[0].config
    shared.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        shared.no_sync_func = _one_or_all([chunk.no_sync for chunk in wrapped])
        if ddp_config.align_param_gather:
            shared.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in wrapped])
    return wrapped


def _one_or_all(functions: list[Any]) -> Any:
    return functions if len(functions) > 1 else functions[0]


def _distributed(config: Config) -> bool:
    return config.optimizer.distributed and config.model.dtype != "fp64"


def _fields_of(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    known = {f.name for f in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name in known}


def _optimizer(config: Config, ddp: Sequence[DistributedDataParallel]) -> MegatronOptimizer:
    chosen = config.optimizer
    values = {
        "optimizer": "adam",
        "lr": chosen.lr,
        "min_lr": chosen.min_lr,
        "weight_decay": chosen.weight_decay,
        "adam_beta1": chosen.beta1,
        "adam_beta2": chosen.beta2,
        "adam_eps": chosen.eps,
        "clip_grad": chosen.clip_grad,
        "bf16": config.model.dtype == "bf16",
        "params_dtype": torch_dtype(config.model.dtype),
        "use_distributed_optimizer": _distributed(config),
    }
    return get_megatron_optimizer(OptimizerConfig(**values | _fields_of(OptimizerConfig, config.megatron)), list(ddp))


def _scheduler(config: Config, optimizer: MegatronOptimizer, num_updates: int) -> OptimizerParamScheduler:
    chosen = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=chosen.lr,
        min_lr=chosen.min_lr,
        lr_warmup_steps=min(chosen.warmup_updates, num_updates - 1),
        lr_decay_steps=num_updates,
        lr_decay_style=chosen.schedule,
        start_wd=chosen.weight_decay,
        end_wd=chosen.weight_decay,
        wd_incr_steps=num_updates,
        wd_incr_style="constant",
    )
