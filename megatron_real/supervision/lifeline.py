"""One rank's end is every rank's end, in seconds and with its cause.

Without this, the other ranks would wait in a collective for 30 minutes. Every rank keeps a socket
to the first rank open. A process that dies, however it dies, closes it: the first rank then tells
all others who was first, and all of them write that sentence and end. Over the same socket both
sides give a sign of life every few seconds, and each judges the other's silence: a machine that
vanished, a cut cable or a frozen process is seen from both of its ends. Ranks also say which stage
they are in, since when and at which line, so that a rank that hangs (its process alive, its stage
never over) is found and named.

Ranks prove to each other that they know a secret, which the first rank makes and shares
(challenge.py): whoever else connects costs nothing and learns nothing.

nvidia-resiliency-ext offers this as `ft_launcher` with a monitor process beside each rank. It
replaces torchrun and srun as the launcher and knows one timeout for each section of code; a socket
serves under any launcher, needs no package, and sees a death at once. So it is not used.
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
from megatron_real.supervision.places import Place, place_of

EXIT_CODE = 1
"""Exit code of a rank that another one's end took down."""
_JOIN_SECONDS = 120.0
"""Within this time all ranks have joined: they come from a collective, so they come together."""
_LEAVE_SECONDS = 30.0
"""How long a rank that ends by an error which every rank should have waits for the others to end by
it too."""
_LAST_WORD_SECONDS = 5.0
"""How long the last word of a rank that ends waits for a full socket, at most."""
_MOST_NAMED = 8
"""Ranks that one sentence names."""
_PURPOSE = "lifeline"
_OTHERS_FIRST_SECONDS = 1.0
"""How long a rank that fails waits for the word that another one has ended. That one's sockets
close at once, so the error of a collective may reach this rank's main thread before its lifeline's
thread has read the cause."""
_PARTING_SECONDS = 1.0
"""How long a rank that ends waits for the others to read its last word, at most."""

Stage = Callable[[], tuple[int, str, float]]
"""(stages begun, name of the present one or "", seconds in it)."""


@dataclass(frozen=True)
class Report:
    """Where a rank is, by its own report."""

    rank: str
    """The rank and its machine: "rank 3 on n1"."""
    begun: int = 0
    """Stages begun."""
    stage: str = ""
    """The present one; "" between two stages."""
    seconds: float = 0.0
    """Time in that stage."""
    place: Place = field(default_factory=Place)
    """Where its main thread stands."""

    @property
    def order(self) -> tuple[int, bool]:
        """How far it has come: after a stage is further than in it."""
        return self.begun, not self.stage


def hanging(reports: Sequence[Report], limit: float) -> str:
    """Returns the sentence that names the rank which keeps the others waiting.

    Args:
        reports: of all ranks that run. They are of one kind, each rank's own from its last sign of
            life: a fresh one of the judge's beside older ones of the others would always make the
            judge look slowest.
        limit: seconds in one stage.

    Returns:
        "" while nobody has waited for `limit` seconds.
    """
    waiting = [report for report in reports if report.stage and report.seconds > limit]
    if not waiting:
        return ""
    longest = max(report.seconds for report in waiting)

    furthest_behind = min(report.order for report in reports)
    behind = [report for report in reports if report.order == furthest_behind]
    if any(report.stage and report.seconds <= limit for report in behind):
        # They have come late, and have their own time.
        return ""

    # Who waits in a collective waits for somebody else, as long as there is somebody else.
    culprits = [report for report in behind if not report.place.waits] or behind
    if len(culprits) == 1:
        (culprit,) = culprits
        where = f"after its stage {culprit.begun}"
        if culprit.stage:
            where = f"in stage {culprit.stage}"
        return (
            f"{culprit.rank} hangs: it has been {where} for {longest:.0f} s, "
            f"the others wait for it; it is at {culprit.place}"
        )

    named = [f"{report.rank} at {report.place}" for report in culprits[:_MOST_NAMED]]
    if len(culprits) > _MOST_NAMED:
        named.append(f"and {len(culprits) - _MOST_NAMED} more")
    return (
        f"the run hangs: for {longest:.0f} s nobody has come out of stage {waiting[0].stage}, and "
        f"who keeps the others waiting cannot be told: {'; '.join(named)}"
    )


