"""Who may be at the other end of a TCP connection: TLS 1.3, a certificate on both sides, and a list of names. One policy, two
libraries that keep it: Python's ssl for control connections, OpenSSL in C (dataplane/tls.h) for those that carry pages.

- The files are PEM and read once: ``cert.pem`` (ours, with what is between it and the authority), ``key.pem``, ``ca.pem``.
- A peer's certificate comes from that authority, is valid now, is meant for its side (where it says for which: client, server),
  and one of its DNS names is allowed. No wildcards, and the address that was dialled says nothing: a guest moves between hosts
  that know each other. What has no DNS name is nobody.
- Of both libraries only OpenSSL's reason is told, never what is in a file.

Not looked at: revocation (CRL, OCSP). Certificates of days rather than years, and a name less in ``--tls-allow``, do that job.
"""

import ssl
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from migrate.dataplane.tls import TlsContext
from migrate.errors import ListenRefusedError, PeerNameError, TlsError


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


class Tls:
    """What a daemon shows of itself, and whom it lets in. Raises ListenRefusedError, saying what is wrong with which file."""

    def __init__(self, files: TlsFiles, allowed: Collection[str]) -> None:
        self.allowed = frozenset(name.lower() for name in allowed)
        if not self.allowed:
            raise ListenRefusedError(
                "TLS", expected="--tls-allow NAME, once for each peer's certificate", got="none: nobody is let in"
            )
        for path in (files.certificate, files.key, files.authority):
            try:
                path.open("rb").close()
            except OSError as error:
                raise ListenRefusedError("TLS", expected="a PEM file that this user can read", got=error) from error
        try:
            self.data = TlsContext(files.certificate.absolute(), files.key.absolute(), files.authority.absolute())
            self.accepting = _context(ssl.PROTOCOL_TLS_SERVER, files)
            self.dialling = _context(ssl.PROTOCOL_TLS_CLIENT, files)
        except (TlsError, ssl.SSLError) as error:
            got = error.got if isinstance(error, TlsError) else error.reason
            expected = f"{files.certificate}, its key {files.key} without a passphrase, certificates in {files.authority}"
            raise ListenRefusedError("TLS", expected=expected, got=got) from None

    def check(self, names: Sequence[str]) -> None:
        """Raises PeerNameError."""
        if not any(name.lower() in self.allowed for name in names):
            shown = ", ".join(names[:8]) or "nobody: it has no DNS name"
            remedy = f"; add --tls-allow {names[0]}" if names else ""
            raise PeerNameError("peer certificate names", expected=f"one of {', '.join(sorted(self.allowed))}{remedy}", got=shown)


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
