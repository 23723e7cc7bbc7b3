"""vLLM in processes of its own, on other GPUs or other machines, behind vLLM's own HTTP server.

    rank                0        1        2        3       two servers: each answers two ranks
    server              0        1        0        1
    sends weights       yes      yes      no       no      only the first rank of a server

Each rank asks one server. When a server dies, the answers to its ranks are lost, and the stage
draws them again on another server. A server that this run has started is started again before the
next sync.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_real.challenge import own_address
from megatron_real.config import Config
from megatron_real.parallel.collective import (
    all_well,
    gathered,
    gathered_if_any,
    on_every_rank,
    shared,
)
from megatron_real.parallel.cpu import device
from megatron_real.records import Completion, Prompt, Sampling
from megatron_real.rollout.engines.engine import EngineFailed, Held
from megatron_real.rollout.engines.tokenizer import completion_of, eos_ids, load_tokenizer
from megatron_real.rollout.vllm_server.link import Link, buckets, link_secret, listen
from megatron_real.rollout.vllm_server.server import Server, ServerProcess, wait_until_healthy

_CALL_SECONDS = 60.0
"""Time limit of a call that computes next to nothing."""

_Result = TypeVar("_Result")


def missing(config: Config) -> str:
    """Says why servers cannot be started here; empty if they can.

    Servers that run already need nothing on this machine.
    """
    if config.rollout.servers or importlib.util.find_spec("vllm") is not None:
        return ""
    return "vLLM is not installed"


def build(config: Config, *, say: Callable[[str], None]) -> VllmServerEngine:
    """Builds this rank's side of a server; collective over all ranks."""
    return VllmServerEngine(config, say=say)


