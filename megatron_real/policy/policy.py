"""The policy on Megatron: model, optimizer and the updates of one step's rollouts."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from megatron_real.batching import Minibatch, Plan, minibatches
from megatron_real.config import BatchConfig, Config, ModelConfig, ParallelConfig
from megatron_real.config import OptimizerConfig as OptimizerSettings
from megatron_real.objective import Objective
from megatron_real.objective.facts import RolloutTable
from megatron_real.parallel.cpu import device
from megatron_real.parallel.exchange import Exchange
from megatron_real.parallel.groups import ProcessGroups
from megatron_real.policy.model import build_model, uses_transformer_engine
from megatron_real.policy.optimizer_state import Offload
from megatron_real.policy.packing import Packer
from megatron_real.policy.passes import Passes
from megatron_real.policy.train_step import (
    Batch,
    Gradient,
    TokenFigures,
    TokenStats,
    TrainStep,
)
from megatron_real.records import Rollout
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
    """Whether the loss or the gradient was not finite: weights and optimizer are as before."""
    skipped_in_a_row: int
    """Updates skipped up to this one without one that was made in between."""


@dataclass(frozen=True)
class PolicySettings:
    """What of a run's configuration the policy is built from."""

    model: ModelConfig
    """Weights and numerics."""
    parallel: ParallelConfig
    """The layout."""
    batch: BatchConfig
    """How minibatches are cut and packed."""
    optimizer: OptimizerSettings
    """AdamW and the learning-rate schedule."""
    objective: Objective
    """The loss."""
    megatron: Mapping[str, Any]
    """Fields of megatron-core's configurations that override ours."""
    temperature: float
    """Sampling temperature: log-probs are of the sampling distribution."""
    mismatch_bound: float
    """|log-prob here - in the engine| (nats) beyond which a token counts in mismatch_share."""
    offload_optimizer: bool
    """Whether the optimizer's state leaves the device while the engine is awake."""
    keep_token_weights: bool = False
    """Whether updates leave each token's ratio and weight in the batch."""

    @classmethod
    def of(cls, config: Config) -> PolicySettings:
        """Reads them from a run's configuration."""
        return cls(
            model=config.model,
            parallel=config.parallel,
            batch=config.batch,
            optimizer=config.optimizer,
            objective=config.objective,
            # The user's own fields come last and win.
            megatron={"deterministic_mode": config.trainer.deterministic} | dict(config.megatron),
            temperature=config.rollout.temperature,
            mismatch_bound=config.rollout.mismatch_bound,
            offload_optimizer=config.rollout.offload_optimizer,
            keep_token_weights=config.trainer.keep_token_weights,
        )


