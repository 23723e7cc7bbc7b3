"""One rank's end is every rank's end, in seconds and with its cause.

Without this, the other ranks would wait in a collective for 30 minutes. Every rank keeps a few
sockets open, which make a tree of all ranks:

                                rank 0
                  /        /               \            8 more nodes at most,
            rank 1 .. rank 7             rank 8          and 8 ranks of its own node
                                        /      \
                             rank 9 .. rank 15  ...

A process that dies, however it dies, closes its sockets: each of its neighbours then says who was
first to theirs, which say it to theirs, and all write that sentence and end. A tree without one
rank falls apart, and each of its parts has a neighbour of that rank in it. Over the same sockets
both sides give a sign of life every few seconds, and each judges the other's silence: a machine
that vanished, a cut cable or a frozen process is seen from every part. Ranks also say which stage
they are in, since when and at which line, each with what it has heard from below (hanging.py), so
that a rank that hangs (its process alive, its stage never over) is found and named by the first.

Ranks prove to each other that they know a secret, which the first rank makes and shares
(challenge.py): whoever else connects costs nothing and learns nothing.

nvidia-resiliency-ext offers this as `ft_launcher` with a monitor process beside each rank. It
replaces torchrun and srun as the launcher and knows one timeout for each section of code; a socket
serves under any launcher, needs no package, and sees a death at once. So it is not used.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import selectors
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from megatron_real import challenge
from megatron_real.supervision.hanging import Report, Standing, hanging, merged
from megatron_real.supervision.places import place_of

EXIT_CODE = 1
"""Exit code of a rank that another one's end took down."""
FAN_OUT = 8
"""Most children of a rank on its own machine, and of a machine's first rank on other machines."""
MOST_SOCKETS = 1 + 2 * FAN_OUT
"""Connections of one rank at most, whatever the number of ranks."""
_JOIN_SECONDS = 120.0
"""Within this time all ranks have joined: they come from a collective, so they come together."""
_LEAVE_SECONDS = 30.0
"""How long a rank that ends by an error which every rank should have waits for the others to end by
it too."""
_LAST_WORD_SECONDS = 5.0
"""How long the last word of a rank that ends waits for a full socket, at most."""
_PURPOSE = "lifeline"
_OTHERS_FIRST_SECONDS = 1.0
"""How long a rank that fails waits for the word that another one has ended. That one's sockets
close at once, so the error of a collective may reach this rank's main thread before its lifeline's
thread has read the cause."""
_PARTING_SECONDS = 1.0
"""How long a rank that ends waits for the others to read its last word, at most."""

Stage = Callable[[], tuple[int, str, float]]
"""(stages begun, name of the present one or "", seconds in it)."""


