"""The policy: a megatron-core GPTModel whose last stage returns log-probs instead of logits.

Model building stays in this file: megatron-core 0.19 announces that GPTModel gives way to
HybridModel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_real.config import ModelConfig, ParallelConfig
from megatron_real.parallel.cpu import device
from megatron_real.policy.layers import local_block_spec
from megatron_real.policy.logprobs import linear_logprobs, vocab_parallel_logprobs
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.stored import torch_dtype


class LogprobHead(ColumnParallelLinear):
    """The output layer: it returns the log-prob of each target token instead of logits.

    Its output is [T, 1, 1] where megatron-core's has [T, 1, V / TP]. With `with_entropy` it is
    [T, 1, 2]: the entropy of each token's distribution stands beside its log-prob.

    It is a module and not a function of the hidden states, because DDP's parameter gather hooks the
    module's forward: reading its weight from outside would see stale values under
    overlap_param_gather.
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
            # The weight comes later: PolicyModel takes the one that GPTModel has made.
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
        if weight is None:
            weight = self.weight
        options: dict[str, Any] = {
            "tp_group": self.tp_group,
            "temperature": self.temperature,
            "vocab_size": self.vocab_size,
            "return_entropy": self.with_entropy,
            "kept_K": self.kept_K,
        }

        # A pair where entropies are asked for.
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

        # Megatron's layout: tokens, batch of one, and here the values of a token.
        if self.with_entropy:
            return torch.stack(outputs, dim=-1)[:, None, :], None
        return outputs[:, None, None], None


class PolicyModel(GPTModel):
    """GPTModel with a LogprobHead: a pipeline stage of the policy, or one of its virtual chunks."""

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
            # GPTModel built an output layer, whose weight has Megatron's marks (None if tied).
            head.weight = self.output_layer.weight
            self.output_layer = head

    def forward(
        self, tokens_T: Tensor, target_T: Tensor, kept_K: Tensor, packed: PackedSeqParams
    ) -> Tensor:
        """Returns the last stage's log-probs, or what the next stage takes.

        Args:
            tokens_T: [T] int64 input tokens.
            target_T: [T] int64 token that each position predicts, or NO_TARGET.
            kept_K: [K] int64 the positions with a target.
            packed: bounds of the sequences.

        Returns:
            [T] log-probs, with entropies [T, 2]; on every stage but the last, hidden states.
        """
        if self.post_process:
            self.output_layer.target_T = target_T
            self.output_layer.kept_K = kept_K
        # A batch of one packed row; positions and mask follow from the packed bounds.
        out = super().forward(tokens_T[None], None, None, packed_seq_params=packed)
        if not self.post_process:
            return out

        outputs = out.squeeze(0)
        if self.output_layer.with_entropy:
            return outputs
        return outputs.squeeze(1)


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
    """Builds the chunks of this rank's pipeline stage, on its device, weights uninitialised.

    Without virtual pipelining there is one chunk.

    Args:
        architecture: the model's sizes.
        model: numerics, layers and recomputation.
        parallel: the layout.
        megatron: TransformerConfig fields that override ours.
        temperature: sampling temperature of the log-probs.
        groups: megatron-core's process groups.
        with_entropy: the last stage also returns the entropy of each token's distribution.
    """
    config = transformer_config(architecture, model=model, parallel=parallel, megatron=megatron)
    use_te = uses_transformer_engine(model.layers)

    chunks = []
    for vp_stage in range(parallel.vpp):
        # None, not 0, is how megatron-core knows that there is no virtual pipelining.
        stage = vp_stage if parallel.vpp > 1 else None
        spec: Any
        if use_te:
            spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        else:
            spec = local_block_spec(config, stage)

        chunk = PolicyModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=architecture.vocab_size,
            padded_vocab_size=architecture.padded_vocab(parallel.tp),
            temperature=temperature,
            from_logits=model.logprobs == "logits",
            with_entropy=with_entropy,
            fp32_logits=model.fp32_head,
            max_sequence_length=architecture.max_positions,
            pre_process=groups.pp.rank() == 0 and vp_stage == 0,
            post_process=groups.pp.rank() == parallel.pp - 1 and vp_stage == parallel.vpp - 1,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            rope_scaling=architecture.rope_factor is not None,
            rope_scaling_factor=architecture.rope_factor or 1.0,
            pg_collection=groups,
            vp_stage=stage,
        )

        # megatron-core builds on the current device; `to` is for what it leaves on the host.
        chunks.append(chunk.to(device()))
    return chunks


def release_models() -> None:
    """Drops what megatron-core keeps of every model for the life of the process.

    `RotaryEmbedding.forward` is cached for the whole class, and a key of the cache has the
    embedding in it: over its hooks that is the model, its gradient buffers and its process groups.
    """
    RotaryEmbedding.forward.cache_clear()


def transformer_config(
    architecture: Architecture,
    *,
    model: ModelConfig,
    parallel: ParallelConfig,
    megatron: Mapping[str, Any],
) -> TransformerConfig:
    """Returns HF sizes and our layout as megatron-core's TransformerConfig.

    Args:
        architecture: the model's sizes.
        model: numerics, layers and recomputation.
        parallel: the layout.
        megatron: fields that override ours one by one; others than TransformerConfig's are left to
            the configurations that have them.
    """
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
        # The values are overwritten, but only initialisation marks a parameter as tensor-parallel,
        # and the gradient norm leaves out every shard but the first rank's of those not marked.
        "perform_initialization": True,
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if parallel.vpp > 1 else None,
        "context_parallel_size": parallel.cp,
        "sequence_parallel": parallel.sp,
        # Megatron's own averaging is off: see train_step.py.
        "calculate_per_token_loss": True,
        # Micro-batches differ in length; megatron-core ties that to this dispatcher even for dense
        # models.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # The default batched p2p gives wrong gradients in the interleaved schedule (proven by the
        # invariance matrix).
        "overlap_p2p_comm": parallel.vpp > 1,
        "batch_p2p_comm": parallel.vpp == 1,
        # A synchronisation of the device after each exchange, for a race in the batched calls of
        # old versions of torch.
        "batch_p2p_sync": False,
    }

    if model.recompute != "none":
        values["recompute_granularity"] = model.recompute
    if model.recompute == "full":
        # Every layer's input is kept, and nothing else.
        values |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    if uses_transformer_engine(model.layers):
        # One kernel for the rotation of all sequences, which read their bounds back in every layer
        # before, and one for SwiGLU, which keeps one product of the MLP's width instead of two.
        values |= {"apply_rope_fusion": True, "bias_activation_fusion": True}

    # Last, so that what a user sets for megatron-core wins over all of the above.
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    values |= {name: value for name, value in megatron.items() if name in known}
    return TransformerConfig(**values)


def uses_transformer_engine(layers: str) -> bool:
    """Returns whether model.layers means TransformerEngine's layers on this machine.

    Args:
        layers: `te`, `local`, or `auto`, which takes TransformerEngine's on a GPU if they import.

    Raises:
        ValueError: it asks for them, and they do not import.
    """
    if layers == "local" or (layers == "auto" and not torch.cuda.is_available()):
        return False

    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        if layers == "te":
            raise ValueError(
                f"model.layers=te needs TransformerEngine, which does not import ({error}); "
                "use model.layers=local"
            ) from error
        return False
    return True