class VllmServerEngine:
    """One rank's side of a server."""

    name = "vllm-server"
    process = "worker"
    tp = 1  # training ranks of an engine; the GPUs of a server are rollout.tp

    def __init__(self, config: Config, *, say: Callable[[str], None]) -> None:
        """Starts the servers, or finds those that are given; collective over all ranks.

        Raises:
            ValueError: a server does not start, does not answer, or was started for something else.
        """
        self._config = config
        self._say = say
        rollout = config.rollout
        self.tokenizer = load_tokenizer(config.model)
        self.eos = eos_ids(config.model.path, self.tokenizer.eos_token_id)
        self._longest = config.data.max_prompt_tokens + rollout.max_response_tokens

        rank = dist.get_rank()
        num_servers = len(rollout.servers) or rollout.num_servers
        # Neighbouring ranks ask different servers, and the first `num_servers` ranks own one each.
        self.number = rank % num_servers
        """Number of the server that this rank asks."""
        self.at_once = -(-rollout.max_sequences * num_servers // dist.get_world_size())
        """This rank's share of the sequences that its server decodes together, rounded up."""
        self.owner = rank < num_servers
        """Whether this rank starts the server and sends it weights."""
        self.started: ServerProcess | None = None
        """The server, if this rank has started it."""

        if not rollout.servers:
            key = secrets.token_urlsafe(32)
        elif "VLLM_API_KEY" in os.environ:
            key = os.environ["VLLM_API_KEY"]
        else:
            raise ValueError(
                "rollout.servers want a key, but VLLM_API_KEY is not set; set it as the servers "
                "have it"
            )
        self._key = shared(key, group=dist.group.WORLD)
        self._link: Link | None = None
        self._link_name = ""

        # All servers start at the same time, before any is waited for.
        if self.owner and not rollout.servers:
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
        # Plain text, because the server takes nothing else.
        dtype_names = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
        seconds = self._config.rollout.sync.timeout_seconds

        def sums_of_workers() -> list[Mapping[str, int]]:
            if not self.owner:
                return []
            return self.server.call("checksums", dtype_names, timeout=seconds)

        workers = _all_or_none(sums_of_workers)
        checksums: dict[str, dict[int, int]] = {}
        for name in dtypes:
            checksums[name] = {self._numbered(i): sums[name] for i, sums in enumerate(workers)}
        return checksums

    def revive(self) -> bool:
        """Starts servers again that have ended, or waits for those that are given.

        Collective over all ranks.

        Returns:
            Whether any had ended.

        Raises:
            EngineFailed: on every rank alike.
        """

        def url_if_ended() -> str:
            if not self.owner:
                return ""
            # The process first: where it has ended, its port may be another process's now.
            process_ended = self.started is not None and self.started.ended()
            if process_ended or not self.server.healthy():
                return self.server.url
            return ""

        own_url = _all_or_none(url_if_ended)
        ended = [url for url in gathered_if_any(own_url, group=dist.group.WORLD) if url]
        if not ended:
            return False

        remedy = "waiting for it" if self._config.rollout.servers else "it is started again"
        self._say(f"{', '.join(ended)} no longer serves; {remedy}")
        if own_url and self.started is not None:
            self.started.stop()
            self.started.start()
        self._connect()
        return True

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
        # The stream is collective: every rank takes part in every tensor, whatever becomes of a
        # server.
        for _ in stream:
            pass

        def outcome() -> None:
            if failure is not None:
                raise failure

        _all_or_none(outcome)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> Iterator[tuple[int, int, Completion]]:
        # Every rank may fill its server: ranks that share one need not end at the same time.
        num_requests = len(prompts) * sampling.num_samples
        together = min(num_requests, self._config.rollout.max_sequences)
        rows = iter(range(len(prompts)))
        return self._generated(prompts, sampling, seeds, rows, together)

    def generate_as_room(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        rows: Iterator[int],
    ) -> Iterator[tuple[int, int, Completion]]:
        return self._generated(prompts, sampling, seeds, rows, self.at_once)

    def _generated(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        rows: Iterator[int],
        together: int,
    ) -> Iterator[tuple[int, int, Completion]]:
        """Yields completions as they finish.

        There is a request for each completion, with a seed of its own, as in the engine of the
        training processes.

        Args:
            prompts, sampling, seeds, rows: see `QueueEngine.generate_as_room`.
            together: number of requests that are under way at the same time.
        """
        requests = _UnsentRequests(rows, sampling.num_samples)
        # A completion, the failure that has cost one, an error that ends the run, or None from each
        # thread that has ended.
        answers: SimpleQueue[tuple[int, int, Completion] | Exception | None] = SimpleQueue()

        def ask() -> None:
            try:
                while (request := requests.next()) is not None:
                    i, k = request
                    answer = self._complete(prompts[i], sampling, seeds[i] + k)

                    if isinstance(answer, EngineFailed):
                        # One answer may be lost to a timeout; where the server is gone, all others
                        # would be too.
                        requests.end_unless(self._serves)
                        answers.put(answer)
                    else:
                        answers.put((i, k, answer))
            except Exception as error:
                answers.put(error)
            answers.put(None)

        # Daemons: a run that ends does not wait for answers.
        for _ in range(together):
            Thread(target=ask, name="vllm-server", daemon=True).start()

        failure: EngineFailed | None = None
        num_asking = together
        try:
            while num_asking:
                answer = answers.get()
                if answer is None:
                    num_asking -= 1
                elif isinstance(answer, EngineFailed):
                    failure = answer
                elif isinstance(answer, Exception):
                    raise answer
                else:
                    yield answer
        finally:
            # Also where the caller has left the loop: no thread asks for more, and the server stops
            # computing what was asked.
            requests.end()
            self.server.cancel()
        # Last, so that one lost answer does not cost those that come after it.
        if failure is not None:
            raise failure

    def finish_inference(self) -> None:
        """Does nothing: a server has its memory for itself."""

    def close(self) -> None:
        """Ends the server that this rank has started; one that is given serves on."""
        if self._link is not None:
            self._link.close()
        if self.started is not None:
            self.started.stop()
            # A later process of this machine may get the same process group's number.
            atexit.unregister(self.started.stop)

    def _serves(self) -> bool:
        """Returns whether the server still answers at all."""
        try:
            return self.server.healthy()
        except EngineFailed:
            return False

    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion | EngineFailed:
        """Asks the server for one completion.

        Returns:
            The error instead, of whatever kind it is: the answer is waited for.
        """
        # The server refuses to go beyond the longest sequence that it was started for.
        max_tokens = min(sampling.max_tokens, self._longest - len(prompt.token_ids))

        body = {
            "prompt": list(prompt.token_ids),
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": seed % 2**63,
            "stop_token_ids": self.eos,
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
            # The server has no tokenizer that could spell them.
            "return_tokens_as_token_ids": True,
        }

        seconds = self._config.rollout.request_timeout_seconds
        try:
            answer = self.server.post("/v1/completions", body, timeout=seconds)
            (choice,) = answer["choices"]
            tokens = choice["token_ids"]
            logprobs = choice["logprobs"]["token_logprobs"]
            return completion_of(tokens, logprobs, self.tokenizer, self.eos)
        except EngineFailed as error:
            return error
        except Exception as error:
            return EngineFailed(f"an answer of {self.server.url} makes no sense: {error!r}")

    def _connect(self) -> None:
        """Waits for the servers and learns what they hold. Collective over all ranks.

        Raises:
            EngineFailed: on every rank alike.
        """
        rollout = self._config.rollout
        own_url = self.started.server.url if self.started is not None else ""
        urls = rollout.servers or gathered(own_url, group=dist.group.WORLD)
        self.server = Server(urls[self.number], self._key)

        def described() -> list[Any]:
            if not self.owner:
                return []
            if self.started is not None:
                self.started.wait(self._say)
            else:
                wait_until_healthy(self.server, rollout.server_start_seconds, self._say)
            workers = self.server.call("describe", timeout=_CALL_SECONDS)

            # A server that is given may have been started for something else.
            needed = {"logprobs_mode": "processed_logprobs", "max_model_len": self._longest}
            for name, value in needed.items():
                if workers[0][name] != value:
                    raise EngineFailed(
                        f"the vLLM server {self.server.url} has {name} = {workers[0][name]}, this "
                        f"run needs {value}; start it by megatron-real serve with this run's "
                        "configuration"
                    )
            return workers

        # The rank of a server's number is its owner, which alone has asked the server.
        of_rank = on_every_rank(
            described, group=dist.group.WORLD, expected=EngineFailed, raises=EngineFailed
        )
        workers = of_rank[self.number]

        # The tensors that the server expects, and for the rank that sends it weights also each
        # worker's part of them.
        held: dict[str, Held] = {}
        for name, (shape, _) in workers[0]["held"].items():
            parts = {}
            if self.owner:
                for i, worker in enumerate(workers):
                    _, axes = worker["held"][name]
                    parts[self._numbered(i)] = tuple(slice(*ends) for ends in axes)
            held[name] = Held(tuple(shape), parts)
        self._held = held

    def _numbered(self, worker: int) -> int:
        """Returns a worker's number; workers are counted through all servers."""
        return self.number * self._config.rollout.tp + worker

    def _send(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Sends the weights to the server, bucket by bucket.

        Raises:
            EngineFailed: the server or the link fails.
        """
        seconds = self._config.rollout.sync.timeout_seconds
        link = self._linked(seconds)

        for bucket in buckets(weights):
            slots = [[slot.name, slot.dtype, slot.shape, slot.start] for slot in bucket.slots]
            contents = {"num_bytes": len(bucket.flat), "slots": slots}
            try:
                self._beside("receive_bucket", contents, partial(link.send, bucket.flat), seconds)
            except EngineFailed:
                # A bucket that only some workers have received cannot be taken up again.
                link.abort()
                self._link = None
                raise

        self.server.call("pack_weights", timeout=seconds)
        # The last request of a sync: from it on the server answers requests for completions
        # (door.py), and nothing that it has cached is of the weights before.
        if not self.server.post("/reset_prefix_cache", timeout=_CALL_SECONDS)["success"]:
            raise EngineFailed(
                f"the vLLM server {self.server.url} did not reset its prefix cache: it still "
                "generates"
            )

    def _linked(self, seconds: float) -> Link:
        """Returns the link to the server's workers, made anew if one of them does not know it."""
        names = self.server.call("link_name", timeout=_CALL_SECONDS)
        if self._link is not None and all(name == [self._link_name] for name in names):
            return self._link

        if self._link is not None:
            self._link.close()
        # A new name each time: it tells whether a worker knows this link or an earlier one.
        self._link_name = secrets.token_hex(8)

        # On the one address that the server can reach, not on all of this machine.
        listener = listen(own_address(*self.server.address))
        # The workers, and this sender.
        size = len(names) + 1
        invitation = {
            "name": self._link_name,
            "address": listener.getsockname(),
            "size": size,
            "seconds": seconds,
        }

        secret = link_secret(self._key, self._link_name)
        host = partial(Link.host, listener, secret, size=size, device=device(), seconds=seconds)
        self._link = self._beside("join_link", invitation, host, seconds)
        return self._link

    def _beside(
        self, method: str, argument: Any, own_end: Callable[[], _Result], seconds: float
    ) -> _Result:
        """Calls a method of the workers, and does this side's end of it meanwhile.

        Returns:
            What `own_end` returns.

        Raises:
            EngineFailed: either end fails.
        """
        result: Future[_Result] = Future()

        def run() -> None:
            try:
                result.set_result(own_end())
            except Exception as error:
                result.set_exception(error)

        # In a thread that is left alone where the workers fail: it would wait for them in vain.
        Thread(target=run, daemon=True).start()
        # Returns when every worker is done; their end and ours wait for each other.
        self.server.call(method, argument, timeout=seconds)
        try:
            return result.result(seconds)
        except (TimeoutError, RuntimeError, OSError) as error:
            raise EngineFailed(
                f"the link to the vLLM server {self.server.url} failed: {error!r}"
            ) from error


class _UnsentRequests:
    """The requests that have not been sent to a server yet, for the threads that send them."""

    def __init__(self, rows: Iterator[int], num_samples: int) -> None:
        """Takes the prompts as `rows` gives them.

        Args:
            rows: indices of prompts; each is asked for when all samples of those before are sent.
            num_samples: requests for each of them.
        """
        self._rows = rows
        self._num_samples = num_samples
        self._begun: deque[tuple[int, int]] = deque()
        self._ended = False
        self._lock = Lock()

    def next(self) -> tuple[int, int] | None:
        """Returns the index of a prompt and the number of a sample; None: there are no more."""
        with self._lock:
            if not self._begun and not self._ended:
                i = next(self._rows, None)
                if i is None:
                    self._ended = True
                else:
                    self._begun.extend((i, k) for k in range(self._num_samples))
            return self._begun.popleft() if self._begun else None

    def end_unless(self, serves: Callable[[], bool]) -> None:
        """Leaves the prompts that are not begun to others, unless the server still serves."""
        # Within the lock: meanwhile no thread takes a prompt to a server that may be gone.
        with self._lock:
            if not self._ended:
                self._ended = not serves()

    def end(self) -> None:
        """Gives out no more requests."""
        with self._lock:
            self._ended = True
            self._begun.clear()


def _all_or_none(action: Callable[[], _Result]) -> _Result:
    """Returns what `action` returns on this rank. Collective over all ranks.

    Raises:
        EngineFailed: `action` raised it on some rank; on every rank alike.
    """
    return all_well(action, group=dist.group.WORLD, expected=EngineFailed, raises=EngineFailed)