class Policy:
    """The trained model on this rank's place in the layout, whole once it is built.

    Example:
        settings = PolicySettings.of(config)
        weights = HfWeights(config.model.path)
        policy = Policy(settings, architecture, weights, groups, num_updates=4000)
        updates = [policy.update(batch) for batch in policy.prepare(rollouts)]
    """

    def __init__(
        self,
        settings: PolicySettings,
        architecture: Architecture,
        weights: Weights,
        groups: ProcessGroups,
        *,
        num_updates: int,
        exchange: Exchange | None = None,
    ) -> None:
        """Builds the model, fills it from `weights`, and builds the optimizer.

        Args:
            settings: what to build.
            architecture: the model's sizes.
            weights: HF tensors by name; a rank reads its own slices.
            groups: this rank's place in the layout.
            num_updates: length of the learning-rate schedule.
            exchange: brings the rollouts that other ranks hold; None: every rank has all rollouts
                whole.
        """
        self.settings = settings
        self.architecture = architecture
        self.groups = groups
        self.exchange = exchange

        self.chunks = build_model(
            architecture,
            model=settings.model,
            parallel=settings.parallel,
            megatron=settings.megatron,
            temperature=settings.temperature,
            with_entropy=settings.objective.entropy_bonus > 0,
            groups=groups.megatron,
        )
        self.ddp = _wrap(self.chunks, settings)

        self.passes = Passes(self.ddp, groups)
        self.packer = Packer(
            architecture,
            settings.objective,
            settings.batch,
            settings.parallel,
            groups,
            bounds_on_host=not uses_transformer_engine(settings.model.layers),
        )
        self.step = TrainStep(
            self.passes,
            groups,
            settings.objective,
            mismatch_bound=settings.mismatch_bound,
            keep_token_weights=settings.keep_token_weights,
        )
        self.skipped_in_a_row = 0
        """Updates skipped since the last one that was made."""

        # Before the optimizer is built, which copies its master weights from the parameters.
        self.load_parameters(weights)

        self._optimizer: MegatronOptimizer | None = None
        # megatron-core's optimizers know no fp64; the tests of exactness need gradients alone.
        if settings.model.dtype != "fp64":
            self._optimizer = _optimizer(settings, self.ddp)
            self.scheduler = _scheduler(settings.optimizer, self._optimizer, num_updates)
            self._offload = Offload(self._optimizer)

    @property
    def optimizer(self) -> MegatronOptimizer:
        """Megatron's optimizer of this rank's parameters.

        Raises:
            ValueError: the model is fp64, which no optimizer of megatron-core knows.
        """
        if self._optimizer is None:
            raise ValueError("model.dtype=fp64 has no optimizer; use fp32 or bf16 to train")
        return self._optimizer

    def load_parameters(self, weights: Weights) -> None:
        """Overwrites the model's parameters with HF weights.

        The optimizer's master copies stay as they are. Collective: one data-parallel replica reads
        the weights for all.
        """
        load_weights(
            self.chunks,
            weights,
            self.architecture,
            tp_rank=self.groups.tp.rank(),
            tp=self.groups.tp.size(),
            replicas=self.groups.dp_cp,
        )

    def prepare(self, rollouts: Sequence[Rollout], *, lagging: bool = False) -> list[Batch]:
        """Cuts one step's rollouts into the batches of its updates, and computes old log-probs.

        The first batch needs none, unless the rollouts lag behind: it is trained on by the very
        weights that generated them. Lagging rollouts want their weights in the model while this
        runs (snapshot.py).
        """
        batches = self.cut(rollouts, lagging=lagging)
        # Skipping the first batch saves a forward pass of each step: its ratio is 1 exactly.
        first_to_score = 0 if lagging else 1
        for batch in batches[first_to_score:]:
            self.step.old_logprobs(batch)
        return batches

    def cut(self, rollouts: Sequence[Rollout], *, lagging: bool = False) -> list[Batch]:
        """Returns the batches of a step's updates, without old log-probs."""
        step_minibatches = minibatches(
            rollouts,
            self.settings.objective,
            groups_per_minibatch=self.settings.batch.minibatch_prompts,
        )
        # The first update moves the weights, so that every later minibatch is off-policy.
        plans = [
            self.packer.plan(minibatch, off_policy=lagging or i > 0)
            for i, minibatch in enumerate(step_minibatches)
        ]
        return self._built(self.packer, step_minibatches, plans)

    def zero_gradients(self) -> None:
        """Clears the gradient buffers, before a pass that adds to them."""
        for chunk in self.ddp:
            # Megatron's gradients are in DDP's buffers; the optimizer's zero_grad clears .grad.
            chunk.zero_grad_buffer()
        if self._optimizer is not None:
            self._optimizer.zero_grad()

    def gradient(self, batch: Batch) -> Gradient:
        """Fills the gradient buffers with the gradient of the minibatch's loss. Collective."""
        self.zero_gradients()
        return self.step.gradient(batch)

    def update(self, batch: Batch) -> Update:
        """Makes one optimizer update. Collective.

        A loss or gradient that is not finite leaves everything as it was.
        """
        gradient = self.gradient(batch)
        # Read before the step: the scheduler moves on with it.
        lr = float(self.optimizer.param_groups[0]["lr"])
        grad_norm = self.apply_gradients(finite=math.isfinite(gradient.loss))
        skipped = self.skipped_in_a_row > 0
        return Update(gradient, grad_norm, lr, skipped, self.skipped_in_a_row)

    def apply_gradients(self, *, finite: bool) -> float:
        """Makes an optimizer step with the gradients in the buffers if all is finite.

        Args:
            finite: whether the loss was.

        Returns:
            The global L2 norm before clipping; `skipped_in_a_row` is 0 if the step was made.
        """
        # The norm is wanted before anything is changed. `step` copies the gradients to the
        # optimizer's own once more, which gives the same.
        self.optimizer.prepare_grads()
        norm = self.optimizer.get_grad_norm()
        grad_norm = 0.0
        if norm is not None:
            grad_norm = float(norm)

        # The norm is over all ranks, so that all of them come to the same decision.
        if finite and math.isfinite(grad_norm):
            self.optimizer.step()
            self.scheduler.step(increment=1)
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
        return grad_norm

    def mismatch(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Returns the mean |log-prob here - in the engine| (nats) of each rollout.

        The log-probs are those of the present weights; an empty rollout has 0. Collective over the
        world.
        """
        return self.step.mismatch(self.whole(rollouts)).tolist()

    def whole(self, rollouts: Sequence[Rollout]) -> Batch:
        """Packs all rollouts that have a token, whatever their labels, for a forward pass."""
        answered = tuple(i for i, r in enumerate(rollouts) if r.completion.num_trained)
        facts = self.settings.objective.facts(RolloutTable.of(rollouts))
        everything = Minibatch(tuple(rollouts), kept=answered, facts=facts)
        # Nothing is gathered within the pass, so groups may lie anywhere.
        packer = self.packer.with_placement("auto")
        planned = packer.plan(everything, off_policy=False)
        (batch,) = self._built(packer, [everything], [planned])
        return batch

    def _built(
        self, packer: Packer, step_minibatches: Sequence[Minibatch], plans: Sequence[Plan]
    ) -> list[Batch]:
        """Returns the minibatches' batches.

        The tokens that their plans want on this rank come in one exchange.
        """
        if self.exchange is None:
            return [
                packer.build(minibatch, planned, minibatch.rollouts)
                for minibatch, planned in zip(step_minibatches, plans, strict=True)
            ]

        # All minibatches in a row, and of each data-parallel rank the positions in it that it
        # computes.
        rollouts: list[Rollout] = []
        wanted: list[list[int]] = [[] for _ in range(self.groups.dp.size())]
        for minibatch, planned in zip(step_minibatches, plans, strict=True):
            first = len(rollouts)
            for replica, micro_batches in enumerate(planned.micro_batches):
                for members in micro_batches:
                    wanted[replica] += [first + minibatch.kept[k] for k in members]
            rollouts += minibatch.rollouts
        brought = self.exchange.bring(rollouts, [wanted[i] for i in self._replica_of_rank])

        batches = []
        first = 0
        for minibatch, planned in zip(step_minibatches, plans, strict=True):
            end = first + len(minibatch.rollouts)
            batches.append(packer.build(minibatch, planned, brought[first:end]))
            first = end
        return batches

    @functools.cached_property
    def _replica_of_rank(self) -> list[int]:
        """[ranks] the data-parallel rank of each. Collective the first time."""
        assert self.exchange is not None, "only an exchange asks where ranks stand"
        return self.exchange.of_ranks(self.groups.dp.rank())

    def token_stats(self, batches: Sequence[Batch]) -> TokenStats:
        """Returns token-level figures of the step over all ranks. Collective over the world."""
        total = TokenFigures.zeros(device())
        # Tensor-parallel ranks have the same log-probs: one of them counts.
        if self.groups.is_last_stage and self.groups.tp.rank() == 0:
            for batch in batches:
                total.add(batch.tokens.sums, batch.tokens.largest)

        dist.all_reduce(total.sums)
        dist.all_reduce(total.largest, op=dist.ReduceOp.MAX)
        return TokenStats(total.sums.cpu(), float(total.largest))

    def make_room(self) -> None:
        """Frees device memory for an engine, where rollout.offload_optimizer asks for it.

        The gradient buffers are freed, and the optimizer's state goes to host memory. Forward
        passes and checkpoints work meanwhile, updates do not.
        """
        if self.settings.offload_optimizer:
            for chunk in self.ddp:
                chunk.offload_grad_buffers()
            self._offload.to_host()

    def take_room_back(self) -> None:
        """Undoes `make_room`; the gradient buffers are zero, as an update begins with them."""
        if self.settings.offload_optimizer:
            self._offload.to_device()
            for chunk in self.ddp:
                chunk.restore_grad_buffers()

    def gather_parameters(self) -> None:
        """Brings every parameter up to the last update. Collective.

        Under overlap_param_gather the next forward pass would, and until then they are old. What
        was gathered since then, by a pass or by this function, is not gathered again.
        """
        for chunk in self.ddp:
            if not chunk.ddp_config.overlap_param_gather:
                continue
            for buckets in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                # megatron-core forgets that they were gathered at the end of each backward pass,
                # before the update.
                pending = buckets.param_gather_handle is not None
                if pending or not buckets.param_gather_dispatched:
                    buckets.start_param_sync(force_sync=True)

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every HF (name, tensor) on every rank, one at a time.

        Collective: all ranks consume all of it.
        """
        self.gather_parameters()
        return stream_hf(
            self.chunks, self.architecture, tp_group=self.groups.tp, pp_group=self.groups.pp
        )


def _wrap(chunks: Sequence[nn.Module], settings: PolicySettings) -> list[DistributedDataParallel]:
    """Wraps each chunk in Megatron's DDP.

    Megatron's schedules look for hooks in the model's config, which are set here too.
    """
    distributed = _distributed(settings)
    values = {
        "grad_reduce_in_fp32": settings.model.dtype == "bf16",
        "use_distributed_optimizer": distributed,
        # Buckets of gradients leave during the last backward pass, weights arrive during the next
        # forward pass.
        "overlap_grad_reduce": distributed,
        "overlap_param_gather": distributed,
    }
    ddp_config = DistributedDataParallelConfig(
        **values | _fields_of(DistributedDataParallelConfig, settings.megatron)
    )
    wrapped = [
        # Later chunks are not bucketed, as in Megatron-LM: their gradients arrive together.
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]

    # The schedules take one function, or under virtual pipelining a list with one for each chunk.
    no_sync: Any = [chunk.no_sync for chunk in wrapped]
    start_param_sync: Any = [chunk.start_param_sync for chunk in wrapped]
    if len(wrapped) == 1:
        no_sync = no_sync[0]
        start_param_sync = start_param_sync[0]

    # One configuration for all chunks, which the schedules look the functions up in.
    shared: Any = chunks[0].config
    shared.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        shared.no_sync_func = no_sync
        if ddp_config.align_param_gather:
            shared.param_sync_func = start_param_sync
    return wrapped


def _distributed(settings: PolicySettings) -> bool:
    # There is no optimizer for fp64, and so none to be distributed.
    return settings.optimizer.distributed and settings.model.dtype != "fp64"


def _fields_of(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of the values that are fields of a dataclass.

    The configuration's `megatron` section overrides fields of three configurations at once.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name in known}


def _optimizer(
    settings: PolicySettings, ddp: Sequence[DistributedDataParallel]
) -> MegatronOptimizer:
    adam = settings.optimizer
    values = {
        "optimizer": "adam",
        "lr": adam.lr,
        "min_lr": adam.min_lr,
        "weight_decay": adam.weight_decay,
        "adam_beta1": adam.beta1,
        "adam_beta2": adam.beta2,
        "adam_eps": adam.eps,
        "clip_grad": adam.clip_grad,
        "bf16": settings.model.dtype == "bf16",
        "params_dtype": torch_dtype(settings.model.dtype),
        "use_distributed_optimizer": _distributed(settings),
    }

    values |= _fields_of(OptimizerConfig, settings.megatron)
    return get_megatron_optimizer(OptimizerConfig(**values), list(ddp))


def _scheduler(
    adam: OptimizerSettings, optimizer: MegatronOptimizer, num_updates: int
) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=adam.lr,
        min_lr=adam.min_lr,
        # megatron-core asserts that the warmup ends before the decay does.
        lr_warmup_steps=min(adam.warmup_updates, num_updates - 1),
        lr_decay_steps=num_updates,
        lr_decay_style=adam.schedule,
        # Constant; megatron-core has no default for the schedule of the weight decay.
        start_wd=adam.weight_decay,
        end_wd=adam.weight_decay,
        wd_incr_steps=num_updates,
        wd_incr_style="constant",
    )
