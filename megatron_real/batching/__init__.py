"""Rollouts -> minibatches -> micro-batches: global denominators are fixed here, before packing."""

from megatron_real.batching.minibatch import Minibatch, minibatches
from megatron_real.batching.placement import Layout, Plan, plan

__all__ = ["Layout", "Minibatch", "Plan", "minibatches", "plan"]
