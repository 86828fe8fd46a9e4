"""Errors of the product: each carries the facts of the moment and a stable code. The CLI alone maps them to exit codes."""

import errno
import os

from proto.errors import sentence


class PostcopyError(Exception):
    """``code`` is stable; ``what``, ``expected`` and ``got`` say what an operator needs to act."""

    code = "failed"

    def __init__(self, what: str, *, expected: object = "", got: object = "", code: str | None = None) -> None:
        self.what = what
        self.expected = str(expected)
        self.got = str(got)
        if code is not None:
            self.code = code
        super().__init__(sentence(what, self.expected, self.got))


class HostLacksError(PostcopyError):
    """This machine or this user lacks what is needed; ``remedy`` is the one thing to change."""

    code = "host-lacks"

    def __init__(self, feature: str, why: str, remedy: str) -> None:
        self.feature, self.why, self.remedy = feature, why, remedy
        super().__init__(f"{feature} is not available here: {why}; {remedy}")


class GuestRefusedError(PostcopyError):
    """A guest attached with something that cannot be migrated."""

    code = "guest-refused"


class NoRoomError(PostcopyError):
    """A guest that is offered cannot be backed here: what it needs, what there is at most, and what to change."""

    code = "no-room"


class GuestGoneError(PostcopyError):
    """The guest's socket ended, or its process did."""

    code = "guest-gone"


class GuestBusyError(PostcopyError):
    """The guest is already being migrated, or is still receiving its memory."""

    code = "guest-busy"


class PauseFailedError(PostcopyError):
    """The guest could not be stopped before the deadline; it runs on."""

    code = "pause-failed"


class NotFoundError(PostcopyError):
    code = "not-found"


class NotRecoverableError(PostcopyError):
    """Only a migration that is paused, its path lost, or has stalled can be made to dial again."""

    code = "not-recoverable"


class NotResolvableError(PostcopyError):
    """Only of a guest that is paused here, its migration paused or stalled, and may run elsewhere for all that is known, a person
    decides."""

    code = "not-resolvable"


class NotAbandonableError(PostcopyError):
    """Only a migration whose guest waits at this daemon for pages, and only where the kernel can poison, can be given up."""

    code = "not-abandonable"


class AbandonedError(PostcopyError):
    """The operator of the destination has given up what had not come; the guest runs on there without it."""

    code = "abandoned"


class NotCancellableError(PostcopyError):
    """The switchover has begun: the guest may run at the destination already."""

    code = "not-cancellable"


class NotLimitableError(PostcopyError):
    """It has settled, or bulk is sent by the other daemon."""

    code = "not-limitable"


class PeerRefusedError(PostcopyError):
    """The other daemon said no; the code is its own."""

    code = "peer-refused"


class DaemonEndingError(PostcopyError):
    """Without waiting for the guest (second SIGTERM). Nothing is wrong that the peer is to know: there will be another daemon."""

    code = "daemon-ended"


class CancelledByPeerError(PostcopyError):
    """The source cancelled before the switchover."""

    code = "cancelled"


class AbortedError(PeerRefusedError):
    """The destination has decided and recorded that it will never resume this epoch: the source may (P4)."""

    code = "aborted"


class ConnectionLostError(PostcopyError):
    code = "connection-lost"


class DeadlineError(PostcopyError):
    code = "deadline"


class DataPlaneError(PostcopyError):
    """A loop of the data plane ended by itself; the code is its reason."""

    code = "data-plane"


class DaemonUnreachableError(PostcopyError):
    code = "daemon-unreachable"


class ListenRefusedError(PostcopyError):
    code = "listen-refused"


class TlsError(PostcopyError):
    """The other end has not proven who it is, or does not believe who we are."""

    code = "tls-failed"

    @classmethod
    def of(cls, reason: str) -> "TlsError":
        """OpenSSL's words, whichever of the two libraries said them, and what is to be done about it."""
        folded = reason.lower().replace("_", " ")
        hint = next((hint for words, hint in TLS_HINTS if words in folded), "")
        return cls("TLS handshake", expected="a peer with a certificate of our authority", got=f"{reason}{hint and '; '}{hint}")


class PeerNameError(PostcopyError):
    """Its certificate is good, but it is none of those that are let in."""

    code = "name-not-allowed"


TLS_HINTS = (
    ("wrong version number", "the peer speaks no TLS: start it with --tls-dir too"),
    ("unsupported protocol", "the peer offers no TLS 1.3"),
    ("alert protocol version", "the peer wants another TLS than 1.3"),
    ("no shared", "the peer offers no TLS 1.3 that is spoken here"),
    ("peer did not return a certificate", "the peer has none: start it with --tls-dir too"),
    ("alert certificate required", "the peer wants a certificate of ours"),
    ("alert unknown ca", "the peer does not trust who signed our certificate: its ca.pem needs that authority"),
    ("alert certificate expired", "ours has expired: renew it and send this daemon SIGHUP (systemctl reload)"),
    ("alert", "the peer refuses our certificate; its log says why"),
    ("has expired", "the peer's: renew it there; or this host's clock is wrong"),
    ("not yet valid", "the peer's; one of the hosts' clocks is wrong"),
    ("certificate verify failed", "our ca.pem does not vouch for the peer's certificate"),
)


def errno_text(error_number: int) -> str:
    """``EPERM (Operation not permitted)``: the name that kernel documentation uses and what it means."""
    return f"{errno.errorcode.get(error_number, error_number)} ({os.strerror(error_number)})"