def tree(hosts: Sequence[str]) -> list[int]:
    """Returns [ranks] the parent of each rank in the tree, -1 for the first rank.

    The ranks of a machine are a tree below its first one, and the first ranks of the machines are a
    tree too: connections between machines are between first ranks alone. A rank has `MOST_SOCKETS`
    connections at most, and is log(W) / log(`FAN_OUT`) + 2 of them away from the first, at most.

    Args:
        hosts: [ranks] the machine of each.
    """
    ranks_of: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks_of.setdefault(host, []).append(rank)

    parents = [-1] * len(hosts)
    firsts = [ranks[0] for ranks in ranks_of.values()]
    for together in (firsts, *ranks_of.values()):
        for i, rank in enumerate(together[1:]):
            # The next FAN_OUT ranks are below the first, the FAN_OUT after those below the second.
            parents[rank] = together[i // FAN_OUT]
    return parents


class Lifeline:
    """This rank's end of the connections; see the module. A run of one process has none.

    Example:
        lifeline = Lifeline(rank, world, gathered=gather, stage=progress.at, hang_seconds=1800)
        ...
        lifeline.say_end("ValueError: ...")  # or lifeline.close() at a good end
    """

    def __init__(
        self,
        rank: int,
        world: int,
        *,
        gathered: Callable[[Any], list[Any]],
        stage: Stage = lambda: (0, "", 0.0),
        beat_seconds: float = 5.0,
        silent_seconds: float = 120.0,
        hang_seconds: float = 1800.0,
    ) -> None:
        """Connects all ranks.

        Args:
            rank: this rank's number.
            world: ranks of the run.
            gathered: collective; gives every rank [ranks] what each of them passes in: its machine,
                its address, and the secret of the first. It is called twice.
            stage: where this rank is; may be replaced later.
            beat_seconds: between two signs of life.
            silent_seconds: a rank without one for so long is lost. Generous: a call may keep Python
                from running.
            hang_seconds: a rank that stays in one stage for so long hangs.

        Raises:
            OSError: the ranks do not reach each other.
        """
        self.rank = rank
        self.world = world
        self.stage = stage
        """Where this rank is."""
        self.before_end: Callable[[str], None] = lambda sentence: None
        """Called with the reason before another rank's end ends this one, to leave a last word on
        disk."""
        self._beat = beat_seconds
        self._silent = silent_seconds
        self._hang = hang_seconds
        self._name = f"rank {rank} on {socket.gethostname()}"
        self._report = Report(self._name)
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._above: _Peer | None = None
        self._below: list[_Peer] = []
        if world == 1:
            return

        self._join(gathered)
        # A daemon: it watches to the very end, and must not be what keeps the interpreter alive.
        threading.Thread(target=self._guarded, name="lifeline", daemon=True).start()

    @property
    def num_sockets(self) -> int:
        """The connections of this rank."""
        return len(self._peers)

    @property
    def _peers(self) -> list[_Peer]:
        """The ranks to which this one is connected."""
        if self._above is None:
            return self._below
        return [self._above, *self._below]

    def say_end(self, cause: str) -> None:
        """Tells the others that this rank fails, and why, so that they end. Returns on this rank.

        Where another rank has ended just before, that is the cause: this process then ends by its
        name.
        """
        if self.world > 1:
            self._closed.wait(_OTHERS_FIRST_SECONDS)
        self._last_word({"end": cause})

    def close(self, cause: str = "") -> None:
        """Tells the others that this rank ends, which takes nobody down.

        Without a cause it waits until the ranks below have ended too, 30 s at most: their way to
        the others leads over this one.

        Args:
            cause: "" for a good end; else a cause that every rank should have: one that does not
                end by it within 30 s is ended with it.
        """
        ends = time.monotonic() + _LEAVE_SECONDS
        while not cause and time.monotonic() < ends and not self._closed.is_set():
            if all(peer.left is not None for peer in self._below):
                break
            time.sleep(0.01)
        self._last_word({"leaving": cause})

    def _last_word(self, word: dict[str, Any]) -> None:
        if self.world == 1 or self._closed.is_set():
            return
        self._closed.set()
        for peer in self._peers:
            peer.line.send(word, seconds=_LAST_WORD_SECONDS)
        self._part()

    def _part(self) -> None:
        """Waits, at most a second, until the others have closed their ends too.

        The kernel resets the connections of a process that ends with unread words, and on a busy
        machine the reset may overtake the last word: the others would hear of an end without a
        cause.
        """
        waiting = [peer.line for peer in self._peers]
        for line in waiting:
            line.say_no_more()
        ends = time.monotonic() + _PARTING_SECONDS
        while waiting and time.monotonic() < ends:
            waiting = [line for line in waiting if line.is_open_after_drain()]
            time.sleep(0.01)

    def _join(self, gathered: Callable[[Any], list[Any]]) -> None:
        """Connects this rank with the one above it and those below it. Collective."""
        secret = challenge.new_secret() if self.rank == 0 else ""
        # A first round brings the machines, by which every rank knows the tree, and the secret.
        hosts, secrets = zip(*gathered((socket.gethostname(), secret)), strict=True)
        # The first rank's: the others have made none.
        secret = secrets[0]
        parents = tree(hosts)
        names = [f"rank {rank} on {host}" for rank, host in enumerate(hosts)]
        missing = {rank for rank in range(self.world) if parents[rank] == self.rank}

        address: tuple[str, int] | None = None
        problem = ""
        door: challenge.Doorkeeper | None = None
        if missing:
            try:
                listener, host = _listener(self.rank, backlog=len(missing))
                address = (host, listener.getsockname()[1])
                door = challenge.Doorkeeper(listener, secret, purpose=_PURPOSE)
            except OSError as error:
                # Every rank is told: the others would wait for this one.
                problem = f"{self._name} cannot listen for the ranks below it: {error}"
        # A second round says where parents listen, or why one of them cannot.
        addresses, problems = zip(*gathered((address, problem)), strict=True)
        if any(problems):
            raise OSError(next(problem for problem in problems if problem))

        # Up first, then down. No two ranks wait for each other: every listener was there before its
        # address was gathered.
        with door or nullcontext():
            parent = parents[self.rank]
            if parent >= 0:
                address = addresses[parent]
                connection = challenge.connect(
                    address, secret, purpose=_PURPOSE, seconds=_JOIN_SECONDS
                )
                line = _Line(connection)
                # The one above knows now that a rank of the run has come, but not which.
                line.send({"rank": self.rank}, seconds=_LAST_WORD_SECONDS)
                self._above = _Peer(line, names[parent])
            if door is not None:
                self._below = [_Peer(line, names[rank]) for rank, line in _let_in(door, missing)]

    def _guarded(self) -> None:
        """Runs the thread. Should it fail, the run must not go on unwatched."""
        try:
            self._watch()
        except Exception:
            # Of whatever kind it is, it is a fault of this module.
            if not self._closed.is_set():
                self._end_all(f"the lifeline of {self._name} failed: {traceback.format_exc()}")

    def _watch(self) -> None:
        """Hears the others, judges those it does not hear, and gives signs of life."""
        # A pause of this process counts for a quarter of the silence that ends a run, at most.
        clock = _Clock(most=max(self._silent / 4, 1.0))
        for peer in self._peers:
            peer.heard = clock.now()
        next_beat = 0.0
        with selectors.DefaultSelector() as ready:
            for peer in self._peers:
                ready.register(peer.line.socket, selectors.EVENT_READ, peer)

            while not self._closed.is_set():
                # A second at most: it is also how late the end of this rank is seen here.
                events = ready.select(min(self._beat, 1.0))
                now = clock.now()
                for key, _ in events:
                    key.data.heard = now
                    if not self._hear(key.data):
                        # A closed socket is readable for ever.
                        ready.unregister(key.fileobj)

                if now >= next_beat:
                    next_beat = now + self._beat
                    self._give_sign_of_life()
                self._judge(now)

    def _give_sign_of_life(self) -> None:
        """Tells the ranks beside where this one is, and the one above where those below are."""
        begun, stage, seconds = self.stage()
        place = place_of(self._main)
        self._report = Report(self._name, begun, stage, seconds, place)
        for peer in self._below:
            peer.line.send({"stage": stage})
        if self._above is not None:
            standing = dataclasses.asdict(self._standing())
            self._above.line.send({"stage": stage, "standing": standing})

    def _standing(self) -> Standing:
        """Returns where this rank and those below it are that have not left."""
        below = [peer.standing for peer in self._below if peer.left is None]
        known = [standing for standing in below if standing is not None]
        return merged([Standing.of(self._report), *known])

    def _hear(self, peer: _Peer) -> bool:
        """Takes in the words of another rank; returns False when no more will come."""
        words = peer.line.words()
        for word in words or ():
            if "end" in word:
                self._end_all(f"{peer.name} ended first: {word['end']}", heard_from=peer)
            elif "first" in word:
                # Another one has judged; it goes on to the rest of the tree.
                self._end_all(word["first"], heard_from=peer)
            elif "leaving" in word:
                peer.left = time.monotonic()
                peer.cause = word["leaving"]
            elif "stage" in word:
                peer.stage = word["stage"]
                if "standing" in word:
                    peer.standing = Standing(**word["standing"])

        if words is None and peer.left is None:
            stage = ""
            if peer.stage:
                stage = f" in stage {peer.stage}"
            self._end_all(f"{peer.name} ended without a word (killed, or out of memory?){stage}")

        return words is not None

    def _judge(self, now: float) -> None:
        """Ends every rank where another one is silent, hangs, or has left this one behind."""
        for peer in self._peers:
            silent = now - peer.heard
            if peer.left is None and silent > self._silent:
                self._end_all(f"{peer.name} has given no sign of life for {silent:.0f} s")
            # It ends by an error that this rank should have, too, and this one goes on.
            late = peer.left is not None and time.monotonic() - peer.left > _LEAVE_SECONDS
            if late and peer.cause:
                self._end_all(f"{peer.name} ended first: {peer.cause}")

        # All others are below the first rank, and one judge is enough.
        if self.rank == 0 and (sentence := hanging(self._standing(), self._hang)):
            self._end_all(sentence)

    def _end_all(self, sentence: str, *, heard_from: _Peer | None = None) -> None:
        """Ends this rank, and tells those beside it, which tell those beside them.

        Args:
            sentence: why.
            heard_from: the rank that has said so, which needs not be told.
        """
        if self._closed.is_set():
            return

        # All sockets together take no longer than one, however many of them are full.
        for peer in self._peers:
            if peer is not heard_from:
                seconds = _LAST_WORD_SECONDS / len(self._peers)
                peer.line.send({"first": sentence}, seconds=seconds)
        self._end(sentence)

    def _end(self, sentence: str) -> None:
        """Ends this process at once: its main thread may be in a collective that never returns."""
        if self._closed.is_set():
            return

        self._closed.set()
        os.write(2, f"megatron-real: {sentence}; ending this rank too\n".encode())
        # In a thread: a file system that hangs must not keep this process alive.
        word = threading.Thread(target=self.before_end, args=(sentence,), daemon=True)
        word.start()
        # The others must have read the sentence before the connections go.
        self._part()
        word.join(_LAST_WORD_SECONDS)
        # sys.exit would end this thread alone, and atexit handlers wait for a main thread that may
        # be in a collective.
        os._exit(EXIT_CODE)


class _Clock:
    """Seconds in which this process ran.

    A process that was stopped, with its whole job perhaps (Slurm's suspend, a debugger), heard
    nobody meanwhile: their silence says nothing.
    """

    def __init__(self, *, most: float) -> None:
        """
        Args:
            most: the longest time between two looks that counts.
        """
        self._most = most
        self._seconds = 0.0
        self._last = time.monotonic()

    def now(self) -> float:
        """Returns the seconds so far. What passed since the last look counts up to `most`."""
        last = self._last
        self._last = time.monotonic()
        self._seconds += min(self._last - last, self._most)
        return self._seconds


class _Line:
    """A socket of words, one JSON object a line, that never blocks for longer than is asked."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.setblocking(False)
        self._incoming = b""
        self._outgoing = b""
        # The main thread has last words, the lifeline's thread all others.
        self._sending = threading.Lock()

    def send(self, word: dict[str, Any], *, seconds: float = 0.0) -> None:
        """Sends a word as far as the socket takes it in `seconds`; the rest goes with the next one.

        A socket that takes nothing is that of a process that does not run. Its silence is judged
        elsewhere.
        """
        ends = time.monotonic() + seconds
        # The other side may be gone: reading says so.
        with self._sending, suppress(OSError):
            self._outgoing += json.dumps(word).encode() + b"\n"
            while self._outgoing:
                try:
                    sent = self.socket.send(self._outgoing)
                    self._outgoing = self._outgoing[sent:]
                except BlockingIOError:
                    if time.monotonic() >= ends:
                        return
                    time.sleep(0.01)

    def words(self) -> list[dict[str, Any]] | None:
        """Returns the words that have come; None when nothing will come any more."""
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None

        # The last one may be cut: the rest of it comes with the next bytes.
        *lines, self._incoming = (self._incoming + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def first_word(self, seconds: float) -> dict[str, Any]:
        """Returns the first word; {} where none comes in `seconds`.

        What follows it stays in the socket: by the time its first word is read, a rank may have
        sent its last one too.
        """
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            try:
                seen = self.socket.recv(65536, socket.MSG_PEEK)
            except BlockingIOError:
                time.sleep(0.01)
                continue
            except OSError:
                return {}
            if not seen:
                return {}

            line, newline, _ = seen.partition(b"\n")
            if newline:
                self.socket.recv(len(line) + 1)
                word: dict[str, Any] = json.loads(line)
                return word

            # The rest of it is on its way.
            time.sleep(0.01)

        return {}

    def say_no_more(self) -> None:
        """Closes this end for sending: the other one reads what was sent, then the end."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def is_open_after_drain(self) -> bool:
        """Throws away what has come; returns False when nothing will come any more."""
        try:
            # recv() returns nothing once the other side has closed its end.
            while self.socket.recv(65536):
                pass
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        """Closes the socket."""
        self.socket.close()


@dataclass
class _Peer:
    """What this rank knows of one to which it is connected."""

    line: _Line
    name: str
    """The rank and its machine: "rank 3 on n1"."""
    stage: str = ""
    """Its stage by its last sign of life; "" between two stages."""
    standing: Standing | None = None
    """Of a rank below: where it and those below it are, by its last sign of life."""
    heard: float = 0.0
    """When it gave its last sign of life, on this process's `_Clock`."""
    left: float | None = None
    """When the word came that it ends, on time.monotonic(); None while it has not come."""
    cause: str = ""
    """Why it ends; "" for a good end."""


def _let_in(door: challenge.Doorkeeper, missing: set[int]) -> Iterator[tuple[int, _Line]]:
    """Yields each missing rank with its connection, as they come.

    Raises:
        TimeoutError: one of them has not come.
    """
    ends = time.monotonic() + _JOIN_SECONDS
    left = set(missing)
    while left:
        line = _Line(door.next(ends - time.monotonic()))
        rank = line.first_word(ends - time.monotonic()).get("rank")
        if rank not in left:
            # It knows the secret, but is no rank that is missing.
            line.close()
            continue
        left.discard(rank)
        yield rank, line


def _listener(rank: int, *, backlog: int) -> tuple[socket.socket, str]:
    """Returns a listener for the ranks below, and the host under which they reach it.

    The first rank is reached under MASTER_ADDR, another one under the address of the interface that
    leads there. It listens on that address alone if it is one of this machine, else on all. A name
    is no such address: on many machines the own name means 127.0.1.1 to themselves, and to them
    alone.
    """
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if rank > 0:
        host = challenge.own_address(host, 1)
    with suppress(ValueError, OSError):
        ipaddress.IPv4Address(host)
        return socket.create_server((host, 0), backlog=max(backlog, 128)), host
    return socket.create_server(("", 0), backlog=max(backlog, 128)), host
