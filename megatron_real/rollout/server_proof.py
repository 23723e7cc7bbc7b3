"""How a request to a server, and its answer, prove that they come from one who knows the key, which is never sent.

    request     Authorization: Proof NUMBER DIGEST PROOF     of the key, the number, verb, path and the body's digest
    answer      X-Proof: PROOF                               of the key, the number, the status and the body

Whoever listens on the server's port, before it or after it, learns nothing from a request that it could use, and cannot
answer as the server would. Standard library only.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from megatron_real.challenge import proof

SCHEME = "Proof"
ANSWER = "X-Proof"


@dataclass(frozen=True)
class Claim:
    """What the header of a request claims."""

    number: str
    """Made for this one request."""
    digest: str
    """SHA-256 of the body."""
    proof: str
    """That the sender knows the key."""

    @classmethod
    def of(cls, key: str, number: str, verb: str, path: str, body: bytes) -> Claim:
        """The claim of one who knows the key."""
        digest = hashlib.sha256(body).hexdigest()
        return cls(number, digest, _proof(key, "request", number, verb, path, digest))

    @classmethod
    def parse(cls, header: str) -> Claim | None:
        """The claim in an Authorization header; None where there is none."""
        scheme, *words = header.split(" ")
        return cls(*words) if scheme == SCHEME and len(words) == 3 else None

    @property
    def header(self) -> str:
        """What `parse` reads."""
        return f"{SCHEME} {self.number} {self.digest} {self.proof}"

    def is_right(self, key: str, verb: str, path: str) -> bool:
        """Whether the sender knows the key. The body has yet to be compared with `digest`."""
        expected = _proof(key, "request", self.number, verb, path, self.digest)
        return hmac.compare_digest(self.proof.encode(), expected.encode())

    def covers(self, body: bytes) -> bool:
        """Whether the body is the one that the claim was made for."""
        return hmac.compare_digest(self.digest.encode(), hashlib.sha256(body).hexdigest().encode())


def answer_proof(key: str, number: str, status: int, body: bytes) -> str:
    """That the answer to a request comes from one who knows the key."""
    return _proof(key, "answer", number, str(status), hashlib.sha256(body).hexdigest())


def _proof(key: str, *words: str) -> str:
    return proof(key, *(word.encode() for word in words)).hex()
