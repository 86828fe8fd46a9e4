"""An authority and daemons' certificates, by the `openssl` command as deploy/README.md says: for the benchmark and the tests."""

import shutil
import subprocess
from pathlib import Path

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Authority:
    """Its own certificate and key, in a directory of their own."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.certificate, self._key = directory / "ca.pem", directory / "ca.key"
        openssl("req", "-x509", *KEY, "-keyout", self._key, "-out", self.certificate, "-days", "30", "-subj", "/CN=authority")

    def issue(self, directory: Path, name: str, *, days: int = 30) -> Path:
        """A `--tls-dir` for a daemon of that name; ``days`` < 0: expired."""
        directory.mkdir(parents=True)
        request = directory / "request.pem"
        openssl(
            *("req", "-new", *KEY, "-keyout", directory / "key.pem", "-out", request, "-subj", f"/CN={name}"),
            *("-addext", f"subjectAltName=DNS:{name}", "-addext", "basicConstraints=critical,CA:FALSE"),
        )
        openssl(
            *("x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key, "-days", str(days)),
            *("-copy_extensions", "copy", "-out", directory / "cert.pem"),
        )
        shutil.copy(self.certificate, directory / "ca.pem")
        return directory


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)
