"""The policy: a megatron-core GPTModel whose last stage returns log-probs instead of logits.

Model building stays in this file: megatron-core 0.19 announces that GPTModel gives way to HybridModel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_real.config import ModelConfig, ParallelConfig
from megatron_real.policy.layers import local_block_spec
from megatron_real.policy.logprobs import linear_logprobs, vocab_parallel_logprobs
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.stored import torch_dtype


class LogprobHead(ColumnParallelLinear):
    """The output layer, returning the log-prob of each target token: [T, 1, 1] instead of logits [T, 1, V / TP].

    With `with_entropy`, [T, 1, 2]: the entropy of each token's distribution stands beside its log-prob.

    A module and not a function of the hidden states, because DDP's parameter gather hooks the module's forward: reading
    its weight from outside would see stale values under overlap_param_gather.
    """

    target_T: Tensor
    """[T] next token of each position or NO_TARGET; set before each forward."""
    kept_K: Tensor
    """[K] int64 the positions with a target; set before each forward."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocab_size: int,
        padded_vocab_size: int,
        temperature: float,
        from_logits: bool,
        with_entropy: bool,
        fp32_logits: bool,
        tp_group: Any,
    ) -> None:
        super().__init__(
            config.hidden_size,
            padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=tp_group,
        )
        self.vocab_size = vocab_size
        self.temperature = temperature
        self.from_logits = from_logits
        self.with_entropy = with_entropy
        self.fp32_logits = fp32_logits

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, None]:
        weight = self.weight if weight is None else weight
        options: dict[str, Any] = {
            "tp_group": self.tp_group,
            "temperature": self.temperature,
            "vocab_size": self.vocab_size,
            "return_entropy": self.with_entropy,
            "kept_K": self.kept_K,
        }
        outputs: Any
        if self.from_logits:
            logits, _ = super().forward(input_, weight)
            outputs = vocab_parallel_logprobs(logits.squeeze(1), self.target_T, **options)
        else:
            outputs = linear_logprobs(
                input_.squeeze(1),
                weight,
                self.target_T,
                sequence_parallel=self.sequence_parallel,
                fp32_logits=self.fp32_logits,
                **options,
            )
        if self.with_entropy:
            return torch.stack(outputs, dim=-1)[:, None, :], None
        return outputs[:, None, None], None


class PolicyModel(GPTModel):
    """GPTModel with a LogprobHead. One pipeline stage (or one of its virtual chunks) of the policy."""

    output_layer: Any

    def __init__(
        self,
        *,
        vocab_size: int,
        padded_vocab_size: int,
        temperature: float,
        from_logits: bool,
        with_entropy: bool,
        fp32_logits: bool,
        **gpt: Any,
    ) -> None:
        super().__init__(vocab_size=padded_vocab_size, **gpt)
        if self.config.params_dtype == torch.float64:
            # Exactness tests run in fp64, where fp32 angles would be the largest error.
            self.rotary_pos_emb.inv_freq = self.rotary_pos_emb.inv_freq.double()
        if self.post_process:
            head = LogprobHead(
                self.config,
                vocab_size=vocab_size,
                padded_vocab_size=padded_vocab_size,
                temperature=temperature,
                from_logits=from_logits,
                with_entropy=with_entropy,
                fp32_logits=fp32_logits,
                tp_group=self.pg_collection.tp,
            )
            head.weight = self.output_layer.weight
            self.output_layer = head

    def forward(
        self, tokens_T: Tensor, target_T: Tensor, kept_K: Tensor, packed: PackedSeqParams
    ) -> Tensor:
        """Returns the last stage's log-probs [T], with entropies [T, 2]; elsewhere hidden states for the next stage."""
        if self.post_process:
            self.output_layer.target_T = target_T
            self.output_layer.kept_K = kept_K
        out = super().forward(tokens_T[None], None, None, packed_seq_params=packed)
        if not self.post_process:
            return out
        outputs = out.squeeze(0)
        return outputs if self.output_layer.with_entropy else outputs.squeeze(1)


