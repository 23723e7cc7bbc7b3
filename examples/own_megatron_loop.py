"""REAL inside a megatron-core training loop of your own, through this package's
public functions alone.

    torchrun --nproc-per-node 2 examples/own_megatron_loop.py

The model, the optimizer and the loop below are plain megatron-core. REAL needs three calls:
`vocab_parallel_logprobs` on your logits, `sequence_scores` and `real_weights`. Each data-parallel
rank holds whole groups here; where a group is spread over ranks or micro-batches, gather the scores
(one float a rollout) before `real_weights`.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megatron_real import real_loss, real_weights, sequence_scores, vocab_parallel_logprobs
from megatron_real.parallel import cpu

cpu.enable()  # only acts where there is no GPU; before megatron is imported

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

VOCAB, PROMPT, LENGTH, GROUPS, SAMPLES = 128, 4, 10, 4, 4


def main() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(1)
    dropout = {"hidden_dropout": 0, "attention_dropout": 0}
    config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4, **dropout)
    layers = get_gpt_layer_local_spec()
    model = GPTModel(config, layers, VOCAB, LENGTH, position_embedding_type="rope")
    model.to(cpu.device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    generator = torch.Generator().manual_seed(0)  # stands for your rollouts
    tokens_RS = torch.randint(0, VOCAB, (GROUPS * SAMPLES, LENGTH), generator=generator)
    tokens_RS = tokens_RS.to(cpu.device())
    group_R = torch.arange(GROUPS, device=cpu.device()).repeat_interleave(SAMPLES)
    label_R = (tokens_RS[:, -1] < VOCAB // 2).long()  # "verified": the last token's half
    old_logprob_RS = response_logprobs(model, tokens_RS).detach()
    mask_RS = torch.ones_like(old_logprob_RS, dtype=torch.bool)

    for step in range(20):
        score_R = sequence_scores(response_logprobs(model, tokens_RS), old_logprob_RS, mask=mask_RS)
        weight_R = real_weights(score_R.detach(), label_R, group_R)
        optimizer.zero_grad()
        (weight_R * score_R).sum().backward()
        optimizer.step()
        loss = real_loss(score_R.detach(), label_R, group_R)
        if dist.get_rank() == 0:
            print(f"step {step:2d}  loss {loss:.4f}", flush=True)
    dist.destroy_process_group()


def response_logprobs(model: GPTModel, tokens_RS: torch.Tensor) -> torch.Tensor:
    """[R, response] log-probs of the response tokens, from logits sharded over the vocabulary."""
    length = tokens_RS.shape[1] - 1
    position_RS = torch.arange(length, device=tokens_RS.device).expand(len(tokens_RS), -1)
    future = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens_RS.device).triu(1)
    logits_RSV = model(tokens_RS[:, :-1], position_RS, future)
    tp_group = parallel_state.get_tensor_model_parallel_group()
    targets_T = tokens_RS[:, 1:].flatten()
    logprob_T = vocab_parallel_logprobs(logits_RSV.flatten(0, 1), targets_T, tp_group=tp_group)
    return logprob_T.view(len(tokens_RS), length)[:, PROMPT - 1 :]


if __name__ == "__main__":
    main()
