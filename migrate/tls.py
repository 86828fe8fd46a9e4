"""Who may be at the other end of a TCP connection: TLS 1.3, a certificate on both sides, and a list of names. One policy, two
libraries that keep it: Python's ssl for control connections, OpenSSL in C (dataplane/tls.h) for those that carry pages.

- The files are PEM: ``cert.pem`` (ours, with what is between it and the authority), ``key.pem``, ``ca.pem``. They are read when
  the daemon starts and with each SIGHUP (``reload``): all of them, once, so that both libraries have the same, and new
  connections the new ones only when all are good. A connection that stands goes on as it began.
- A peer's certificate comes from that authority, is valid now, is meant for its side (where it says for which: client, server),
  and one of its DNS names is allowed. No wildcards, and the address that was dialled says nothing: a guest moves between hosts
  that know each other. What has no DNS name is nobody.
- Of both libraries only OpenSSL's reason is told, never what is in a file.

Not looked at: revocation (CRL, OCSP). Certificates of days rather than years, and a name less in ``--tls-allow``, do that job.
"""

import contextlib
import os
import re
import ssl
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from migrate.dataplane.tls import TlsContext
from migrate.errors import ListenRefusedError, PeerNameError, TlsError

FILE_BYTES_MAX = 1 << 20
DNS_NAME_CHARACTERS_MAX, DNS_NAME = 253, re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    certificate: Path
    key: Path
    authority: Path

    @classmethod
    def chosen(
        cls, directory: Path | None, certificate: Path | None, key: Path | None, authority: Path | None
    ) -> "TlsFiles | None":
        """Of the directory but for what is named by itself; None: none at all. Raises ListenRefusedError for a part of them."""
        if directory is not None:
            certificate, key = certificate or directory / "cert.pem", key or directory / "key.pem"
            authority = authority or directory / "ca.pem"
        if certificate is None and key is None and authority is None:
            return None
        if certificate is None or key is None or authority is None:
            names = {"--tls-cert": certificate, "--tls-key": key, "--tls-ca": authority}
            missing = ", ".join(name for name, path in names.items() if path is None)
            raise ListenRefusedError(
                "TLS", expected="--tls-dir, or all of --tls-cert, --tls-key and --tls-ca", got=f"no {missing}"
            )
        return cls(certificate, key, authority)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What came of one reading of the files: replaced as a whole."""

    data: TlsContext
    accepting: ssl.SSLContext
    dialling: ssl.SSLContext


class Tls:
    """What a daemon shows of itself, and whom it lets in. Raises ListenRefusedError, saying what is wrong with which file."""

    def __init__(self, files: TlsFiles, allowed: Collection[str]) -> None:
        self._files = TlsFiles(files.certificate.absolute(), files.key.absolute(), files.authority.absolute())
        self.allowed = frozenset(name.lower() for name in allowed)
        if not self.allowed:
            raise ListenRefusedError(
                "TLS", expected="--tls-allow NAME, once for each peer's certificate", got="none: nobody is let in"
            )
        for name in self.allowed:
            if len(name) > DNS_NAME_CHARACTERS_MAX or DNS_NAME.fullmatch(name) is None:
                expected = "a DNS name: letters, digits, hyphens, underscores and dots, no wildcard"
                raise ListenRefusedError("--tls-allow", expected=expected, got=repr(name), code="usage")
        self._loaded = _load(self._files)

    def reload(self) -> None:
        """The files anew. Raises ListenRefusedError, and then what there was stays in use."""
        loaded = _load(self._files)
        if not loaded.data.valid_from_seconds <= time.time() < loaded.data.valid_until_seconds:
            dates = (utc_text(loaded.data.valid_from_seconds), utc_text(loaded.data.valid_until_seconds))
            got = f"one that is from {dates[0]} until {dates[1]}"
            raise ListenRefusedError("TLS", expected=f"{self._files.certificate} to be valid now", got=got)
        self._loaded = loaded

    @property
    def data(self) -> TlsContext:
        return self._loaded.data

    @property
    def accepting(self) -> ssl.SSLContext:
        return self._loaded.accepting

    @property
    def dialling(self) -> ssl.SSLContext:
        return self._loaded.dialling

    def check(self, names: Sequence[str]) -> None:
        """Raises PeerNameError."""
        if not any(name.lower() in self.allowed for name in names):
            shown = ", ".join(names[:8]) or "nobody: it has no DNS name"
            remedy = f"; add --tls-allow {names[0]}" if names else ""
            raise PeerNameError("peer certificate names", expected=f"one of {', '.join(sorted(self.allowed))}{remedy}", got=shown)


def _load(files: TlsFiles) -> _Loaded:
    with contextlib.ExitStack() as stack:
        read = TlsFiles(*(stack.enter_context(_as_it_is(path)) for path in (files.certificate, files.key, files.authority)))
        try:
            return _Loaded(
                TlsContext(read.certificate, read.key, read.authority),
                _context(ssl.PROTOCOL_TLS_SERVER, read),
                _context(ssl.PROTOCOL_TLS_CLIENT, read),
            )
        except (TlsError, ssl.SSLError) as error:
            got = error.got if isinstance(error, TlsError) else error.reason
            expected = f"{files.certificate}, its key {files.key} without a passphrase, certificates in {files.authority}"
            raise ListenRefusedError("TLS", expected=expected, got=got) from None


@contextlib.contextmanager
def _as_it_is(path: Path) -> Iterator[Path]:
    """A copy in memory: who puts another file in its place meanwhile changes nothing for whoever reads it next."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ListenRefusedError("TLS", expected="a PEM file that this user can read", got=error) from error
    if len(data) > FILE_BYTES_MAX:
        raise ListenRefusedError("TLS", expected=f"{path} of at most {FILE_BYTES_MAX} bytes", got="more")
    with open(os.memfd_create(path.name, os.MFD_CLOEXEC), "wb", buffering=0) as copy:
        copy.write(data)
        yield Path(f"/proc/self/fd/{copy.fileno()}")


def utc_text(unix_seconds: float) -> str:
    return datetime.fromtimestamp(unix_seconds, UTC).isoformat()


def _context(protocol: int, files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    context.load_cert_chain(files.certificate, files.key, password=lambda: "")  # a daemon has nobody to ask
    context.load_verify_locations(cafile=files.authority)
    return context


def names_of(certificate: dict[str, object] | None) -> list[str]:
    """The DNS names of what ``SSLObject.getpeercert`` tells."""
    alternatives = (certificate or {}).get("subjectAltName", ())
    assert isinstance(alternatives, tuple)
    return [str(value) for kind, value in alternatives if kind == "DNS"]


def tls_error(error: ssl.SSLError) -> TlsError:
    reason = error.reason or error.strerror or "TLS failed"
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = f"certificate verify failed: {error.verify_message}"
    return TlsError.of(reason.replace("_", " ").lower() if reason.isupper() else reason)
