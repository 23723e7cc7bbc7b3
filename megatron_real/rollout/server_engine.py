"""vLLM in processes of their own, on other GPUs or other machines, behind vLLM's own HTTP server.

    rank                0        1        2        3            two servers: each answers for two ranks
    server              0        1        0        1
    sends weights       yes      yes      no       no           the first rank of a server; every rank asks it

A rank asks one server, so a server that dies takes the answers of its ranks with it: the stage draws them anew on the
next ranks' server. A server that this run has started is started again before the next sync.
"""

from __future__ import annotations

import atexit
import importlib.util
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

from megatron_real.collective import on_every_rank
from megatron_real.config import Config
from megatron_real.cpu import device
from megatron_real.records import Completion, Prompt, Sampling
from megatron_real.rollout.engine import EngineFailed, Held
from megatron_real.rollout.link import Link, buckets, link_secret, listen, own_address
from megatron_real.rollout.server import Server, ServerProcess, wait_until_healthy
from megatron_real.rollout.tokenizer import completion_of, eos_ids, load_tokenizer

_CALL_SECONDS = 60.0
"""For a call that computes next to nothing."""


_Result = TypeVar("_Result")


def missing(config: Config) -> str:
    """Why servers cannot be started here; servers that run already need nothing on this machine."""
    if config.rollout.servers or importlib.util.find_spec("vllm") is not None:
        return ""
    return "vLLM is not installed"


def build(config: Config, *, say: Callable[[str], None]) -> VllmServerEngine:
    """Builds this rank's side; collective over all ranks."""
    return VllmServerEngine(config, say=say)


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
            raise ValueError(
                "rollout.servers want a key, but VLLM_API_KEY is not set; set it as the servers have it"
            )
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
        workers = _all_or_none(
            lambda: self.server.call("checksums", wanted, timeout=seconds) if self.owner else []
        )[dist.get_rank()]
        return {
            name: {self._numbered(i): found[name] for i, found in enumerate(workers)}
            for name in dtypes
        }

    def revive(self) -> bool:
        """Starts the servers that have ended again, or waits for those that are given. Collective over all ranks.

        Returns:
            Whether any had ended.

        Raises:
            EngineFailed: on every rank alike.
        """
        given = self._config.rollout.servers

        def ended() -> str:
            """Its address, if it serves no more. A process of ours is asked first: its port may be another's now."""
            if not self.owner:
                return ""
            is_gone = self.started is not None and self.started.ended()
            return self.server.url if is_gone or not self.server.healthy() else ""

        gone = _all_or_none(ended)
        known = [url for url in gone if url]
        if known:
            self._say(
                f"{', '.join(known)} no longer serves; {'waiting for it' if given else 'it is started again'}"
            )
            if gone[dist.get_rank()] and self.started is not None:
                self.started.stop()
                self.started.start()
            self._connect()
        return bool(known)

    def prepare_for_inference(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sends the weights. Collective over all ranks.

        Raises:
            EngineFailed: on every rank alike.
        """
        stream = iter(weights)

        failure: EngineFailed | None = None
        try:
            if self.owner:
                self._send(stream)
        except EngineFailed as error:
            failure = error
        _take_part(stream)

        def outcome() -> None:
            if failure is not None:
                raise failure

        _all_or_none(outcome)

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
                        answers.put(
                            (
                                i,
                                k,
                                EngineFailed(
                                    f"an answer of {self.server.url} makes no sense: {error!r}"
                                ),
                            )
                        )

        number = requests.qsize()
        for _ in range(min(number, self._config.rollout.max_sequences)):
            Thread(
                target=ask, name="vllm-server", daemon=True
            ).start()  # a run that ends does not wait for answers
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

    def close(self) -> None:
        """Ends the server that this rank has started; one that is given serves on."""
        if self._link is not None:
            self._link.close()
        if self.started is not None:
            self.started.stop()
            # A later process of this machine may get the same process group's number.
            atexit.unregister(self.started.stop)

    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion | EngineFailed:
        body = {
            "prompt": list(prompt.token_ids),
            "max_tokens": min(
                sampling.max_tokens, self._longest - len(prompt.token_ids)
            ),  # the server refuses more
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
            answer = self.server.post(
                "/v1/completions", body, timeout=self._config.rollout.request_timeout_seconds
            )
        except EngineFailed as error:
            return error
        (choice,) = answer["choices"]
        return completion_of(
            choice["token_ids"], choice["logprobs"]["token_logprobs"], self.tokenizer, self.eos
        )

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
                wait_until_healthy(
                    self.server, self._config.rollout.server_start_seconds, self._say
                )
            workers = self.server.call("describe", timeout=_CALL_SECONDS)
            self._check(workers[0])
            return workers

        self._held = self._described(_all_or_none(described)[self.number])

    def _check(self, said: Mapping[str, Any]) -> None:
        """Whether a server that is given was started for this run's configuration."""
        for name, wanted in (
            ("logprobs_mode", "processed_logprobs"),
            ("max_model_len", self._longest),
        ):
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
            try:
                self._beside("receive_bucket", contents, partial(link.send, bucket.flat), seconds)
            except EngineFailed:
                link.abort()
                self._link = None
                raise
        self.server.call("pack_weights", timeout=seconds)
        if not self.server.post("/reset_prefix_cache", timeout=_CALL_SECONDS)["success"]:
            raise EngineFailed(
                f"the vLLM server {self.server.url} did not reset its prefix cache: it still generates"
            )

    def _linked(self, seconds: float) -> Link:
        """The link to the server's workers, made anew if one of them does not know it."""
        names = self.server.call("link_name", timeout=_CALL_SECONDS)
        if self._link is None or any(name != [self._link_name] for name in names):
            self._link_name, listener = (
                secrets.token_hex(8),
                listen(own_address(*self.server.address)),
            )
            size = len(names) + 1
            said = {
                "name": self._link_name,
                "address": listener.getsockname(),
                "size": size,
                "seconds": seconds,
            }
            secret = link_secret(self._key, self._link_name)
            ours = partial(Link.host, listener, secret, size=size, device=device(), seconds=seconds)
            if self._link is not None:
                self._link.close()
            self._link = self._beside("join_link", said, ours, seconds)
        return self._link

    def _beside(
        self, method: str, argument: Any, ours: Callable[[], _Result], seconds: float
    ) -> _Result:
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
            raise EngineFailed(
                f"the link to the vLLM server {self.server.url} failed: {error!r}"
            ) from error


def _everyone(mine: Any) -> list[Any]:
    """[ranks] what each rank says."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _all_or_none(action: Callable[[], _Result]) -> list[_Result]:
    """[ranks] what `action` returns; where it fails on one rank, it fails on all. Collective."""
    return on_every_rank(action, group=dist.group.WORLD, expected=EngineFailed, raises=EngineFailed)


def _take_part(stream: Iterator[tuple[str, Tensor]]) -> None:
    """The stream is collective: every rank takes part in every tensor, whatever becomes of a server."""
    for _ in stream:
        pass
