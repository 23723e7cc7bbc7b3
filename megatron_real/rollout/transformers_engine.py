"""The embedded engine: transformers' own `generate`, in the training process. No extra install, not fast."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor

from megatron_real.cpu import device
from megatron_real.records import Completion, Prompt, Sampling
from megatron_real.weights.stored import torch_dtype


class TransformersEngine:
    """Holds a whole copy of the model on each rank and decodes in batches, sorted by prompt length."""

    name = "transformers"

    def __init__(self, path: str, *, dtype: str, batch_size: int) -> None:
        """Builds the model of `path`'s config without reading its weights: they come by `prepare_for_inference`."""
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.batch_size = batch_size
        with torch.device(device()):
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch_dtype(dtype))
        self.model.eval()
        # The model's own generation config would add its top_p, top_k or penalties to what the sampling asks for.
        self.eos = _eos_ids(path, self.tokenizer.eos_token_id)
        self.model.generation_config = GenerationConfig(eos_token_id=self.eos, pad_token_id=self.eos[0])

    def prepare_for_inference(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own = self.model.state_dict()
        tied = {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()
        missing = set(own) - tied
        for name, tensor in weights:
            if name not in own or own[name].shape != tensor.shape:
                have = tuple(own[name].shape) if name in own else "no such tensor"
                raise RuntimeError(f"weight sync: {name} has shape {tuple(tensor.shape)}, the engine has {have}")
            own[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise RuntimeError(f"weight sync: the engine got nothing for {', '.join(sorted(missing))}")

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[list[Completion]]:
        found = {(i, k): completion for i, k, completion in self.stream(prompts, sampling, seed=seed)}
        return [[found[i, k] for k in range(sampling.num_samples)] for i in range(len(prompts))]

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int
    ) -> Iterator[tuple[int, int, Completion]]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        requests = [(i, k) for i in order for k in range(sampling.num_samples)]
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            completions = self._decode([prompts[i] for i, _ in batch], sampling, seed=f"{seed}-{start}")
            for (i, k), completion in zip(batch, completions, strict=True):
                yield i, k, completion

    def finish_inference(self) -> None:
        if device().type == "cuda":
            torch.cuda.empty_cache()

    def _decode(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: str) -> list[Completion]:
        width = max(len(p.token_ids) for p in prompts)
        ids_BL = torch.full((len(prompts), width), self.eos[0])
        mask_BL = torch.zeros_like(ids_BL)
        for row, prompt in enumerate(prompts):
            ids_BL[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask_BL[row, width - len(prompt.token_ids) :] = 1
        recorder = _SampledLogprobs(sampling.temperature)
        generator_devices = [device()] if device().type == "cuda" else []
        with torch.random.fork_rng(devices=generator_devices), torch.inference_mode():
            torch.manual_seed(random.Random(seed).getrandbits(48))
            out_BL = self.model.generate(
                ids_BL.to(device()),
                attention_mask=mask_BL.to(device()),
                do_sample=True,
                temperature=1.0,  # the recorder divides by it
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_new_tokens=sampling.max_tokens,
                logits_processor=[recorder],
            )
            logprobs = recorder.finish(out_BL).tolist()
        completions = []
        for tokens, logprob in zip(out_BL[:, width:].tolist(), logprobs, strict=True):
            length = next((t + 1 for t, token in enumerate(tokens) if token in self.eos), len(tokens))
            finished = bool(tokens) and tokens[length - 1] in self.eos
            text = str(self.tokenizer.decode(tokens[:length], skip_special_tokens=True))
            completions.append(Completion(tuple(tokens[:length]), tuple(logprob[:length]), text, finished))
        return completions


class _SampledLogprobs(LogitsProcessor):
    """Divides the logits by the temperature and remembers the log-prob of each token that was then sampled.

    `generate` can return all scores, but those are [tokens, batch, vocabulary].
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._last_BV: Tensor | None = None
        self._sampled: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._remember(input_ids)
        scaled_BV = scores.float() / self.temperature
        self._last_BV = scaled_BV.log_softmax(-1)
        return scaled_BV

    def finish(self, output_ids: Tensor) -> Tensor:
        """[batch, new tokens] log-probs (nats)."""
        self._remember(output_ids)
        return torch.stack(self._sampled, dim=1)

    def _remember(self, ids_BL: Tensor) -> None:
        if self._last_BV is not None:
            self._sampled.append(self._last_BV.gather(1, ids_BL[:, -1:]).squeeze(1))


def _eos_ids(path: str, tokenizer_eos: int | None) -> list[int]:
    """Every token that ends a response: the generation config may name more than the tokenizer does."""
    try:
        configured = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the directory has no generation_config.json
        configured = None
    listed = configured if isinstance(configured, list) else [configured]
    eos = [token for token in dict.fromkeys([tokenizer_eos, *listed]) if token is not None]
    if not eos:
        raise ValueError(f"neither the tokenizer nor the generation config of {path!r} names an end-of-sequence token")
    return eos
