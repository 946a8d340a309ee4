"""The three families of things that go wrong between peers.

``LocalError``  our own code used an API wrongly or a local resource is missing: fix the caller.
``RemoteError`` the peer broke a protocol, sent nonsense, or went away: drop it, keep serving.
``Refused``     the peer understood and said no: a code for programs, a sentence for people, and
                sometimes when to ask again. Not a fault of either side.

Anything else that escapes from ``p2p`` is a bug.
"""

from __future__ import annotations


class P2PError(Exception):
    """Base of everything that ``p2p`` raises on purpose."""


class LocalError(P2PError):
    """Misuse on this side: bad argument, wrong order of calls, a limit of our own exceeded."""


class RemoteError(P2PError):
    """The peer violated a protocol; the connection or stream it came on is to be dropped."""


class PeerGone(RemoteError):  # noqa: N818, a word of the protocol
    """The connection or stream ended before the answer came (closed, reset, or silent too long)."""


class DialError(RemoteError):
    """No address of the peer could be reached, or another peer answered there."""


class UnsupportedProtocol(RemoteError):  # noqa: N818, a word of the protocol
    """The peer does not speak the protocol that was asked for."""


class Refused(P2PError):  # noqa: N818, a word of the protocol
    """A typed refusal. ``code`` is one of the words listed in ``docs/protocols.md``.

    Raised by a handler, it travels to the caller, where it is raised again.
    """

    def __init__(self, code: str, why: str, retry_after: float | None = None) -> None:
        super().__init__(f"{code}: {why}")
        self.code = code
        self.why = why
        self.retry_after = retry_after
        """Seconds after which asking again makes sense; None where it never does."""
