"""One rank's end is every rank's end, in seconds and with its cause, instead of a collective that waits for 30 minutes.

Every rank keeps a socket to the first rank open. A process that dies, however it dies, closes it: the first rank then
tells all others who was first, and all of them write that sentence and end. Over the same socket both sides give a sign
of life every few seconds, and each judges the other's silence: a machine that vanished, a cut cable or a frozen process
is seen from both of its ends. Ranks also say which stage they are in, since when and at which line, so that a rank that
hangs (its process alive, its stage never over) is found and named.

Ranks prove to each other that they know a secret, which the first rank makes and shares (challenge.py): whoever else
connects costs nothing and learns nothing.

nvidia-resiliency-ext offers this as `ft_launcher` with a monitor process beside each rank. It replaces torchrun and
srun as the launcher and knows one timeout for each section of code; a socket serves under any launcher, needs no
package, and sees a death at once. So it is not used.
"""

from __future__ import annotations

import ipaddress
import json
import os
import selectors
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from megatron_real import challenge
from megatron_real.runs.places import Place, place_of

EXIT_CODE = 1
"""Of a rank that another one's end took down."""
_JOIN_SECONDS = 120.0
"""All ranks have joined by then: they come from a collective, so they come together."""
_LEAVE_SECONDS = 30.0
"""A rank that ends by an error that every rank should have gives the others so long to end by it too."""
_LAST_WORD_SECONDS = 5.0
"""The last word of a rank that ends waits at most so long for a full socket."""
_MOST_NAMED = 8
_PURPOSE = "lifeline"
_OTHERS_FIRST_SECONDS = 1.0
"""A rank that fails waits so long for the word that another one has ended. That one's sockets close at once, so the error of
a collective may reach this rank's main thread before its lifeline's thread has read the cause."""
_PARTING_SECONDS = 1.0
"""A rank that ends waits at most so long for the others to read its last word."""

Stage = Callable[[], tuple[int, str, float]]
"""(stages begun, name of the present one or "", seconds in it)."""


@dataclass(frozen=True)
class Report:
    """Where a rank is, as it said itself."""

    rank: str
    """Who: "rank 3 on n1"."""
    begun: int = 0
    """Stages begun."""
    stage: str = ""
    """The present one; "" between two stages."""
    seconds: float = 0.0
    """In that stage."""
    place: Place = field(default_factory=Place)
    """Of its main thread."""

    @property
    def order(self) -> tuple[int, bool]:
        """How far it has come: after a stage is further than in it."""
        return self.begun, not self.stage


def hanging(reports: Sequence[Report], limit: float) -> str:
    """The sentence that names the rank which keeps the others waiting; "" while nobody has waited for `limit` seconds.

    All reports are of one kind, each rank's own from its last sign of life: a fresh one of the judge's beside older ones
    of the others would always make the judge look slowest.
    """
    waiting = [one for one in reports if one.stage and one.seconds > limit]
    if not waiting:
        return ""
    furthest_behind = min(one.order for one in reports)
    behind = [one for one in reports if one.order == furthest_behind]
    if any(one.stage and one.seconds <= limit for one in behind):
        return ""  # they have come late, and have their own time

    # Who waits in a collective waits for somebody else, as long as there is somebody else.
    culprits = [one for one in behind if not one.place.waits] or behind
    longest = max(one.seconds for one in waiting)
    if len(culprits) > 1:
        named = "; ".join(f"{one.rank} at {one.place}" for one in culprits[:_MOST_NAMED])
        more = f"; and {len(culprits) - _MOST_NAMED} more" if len(culprits) > _MOST_NAMED else ""
        return (
            f"the run hangs: for {longest:.0f} s nobody has come out of stage {waiting[0].stage}, and "
            f"who keeps the others waiting cannot be told: {named}{more}"
        )
    (one,) = culprits
    where = f"in stage {one.stage}" if one.stage else f"after its stage {one.begun}"
    return (
        f"{one.rank} hangs: it has been {where} for {longest:.0f} s, the others wait for it; it is at "
        f"{one.place}"
    )


