"""The embedded engine: transformers' own `generate`, in the training process.

It needs no further installation, and is not fast.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from megatron_real.config import Config, ModelConfig
from megatron_real.parallel.cpu import device
from megatron_real.records import Completion, Prompt, Sampling
from megatron_real.rollout.engines.engine import InTrainer, TensorPart
from megatron_real.rollout.engines.tokenizer import completion_of, eos_ids, load_tokenizer
from megatron_real.weights.by_transformers import new_model
from megatron_real.weights.stored import torch_dtype


def missing(config: Config) -> str:
    """Returns an empty text: this package depends on transformers, so nothing is missing."""
    return ""


def build(config: Config, *, say: Callable[[str], None]) -> TransformersEngine:
    """Builds the engine; collective over all ranks."""
    return TransformersEngine(config.model, batch_size=config.rollout.batch_size)


class TransformersEngine(InTrainer):
    """Holds a whole copy of the model on each rank and decodes in batches.

    The prompts of a batch have similar lengths, so that there is little padding.
    """

    name = "transformers"
    tp = 1

    def __init__(self, model: ModelConfig, *, batch_size: int) -> None:
        """Builds the model from the config at its path, without reading weights.

        The weights come by `prepare_for_inference`.
        """
        self.tokenizer = load_tokenizer(model)
        self.batch_size = batch_size
        # Built on the device: a copy on the host first would double the memory.
        with torch.device(device()):
            self.model = new_model(model.path, torch_dtype(model.dtype))
        self.model.eval()

        # The model's own generation config would add its top_p, top_k or penalties to the sampling.
        self.eos = eos_ids(model.path, self.tokenizer.eos_token_id)
        self.model.generation_config = GenerationConfig(
            eos_token_id=self.eos, pad_token_id=self.eos[0]
        )

    def parts(self) -> dict[str, TensorPart]:
        """Returns every tensor as a part: the whole of it."""
        parts = {}
        for name, tensor in self.model.state_dict().items():
            parts[name] = TensorPart(tuple(tensor.shape), (slice(None),) * tensor.dim(), tensor)
        return parts

    def prepare_for_inference(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        # These are the model's own tensors: to copy into one changes the model.
        parameters = self.model.state_dict()
        for name, tensor in weights:
            parameters[name].copy_(tensor)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> Iterator[tuple[int, int, Completion]]:
        # By length, so that a batch has little padding; stable, so that equal prompts give equal
        # batches.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        requests = [(i, k) for i in order for k in range(sampling.num_samples)]
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            batch_prompts = [prompts[i] for i, _ in batch]
            # One generator draws for the whole batch, so its seed depends on all prompts' seeds.
            completions = self._decode(batch_prompts, sampling, seed=f"{seeds}-{start}")
            for (i, k), completion in zip(batch, completions, strict=True):
                yield i, k, completion

    def finish_inference(self) -> None:
        if device().type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """It has nothing but its model."""

    def _decode(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: str
    ) -> list[Completion]:
        """Returns a completion of each prompt, all decoded together.

        Shape suffixes: B prompts, L tokens of prompt and response, V vocabulary.
        """
        # Padded on the left, so that every response begins at the same column.
        width = max(len(p.token_ids) for p in prompts)
        # Any token does as padding: the mask hides it.
        ids_BL = torch.full((len(prompts), width), self.eos[0])
        mask_BL = torch.zeros_like(ids_BL)
        for row, prompt in enumerate(prompts):
            first = width - len(prompt.token_ids)
            ids_BL[row, first:] = torch.tensor(prompt.token_ids)
            mask_BL[row, first:] = 1

        recorder = _SampledLogprobs(sampling.temperature)
        # Sampling must not advance the generators that training draws from.
        generator_devices = [device()] if device().type == "cuda" else []
        with torch.random.fork_rng(devices=generator_devices), torch.inference_mode():
            # A text gives Python's generator the same state in every process; torch
            # takes numbers alone.
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
        for tokens, token_logprobs in zip(out_BL[:, width:].tolist(), logprobs, strict=True):
            # After the first token that ends a response there is padding.
            ends = (t + 1 for t, token in enumerate(tokens) if token in self.eos)
            length = next(ends, len(tokens))

            completions.append(
                completion_of(tokens[:length], token_logprobs[:length], self.tokenizer, self.eos)
            )
        return completions


class _SampledLogprobs(LogitsProcessor):
    """Divides the logits by the temperature and remembers the log-prob of each sampled token.

    `generate` can return all scores, but those are [tokens, batch, vocabulary]: too large to keep.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._last_BV: Tensor | None = None
        self._sampled: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._remember(input_ids)
        scaled_BV = scores.float() / self.temperature
        # Of all tokens, before top_p and top_k, which `generate` applies after this processor.
        self._last_BV = scaled_BV.log_softmax(-1)
        return scaled_BV

    def finish(self, output_ids: Tensor) -> Tensor:
        """Returns the log-probs (nats) of the sampled tokens, [batch, new tokens]."""
        self._remember(output_ids)
        return torch.stack(self._sampled, dim=1)

    def _remember(self, ids_BL: Tensor) -> None:
        """Keeps the log-prob of the last token, which was sampled from the last call's scores."""
        if self._last_BV is not None:
            self._sampled.append(self._last_BV.gather(1, ids_BL[:, -1:]).squeeze(1))