class Lifeline:
    """This rank's end of the connections; see the module. A run of one process has none.

    Example:
        lifeline = Lifeline(rank, world, share=broadcast, stage=progress.at, hang_seconds=1800)
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
            rank: this rank's number.
            world: ranks of the run.
            share: collective; gives what the first rank passes in, its address and the secret, to
                every rank.
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
        self._peers: dict[socket.socket, _Peer] = {}
        if world == 1:
            return

        if rank == 0:
            self._peers = self._accept(share)
        else:
            # The other ranks know the first one only.
            host, port, secret, name = share(None)
            connection = challenge.connect((host, port), secret, purpose=_PURPOSE, seconds=60.0)
            line = _Line(connection)
            line.send({"rank": rank, "host": socket.gethostname()}, seconds=_LAST_WORD_SECONDS)
            self._peers = {connection: _Peer(line, Report(name))}
        threading.Thread(target=self._guarded, name="lifeline", daemon=True).start()

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

        Args:
            cause: "" for a good end; else a cause that every rank should have: one that does not
                end by it within 30 s is ended with it.
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

        The kernel resets the connections of a process that ends with unread words, and on a busy
        machine the reset may overtake the last word: the others would hear of an end without a
        cause.
        """
        waiting = [peer.line for peer in self._peers.values()]
        for line in waiting:
            line.say_no_more()
        ends = time.monotonic() + _PARTING_SECONDS
        while waiting and time.monotonic() < ends:
            waiting = [line for line in waiting if line.is_open_after_drain()]
            time.sleep(0.01)

    def _accept(self, share: Callable[[Any], Any]) -> dict[socket.socket, _Peer]:
        """Lets the others in, on the first rank."""
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        listener = _listener(host, self.world)
        secret = challenge.new_secret()

        peers: dict[int, _Peer] = {}
        ends = time.monotonic() + _JOIN_SECONDS
        with challenge.Door(listener, secret, purpose=_PURPOSE) as door:
            share((host, listener.getsockname()[1], secret, self._name))
            while len(peers) < self.world - 1:
                line = _Line(door.next(ends - time.monotonic()))
                hello = line.first_word(challenge.HANDSHAKE_SECONDS)
                rank = hello.get("rank")
                if not isinstance(rank, int) or not 0 < rank < self.world or rank in peers:
                    # It knows the secret, but is no rank that is missing.
                    line.close()
                    continue
                peers[rank] = _Peer(line, Report(f"rank {rank} on {hello.get('host', '?')}"))
        return {peer.line.socket: peer for peer in peers.values()}

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
                    begun, stage, seconds = self.stage()
                    place = place_of(self._main)
                    self._report = Report(self._name, begun, stage, seconds, place)
                    for peer in self._peers.values():
                        peer.line.send({"at": (begun, stage, seconds, place.where, place.waits)})
                self._judge(now)

    def _hear(self, peer: _Peer) -> bool:
        """Takes in the words of another rank; returns False when no more will come."""
        words = peer.line.words()
        for word in words or ():
            if "end" in word:
                self._end_all(f"{peer.report.rank} ended first: {word['end']}")
            elif "first" in word:
                # The first rank has judged, and tells everybody itself.
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

    def _judge(self, now: float) -> None:
        """Ends every rank where another one is silent, hangs, or has left this one behind."""
        for peer in self._peers.values():
            silent = now - peer.heard
            if peer.left is None and silent > self._silent:
                self._end_all(f"{peer.report.rank} has given no sign of life for {silent:.0f} s")
            late = peer.left is not None and time.monotonic() - peer.left > _LEAVE_SECONDS
            if late and peer.cause:
                self._end_all(f"{peer.report.rank} ended first: {peer.cause}")

        # The first rank alone has the reports of all.
        if self.rank == 0:
            reports = [peer.report for peer in self._peers.values() if peer.left is None]
            if sentence := hanging([self._report, *reports], self._hang):
                self._end_all(sentence)

    def _end_all(self, sentence: str) -> None:
        """Ends every rank: the first one tells all others, another one tells the first."""
        if self._closed.is_set():
            return

        word = {"first": sentence} if self.rank == 0 else {"end": sentence}
        # All sockets together take no longer than one, however many of them are full.
        for peer in list(self._peers.values()):
            peer.line.send(word, seconds=_LAST_WORD_SECONDS / max(len(self._peers), 1))
        self._end(sentence, part=True)

    def _end(self, sentence: str, *, part: bool = False) -> None:
        """Ends this process at once: its main thread may be in a collective that never returns.

        Args:
            sentence: why.
            part: the others have just been sent it, and must have read it before the connections
                go.
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
    """What this rank knows of another one."""

    line: _Line
    report: Report
    """Its last report."""
    heard: float = 0.0
    """When it gave its last sign of life, on this process's `_Clock`."""
    left: float | None = None
    """When the word came that it ends, on time.monotonic(); None while it has not come."""
    cause: str = ""
    """Why it ends; "" for a good end."""


def _listener(host: str, world: int) -> socket.socket:
    """Listens on the address that the others are given if it is one of this machine, else on all.

    A name is no such address: on many machines the own name means 127.0.1.1 to themselves, and to
    them alone.
    """
    with suppress(ValueError, OSError):
        ipaddress.IPv4Address(host)
        return socket.create_server((host, 0), backlog=max(world, 128))
    return socket.create_server(("", 0), backlog=max(world, 128))
