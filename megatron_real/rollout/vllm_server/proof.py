"""How a request to a server and its answer prove that their senders know the key.

The key itself is never sent.

    request     Authorization: Proof NUMBER DIGEST PROOF
                PROOF is computed from the key, the number, verb, path and the body's digest
    answer      X-Proof: PROOF
                PROOF is computed from the key, the number, the status and the body

Another process that listens on the server's port, before or after the server, learns nothing from a
request that it could use, and cannot answer in the server's place. Standard library only.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from megatron_real.challenge import proof

SCHEME = "Proof"
ANSWER = "X-Proof"


@dataclass(frozen=True)
class KeyClaim:
    """The claim in a request's header that its sender knows the key."""

    number: str
    """A random number, made for this one request."""
    digest: str
    """SHA-256 of the body."""
    proof: str
    """Proof that the sender knows the key."""

    @classmethod
    def of(cls, key: str, number: str, verb: str, path: str, body: bytes) -> KeyClaim:
        """Makes the claim for a request, with the key."""
        digest = hashlib.sha256(body).hexdigest()
        return cls(number, digest, _proof(key, "request", number, verb, path, digest))

    @classmethod
    def parse(cls, header: str) -> KeyClaim | None:
        """Reads the claim in an Authorization header; None where there is none."""
        scheme, *fields = header.split(" ")
        if scheme != SCHEME or len(fields) != 3:
            return None
        return cls(*fields)

    @property
    def header(self) -> str:
        """The claim as `parse` reads it."""
        return f"{SCHEME} {self.number} {self.digest} {self.proof}"

    def is_right(self, key: str, verb: str, path: str) -> bool:
        """Tells whether the sender knows the key; the body has yet to be checked by `covers`."""
        expected = _proof(key, "request", self.number, verb, path, self.digest)
        # As bytes: compare_digest refuses a text beyond ASCII, and anybody may send one.
        return hmac.compare_digest(self.proof.encode(), expected.encode())

    def covers(self, body: bytes) -> bool:
        """Tells whether the body is the one that the claim was made for."""
        digest = hashlib.sha256(body).hexdigest()
        return hmac.compare_digest(self.digest.encode(), digest.encode())


def answer_proof(key: str, number: str, status: int, body: bytes) -> str:
    """Returns the proof that the answer to a request comes from one who knows the key."""
    digest = hashlib.sha256(body).hexdigest()
    return _proof(key, "answer", number, str(status), digest)


def _proof(key: str, *fields: str) -> str:
    # `request` or `answer` comes first, so that neither proof can be used as the other.
    return proof(key, *(field.encode() for field in fields)).hex()
