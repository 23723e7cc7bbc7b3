"""vLLM in processes of their own, on other GPUs or other machines, behind vLLM's own HTTP server.

    rank                0        1        2        3            two servers: each answers for two ranks
    server              0        1        0        1
    sends weights       yes      yes      no       no           the first rank of a server; every rank asks it

A rank asks one server, so a server that dies takes the answers of its ranks with it: the stage draws them anew on the
next ranks' server. A server that this run has started is started again before the next sync.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_real.config import Config
from megatron_real.cpu import device
from megatron_real.records import Completion, Prompt, Sampling
from megatron_real.rollout.engine import EngineFailed, Held
from megatron_real.rollout.link import Link, buckets, listen, own_address
from megatron_real.rollout.server import Server, ServerProcess, wait_until_healthy
from megatron_real.rollout.tokenizer import completion_of, eos_ids, load_tokenizer

_CALL_SECONDS = 60.0
"""For a call that computes next to nothing."""


_Result = TypeVar("_Result")


class VllmServerEngine:
    """One rank's side of a server."""

    name = "vllm-server"
    process = "worker"
    tp = 1  # of ranks: a server has its own

    def __init__(self, config: Config, *, say: Callable[[str], None]) -> None:
        """Starts the servers, or finds those that are given; collective over all ranks.

        Raises:
            ValueError: a server does not start, does not answer, or was started for something else.
        """
        self._config, self._say = config, say
        path, chosen = config.model.path, config.rollout
        self.tokenizer = load_tokenizer(config.model)
        self.eos = eos_ids(path, self.tokenizer.eos_token_id)
        rank, count = dist.get_rank(), len(chosen.servers) or chosen.num_servers
        self._longest = config.data.max_prompt_tokens + chosen.max_response_tokens
        self.number, self.owner = rank % count, rank < count
        self.started: ServerProcess | None = None
        """The server, if this rank has started it."""
        if chosen.servers and "VLLM_API_KEY" not in os.environ:
            raise ValueError("rollout.servers want a key, but VLLM_API_KEY is not set; set it as the servers have it")
        key = os.environ["VLLM_API_KEY"] if chosen.servers else secrets.token_urlsafe(32)
        self._key = _everyone(key)[0]
        self._link: Link | None = None
        self._link_name = ""
        if self.owner and not chosen.servers:
            self.started = ServerProcess(config, number=self.number, key=self._key)
        try:
            self._connect()
        except EngineFailed as error:
            raise ValueError(str(error)) from error

    def held(self) -> dict[str, Held]:
        return self._held

    def checksums(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, dict[int, int]]:
        """Collective over all ranks.

        Raises:
            EngineFailed: on every rank alike.
        """
        wanted = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
        seconds = self._config.rollout.sync.timeout_seconds
        workers = _alike(lambda: self.server.call("checksums", wanted, timeout=seconds) if self.owner else [])
        return {name: {self._numbered(i): found[name] for i, found in enumerate(workers)} for name in dtypes}

    def revive(self) -> None:
        """Starts the servers that have ended again, or waits for those that are given. Collective over all ranks.

        Raises:
            EngineFailed: on every rank alike.
        """
        given = self._config.rollout.servers
        gone = _alike(lambda: self.server.url if self.owner and not self.server.healthy() else "")
        if known := [url for url in _everyone(gone) if url]:
            self._say(f"{', '.join(known)} no longer serves; {'waiting for it' if given else 'it is started again'}")
            if gone and self.started is not None:
                self.started.stop()
                self.started.start()
            self._connect()

    def prepare_for_inference(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sends the weights. Collective over all ranks.

        Raises:
            EngineFailed: on every rank alike.
        """
        stream = iter(weights)

        def send() -> None:
            try:
                if self.owner:
                    self._send(stream)
            except EngineFailed:
                _take_part(stream)
                raise
            _take_part(stream)

        _alike(send)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> Iterator[tuple[int, int, Completion]]:
        """Completions as they finish: a request for each, with a seed of its own, as the engine in the process has."""
        requests: SimpleQueue[tuple[int, int]] = SimpleQueue()
        answers: SimpleQueue[tuple[int, int, Completion | EngineFailed]] = SimpleQueue()
        for i in range(len(prompts)):
            for k in range(sampling.num_samples):
                requests.put((i, k))

        def ask() -> None:
            with suppress(Empty):
                while True:
                    i, k = requests.get_nowait()
                    try:
                        answers.put((i, k, self._complete(prompts[i], sampling, seeds[i] + k)))
                    except Exception as error:  # of whatever kind: this answer is waited for
                        answers.put((i, k, EngineFailed(f"an answer of {self.server.url} makes no sense: {error!r}")))

        number = requests.qsize()
        for _ in range(min(number, self._config.rollout.max_sequences)):
            Thread(target=ask, name="vllm-server", daemon=True).start()  # a run that ends does not wait for answers
        failure: EngineFailed | None = None
        try:
            for _ in range(number):
                i, k, found = answers.get()
                if isinstance(found, EngineFailed):
                    failure = found
                else:
                    yield i, k, found
        finally:
            with suppress(Empty):
                while True:
                    requests.get_nowait()
            self.server.cancel()
        if failure is not None:
            raise failure

    def finish_inference(self) -> None:
        """A server has its memory for itself."""

    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion | EngineFailed:
        body = {
            "prompt": list(prompt.token_ids),
            "max_tokens": min(sampling.max_tokens, self._longest - len(prompt.token_ids)),  # the server refuses more
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": seed % 2**63,
            "stop_token_ids": self.eos,
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        try:
            answer = self.server.post("/v1/completions", body, timeout=self._config.rollout.request_timeout_seconds)
        except EngineFailed as error:
            return error
        (choice,) = answer["choices"]
        return completion_of(choice["token_ids"], choice["logprobs"]["token_logprobs"], self.tokenizer, self.eos)

    def _connect(self) -> None:
        """Waits for the servers and learns what they hold. Collective over all ranks.

        Raises:
            EngineFailed: on every rank alike.
        """
        given = self._config.rollout.servers
        urls = given or _everyone(self.started.server.url if self.started else "")
        self.server = Server(urls[self.number], self._key)

        def described() -> list[Any]:
            if not self.owner:
                return []
            if self.started is not None:
                self.started.wait(self._say)
            else:
                wait_until_healthy(self.server, self._config.rollout.server_start_seconds, self._say)
            workers = self.server.call("describe", timeout=_CALL_SECONDS)
            self._check(workers[0])
            return workers

        self._held = self._described(_everyone(_alike(described))[self.number])

    def _check(self, said: Mapping[str, Any]) -> None:
        """Whether a server that is given was started for this run's configuration."""
        for name, wanted in (("logprobs_mode", "processed_logprobs"), ("max_model_len", self._longest)):
            if said[name] != wanted:
                raise EngineFailed(
                    f"the vLLM server {self.server.url} has {name} = {said[name]}, this run needs {wanted}; start "
                    "it by megatron-real serve with this run's configuration"
                )

    def _described(self, said: Sequence[Mapping[str, Any]]) -> dict[str, Held]:
        """What the server expects, as its workers say, and, for the rank that sends it weights, where."""
        workers = [worker["held"] for worker in said]
        return {
            name: Held(
                tuple(shape),
                {
                    self._numbered(i): tuple(slice(*ends) for ends in worker[name][1])
                    for i, worker in enumerate(workers)
                    if self.owner
                },
            )
            for name, (shape, _) in workers[0].items()
        }

    def _numbered(self, worker: int) -> int:
        """Workers are counted through all servers."""
        return self.number * self._config.rollout.tp + worker

    def _send(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        seconds = self._config.rollout.sync.timeout_seconds
        link = self._linked(seconds)
        for bucket in buckets(weights):
            slots = [[slot.name, slot.dtype, slot.shape, slot.start] for slot in bucket.slots]
            contents = {"num_bytes": len(bucket.flat), "slots": slots}
            self._beside("receive_bucket", contents, partial(link.send, bucket.flat), seconds)
        self.server.call("pack_weights", timeout=seconds)
        if not self.server.post("/reset_prefix_cache", timeout=_CALL_SECONDS)["success"]:
            raise EngineFailed(f"the vLLM server {self.server.url} did not reset its prefix cache: it still generates")

    def _linked(self, seconds: float) -> Link:
        """The link to the server's workers, made anew if one of them does not know it."""
        names = self.server.call("link_name", timeout=_CALL_SECONDS)
        if self._link is None or any(name != [self._link_name] for name in names):
            self._link_name, listener = secrets.token_hex(8), listen(own_address(*self.server.address))
            size = len(names) + 1
            said = {"name": self._link_name, "address": listener.getsockname(), "size": size, "seconds": seconds}
            ours = partial(Link.host, listener, size=size, device=device(), seconds=seconds)
            self._link = self._beside("join_link", said, ours, seconds)
        return self._link

    def _beside(self, method: str, argument: Any, ours: Callable[[], _Result], seconds: float) -> _Result:
        """Does our end of what the workers do meanwhile. Where they fail, ours would wait in vain: it is left alone."""
        result: Future[_Result] = Future()

        def run() -> None:
            try:
                result.set_result(ours())
            except Exception as error:
                result.set_exception(error)

        Thread(target=run, daemon=True).start()
        self.server.call(method, argument, timeout=seconds)
        try:
            return result.result(seconds)
        except (TimeoutError, RuntimeError, OSError) as error:
            raise EngineFailed(f"the link to the vLLM server {self.server.url} failed: {error!r}") from error


def _everyone(mine: Any) -> list[Any]:
    """[ranks] what each rank says."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _alike(action: Callable[[], _Result]) -> _Result:
    """What `action` returns on this rank; where it fails on one rank, it fails on all. Collective."""
    result: list[_Result] = []
    failure = ""
    try:
        result.append(action())
    except EngineFailed as error:
        failure = str(error)
    for found in filter(None, _everyone(failure)):
        raise EngineFailed(found)
    return result[0]


def _take_part(stream: Iterator[tuple[str, Tensor]]) -> None:
    """The stream is collective: every rank takes part in every tensor, whatever becomes of a server."""
    for _ in stream:
        pass
