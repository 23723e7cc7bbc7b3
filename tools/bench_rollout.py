"""Tokens per second of our rollout stage against vLLM called directly,
on the same prompts in one run.

    python tools/bench_rollout.py [--dtype bf16]

Directly: an engine of vLLM's own making, with the same limits, that reads the weights from disk;
one call for all prompts, n samples each, with the log-probs that REAL needs. Ours: the stage, with
the spread, a seed for each answer, the completions as records and on their way to the verifier.
Every answer has the full length: the end-of-sequence token is one that is hardly ever drawn.

To reach: at least 0.95.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch.distributed as dist
from bench_engine import PROMPT_TOKENS, VOCAB, configured
from bench_machine import add_options, apply_options, interleaved, show

from megatron_real.config import Config
from megatron_real.labels import Labeller
from megatron_real.parallel.groups import set_up
from megatron_real.records import Prompt, Sampling
from megatron_real.rollout import RolloutStage, build_engine
from megatron_real.rollout.sync import WeightSync
from megatron_real.weights.hf import HfWeights


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    add_options(parser, rounds=4)
    options = parser.parse_args()
    with configured(
        dtype=options.dtype, response_tokens=options.tokens, kv_cache_mib=512
    ) as config:
        apply_options(options)
        measure(config, options)


def measure(config: Config, options: argparse.Namespace) -> None:
    set_up(config.parallel)
    draw = random.Random(0)
    prompts = [
        Prompt(str(i), "", tuple(draw.randrange(2, VOCAB) for _ in range(PROMPT_TOKENS)), ("",))
        for i in range(options.prompts)
    ]
    sampling = Sampling(options.samples, temperature=1.0, max_tokens=options.tokens)
    engine: Any = build_engine(config, say=lambda _: None)
    weights = HfWeights(config.model.path)
    sync = WeightSync(engine, config.rollout.sync, tied=False, probe=prompts[0], temperature=1.0)
    sync.run(
        (name, weights.read(name).to(engine.model.lm_head.weight.dtype)) for name in weights.names
    )
    # Hardly ever drawn: every answer has the full length, on both paths.
    engine.eos = [VOCAB - 1]
    labeller = Labeller("exact", workers=1, timeout_seconds=10, memory_mib=512)
    stage = RolloutStage(engine, labeller, rank=dist.get_rank(), world=dist.get_world_size())
    direct = Direct(config)
    tokens = {"direct": 0, "stage": 0}

    # Without the prefix cache of the round before, which would spare the prompts.
    def directly() -> None:
        direct.llm.reset_prefix_cache()
        outputs = direct.llm.generate(
            direct.inputs(prompts), direct.parameters(sampling, VOCAB - 1), use_tqdm=False
        )
        tokens["direct"] = sum(len(c.token_ids) for o in outputs for c in o.outputs)

    def by_the_stage() -> None:
        engine.llm.reset_prefix_cache()
        sampled = stage.generate(prompts, sampling, seed=1)
        tokens["stage"] = sum(len(drawn.completion.token_ids) for drawn in sampled.drawn)

    seconds = interleaved({"direct": lambda: directly, "stage": lambda: by_the_stage}, options)
    speed = {name: tokens[name] / s for name, s in seconds.items()}
    rows = [
        {
            "path": name,
            "tokens": tokens[name],
            "tokens/s": speed[name],
            "x direct": speed[name] / speed["direct"],
        }
        for name in seconds
    ]
    labeller.close()
    show(
        f"Rollouts, {options.prompts} prompts x {options.samples} in {options.dtype}", rows, options
    )


class Direct:
    """vLLM as its documentation calls it."""

    def __init__(self, config: Config) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=config.model.path,
            dtype={"bf16": "bfloat16", "fp32": "float32"}[config.model.dtype],
            enforce_eager=True,
            max_model_len=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
            max_num_seqs=config.rollout.max_sequences,
            # The same as ours: with less, vLLM would preempt sequences and draw them again.
            kv_cache_memory_bytes=config.rollout.kv_cache_mib << 20,
            distributed_executor_backend="external_launcher",
        )

    def inputs(self, prompts: list[Prompt]) -> Any:
        return [{"prompt_token_ids": list(p.token_ids)} for p in prompts]

    def parameters(self, sampling: Sampling, eos: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=sampling.num_samples,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            logprobs=0,  # of the drawn token alone
            seed=1,
            stop_token_ids=[eos],
        )


if __name__ == "__main__":
    main()