def build_model(
    architecture: Architecture,
    *,
    model: ModelConfig,
    parallel: ParallelConfig,
    megatron: Mapping[str, Any],
    temperature: float,
    groups: ProcessGroupCollection,
    with_entropy: bool = False,
) -> list[PolicyModel]:
    """The chunks of this rank's pipeline stage (one without virtual pipelining), on its device, weights uninitialised.

    Args:
        architecture: the model's sizes.
        model, parallel: numerics and layout.
        megatron: TransformerConfig fields that override ours.
        temperature: sampling temperature of the log-probs.
        groups: megatron-core's process groups.
        with_entropy: the last stage also returns the entropy of each token's distribution.
    """
    config = transformer_config(architecture, model=model, parallel=parallel, megatron=megatron)
    use_te = uses_transformer_engine(model.layers)
    chunks = []
    for vp_stage in range(parallel.vpp):
        stage = vp_stage if parallel.vpp > 1 else None
        first = groups.pp.rank() == 0 and vp_stage == 0
        last = groups.pp.rank() == parallel.pp - 1 and vp_stage == parallel.vpp - 1
        chunk = PolicyModel(
            config=config,
            transformer_layer_spec=_te_spec(config) if use_te else local_block_spec(config, stage),
            vocab_size=architecture.vocab_size,
            padded_vocab_size=architecture.padded_vocab(parallel.tp),
            temperature=temperature,
            from_logits=model.logprobs == "logits",
            with_entropy=with_entropy,
            fp32_logits=model.fp32_head,
            max_sequence_length=architecture.max_positions,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            rope_scaling=architecture.rope_factor is not None,
            rope_scaling_factor=architecture.rope_factor or 1.0,
            pg_collection=groups,
            vp_stage=stage,
        )
        chunks.append(chunk.to(torch.cuda.current_device()))
    return chunks


def transformer_config(
    architecture: Architecture,
    *,
    model: ModelConfig,
    parallel: ParallelConfig,
    megatron: Mapping[str, Any],
) -> TransformerConfig:
    """HF sizes and our layout as megatron-core's TransformerConfig; `megatron` overrides field by field."""
    dtype = torch_dtype(model.dtype)
    values: dict[str, Any] = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_size,
        "num_attention_heads": architecture.num_heads,
        "num_query_groups": architecture.num_kv_heads,
        "kv_channels": architecture.head_dim,
        "add_bias_linear": architecture.linear_bias,
        "add_qkv_bias": architecture.qkv_bias,
        "qk_layernorm": architecture.qk_norm,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "layernorm_epsilon": architecture.norm_eps,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": model.dtype == "bf16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "attention_backend": AttnBackend.auto,
        # The values are overwritten, but only initialisation marks a parameter as tensor-parallel, and the gradient
        # norm leaves out every shard but the first rank's of those that are not marked.
        "perform_initialization": True,
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if parallel.vpp > 1 else None,
        "context_parallel_size": parallel.cp,
        "sequence_parallel": parallel.sp,
        # Megatron's own averaging is off: see train_step.py.
        "calculate_per_token_loss": True,
        # Micro-batches differ in length; megatron-core ties that to this dispatcher even for dense models.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # The default batched p2p gives wrong gradients in the interleaved schedule (proven by the invariance matrix).
        "overlap_p2p_comm": parallel.vpp > 1,
        "batch_p2p_comm": parallel.vpp == 1,
        # A synchronisation of the device after each exchange, for a race in the batched calls of old versions of torch.
        "batch_p2p_sync": False,
        **_recompute(model.recompute),
    }
    if uses_transformer_engine(model.layers):
        # One kernel for the rotation of all sequences, which read their bounds back in every layer before, and one for
        # SwiGLU, which keeps one product of the MLP's width instead of two.
        values |= {"apply_rope_fusion": True, "bias_activation_fusion": True}
    known = {f.name for f in dataclasses.fields(TransformerConfig)}
    return TransformerConfig(**values | {k: v for k, v in megatron.items() if k in known})


def _recompute(choice: str) -> dict[str, Any]:
    if choice == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return {"recompute_granularity": "selective"} if choice == "selective" else {}


def uses_transformer_engine(choice: str) -> bool:
    """Whether model.layers means TransformerEngine's layers on this machine.

    Raises:
        ValueError: it asks for them, and they do not import.
    """
    if choice == "local" or (choice == "auto" and not torch.cuda.is_available()):
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        if choice == "te":
            raise ValueError(
                f"model.layers=te needs TransformerEngine, which does not import ({error}); use model.layers=local"
            ) from error
        return False
    return True


def _te_spec(config: TransformerConfig) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