class Lifeline:
    """This rank's end of it; see the module. A run of one process has none.

    Example:
        lifeline = Lifeline(rank, world, share=broadcast, stage=progress.at, beat_seconds=5, hang_seconds=1800)
        ...
        lifeline.say_end("ValueError: ...")  # or lifeline.close() at a good end
    """

    def __init__(
        self,
        rank: int,
        world: int,
        *,
        share: Callable[[Any], Any],
        stage: Stage = lambda: (0, "", 0.0),
        beat_seconds: float = 5.0,
        silent_seconds: float = 120.0,
        hang_seconds: float = 1800.0,
    ) -> None:
        """Connects all ranks.

        Args:
            share: collective; gives what the first rank passes in, its address and the secret, to every rank.
            stage: where this rank is; may be replaced later.
            beat_seconds: between two signs of life.
            silent_seconds: a rank without one for so long is lost. Generous: a call may keep Python from running.
            hang_seconds: a rank that stays in one stage for so long hangs.

        Raises:
            OSError: the ranks do not reach each other.
        """
        self.rank, self.world = rank, world
        self.stage = stage
        """Where this rank is."""
        self.before_end: Callable[[str], None] = lambda sentence: None
        """Told why another rank's end ends this one, before it does: to leave a last word on disk."""
        self._beat = beat_seconds
        self._silent = silent_seconds
        self._hang = hang_seconds
        self._name = f"rank {rank} on {socket.gethostname()}"
        self._report = Report(self._name)
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._peers: dict[socket.socket, _Peer] = {}
        if world == 1:
            return
        if rank == 0:
            self._peers = self._accept(share)
        else:
            self._peers = self._join(share(None))
        threading.Thread(target=self._guarded, name="lifeline", daemon=True).start()

    def say_end(self, cause: str) -> None:
        """This rank fails: the others learn the cause and end. Returns on the failing rank.

        Where another rank has ended just before, that is the cause: this process then ends by its name.
        """
        if self.world > 1:
            self._closed.wait(_OTHERS_FIRST_SECONDS)
        self._last_word({"end": cause})

    def close(self, cause: str = "") -> None:
        """This rank ends, and takes nobody down by it: the end is good, or every rank has the same cause.

        A rank that does not end within 30 s by a `cause` that all of them should have is ended with it.
        """
        self._last_word({"leaving": cause})

    def _last_word(self, word: dict[str, Any]) -> None:
        if self.world == 1 or self._closed.is_set():
            return
        self._closed.set()
        for peer in list(self._peers.values()):
            peer.line.send(word, seconds=_LAST_WORD_SECONDS)
        self._part()

    def _part(self) -> None:
        """Waits, at most a second, until the others have closed their ends too.

        The kernel resets the connections of a process that ends with unread words, and on a busy machine the reset may
        overtake the last word: the others would hear of an end without a cause.
        """
        waiting = [peer.line for peer in self._peers.values()]
        for line in waiting:
            line.say_no_more()
        ends = time.monotonic() + _PARTING_SECONDS
        while waiting and time.monotonic() < ends:
            waiting = [line for line in waiting if line.is_open_after_drain()]
            time.sleep(0.01)

    def _accept(self, share: Callable[[Any], Any]) -> dict[socket.socket, _Peer]:
        """The first rank lets the others in."""
        secret, listener = challenge.new_secret(), _listener(self.world)
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        peers: dict[int, _Peer] = {}
        ends = time.monotonic() + _JOIN_SECONDS
        with challenge.Door(listener, secret, purpose=_PURPOSE) as door:
            share((host, listener.getsockname()[1], secret, self._name))
            while len(peers) < self.world - 1:
                line = _Line(door.next(ends - time.monotonic()))
                hello = line.first_word(challenge.HANDSHAKE_SECONDS)
                rank = hello.get("rank")
                if not isinstance(rank, int) or not 0 < rank < self.world or rank in peers:
                    line.close()  # it knows the secret, but is no rank that is missing
                    continue
                peers[rank] = _Peer(line, Report(f"rank {rank} on {hello.get('host', '?')}"))
        return {peer.line.socket: peer for peer in peers.values()}

    def _join(self, shared: tuple[str, int, str, str]) -> dict[socket.socket, _Peer]:
        """The other ranks know the first one only."""
        host, port, secret, name = shared
        connection = challenge.connect((host, port), secret, purpose=_PURPOSE, seconds=60.0)
        line = _Line(connection)
        line.send({"rank": self.rank, "host": socket.gethostname()}, seconds=_LAST_WORD_SECONDS)
        return {connection: _Peer(line, Report(name))}

    def _guarded(self) -> None:
        """The thread. Should it fail, the run must not go on unwatched."""
        try:
            self._watch()
        except Exception:  # of whatever kind, it is a fault of this module
            if not self._closed.is_set():
                self._end_all(f"the lifeline of {self._name} failed: {traceback.format_exc()}")

    def _watch(self) -> None:
        """Hears the others, judges those it does not hear, and gives signs of life."""
        clock = _Clock(most=max(self._silent / 4, 1.0))
        for peer in self._peers.values():
            peer.heard = clock.now()
        next_beat = 0.0
        with selectors.DefaultSelector() as ready:
            for connection in self._peers:
                ready.register(connection, selectors.EVENT_READ)
            while not self._closed.is_set():
                events = ready.select(min(self._beat, 1.0))
                now = clock.now()
                for key, _ in events:
                    peer = self._peers[key.fileobj]  # type: ignore[index]
                    peer.heard = now
                    if not self._hear(peer):
                        ready.unregister(key.fileobj)
                if now >= next_beat:
                    next_beat = now + self._beat
                    self._give_sign_of_life()
                self._judge(now)

    def _hear(self, peer: _Peer) -> bool:
        """Takes in what another rank said; False when it will say no more."""
        words = peer.line.words()
        for word in words or ():
            if "end" in word:
                self._end_all(f"{peer.report.rank} ended first: {word['end']}")
            elif "first" in word:  # the first rank has judged
                self._end(word["first"])
            elif "leaving" in word:
                peer.left = time.monotonic()
                peer.cause = word["leaving"]
            elif "at" in word:
                begun, stage, seconds, where, waits = word["at"]
                peer.report = Report(peer.report.rank, begun, stage, seconds, Place(where, waits))
        if words is None and peer.left is None:
            stage = f" in stage {peer.report.stage}" if peer.report.stage else ""
            self._end_all(
                f"{peer.report.rank} ended without a word (killed, or out of memory?){stage}"
            )
        return words is not None

    def _give_sign_of_life(self) -> None:
        begun, stage, seconds = self.stage()
        self._report = Report(self._name, begun, stage, seconds, place_of(self._main))
        where, waits = self._report.place.where, self._report.place.waits
        for peer in self._peers.values():
            peer.line.send({"at": (begun, stage, seconds, where, waits)})

    def _judge(self, now: float) -> None:
        for peer in self._peers.values():
            if peer.left is None and now - peer.heard > self._silent:
                self._end_all(
                    f"{peer.report.rank} has given no sign of life for {now - peer.heard:.0f} s"
                )
            late = peer.left is not None and time.monotonic() - peer.left > _LEAVE_SECONDS
            if late and peer.cause:
                self._end_all(f"{peer.report.rank} ended first: {peer.cause}")
        if self.rank == 0:
            reports = [peer.report for peer in self._peers.values() if peer.left is None]
            if sentence := hanging([self._report, *reports], self._hang):
                self._end_all(sentence)

    def _end_all(self, sentence: str) -> None:
        """Ends every rank: the first one tells all others, another one tells the first."""
        if self._closed.is_set():
            return
        word = {"first": sentence} if self.rank == 0 else {"end": sentence}
        for peer in list(self._peers.values()):
            peer.line.send(word, seconds=_LAST_WORD_SECONDS / max(len(self._peers), 1))
        self._end(sentence, part=True)

    def _end(self, sentence: str, *, part: bool = False) -> None:
        """Ends this process at once: its main thread may be in a collective that never returns.

        `part`: the others have just been told, and must have read it before the connections go.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        os.write(2, f"megatron-real: {sentence}; ending this rank too\n".encode())
        # In a thread: a file system that hangs must not keep this process alive.
        word = threading.Thread(target=self.before_end, args=(sentence,), daemon=True)
        word.start()
        if part:
            self._part()
        word.join(_LAST_WORD_SECONDS)
        os._exit(EXIT_CODE)


class _Clock:
    """Seconds in which this process ran.

    A process that was stopped, with its whole job perhaps (Slurm's suspend, a debugger), heard nobody meanwhile: their
    silence says nothing.
    """

    def __init__(self, *, most: float) -> None:
        """`most`: the longest time between two looks that counts."""
        self._most = most
        self._seconds = 0.0
        self._last = time.monotonic()

    def now(self) -> float:
        last, self._last = self._last, time.monotonic()
        self._seconds += min(self._last - last, self._most)
        return self._seconds


class _Line:
    """A socket of words: one JSON object a line. It never blocks longer than it is told to."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.setblocking(False)
        self._incoming = b""
        self._outgoing = b""
        self._sending = threading.Lock()  # the main thread has last words, the other one the rest

    def send(self, word: dict[str, Any], *, seconds: float = 0.0) -> None:
        """Sends a word as far as the socket takes it in so many seconds; the rest goes with the next one.

        A socket that takes nothing is that of a process that does not run. Its silence is judged elsewhere.
        """
        ends = time.monotonic() + seconds
        with self._sending, suppress(OSError):  # it may be gone: reading says so
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
        """What has come; None when nothing will come any more."""
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._incoming = (self._incoming + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def first_word(self, seconds: float) -> dict[str, Any]:
        """The first word; {} where none comes in so many seconds. What follows it stays in the socket.

        A rank may have said how it ends by the time its first word is read.
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
            time.sleep(0.01)  # the rest of it is on its way
        return {}

    def say_no_more(self) -> None:
        """Closes this end for sending: the other one reads what was sent, then the end."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def is_open_after_drain(self) -> bool:
        """Throws away what has come; False when nothing will come any more."""
        try:
            while self.socket.recv(65536):
                pass
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        self.socket.close()


@dataclass
class _Peer:
    """What this rank knows of another one."""

    line: _Line
    report: Report
    """Its last one."""
    heard: float = 0.0
    """When it gave its last sign of life, on this process's `_Clock`."""
    left: float | None = None
    """When it said that it ends, on time.monotonic(); None while it has not."""
    cause: str = ""
    """Why it ends; "" for a good end."""


def _listener(world: int) -> socket.socket:
    """On the one address that the others are told, where that is an address of this machine; else on all.

    A name is no such address: on many machines the own name means 127.0.1.1 to themselves, and to them alone.
    """
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with suppress(ValueError, OSError):
        ipaddress.IPv4Address(host)
        return socket.create_server((host, 0), backlog=max(world, 128))
    return socket.create_server(("", 0), backlog=max(world, 128))
