"""The wheel holds all that the product needs and nothing else, and runs in an environment of its own."""

import os
import platform
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DEADLINE_SECONDS = 100.0
EXTENSIONS = {
    "migrate/dataplane/_dataplane.abi3.so",
    "migrate/guest/_guest.abi3.so",
    "migrate/guests/qemu/libpostcopy-preload.so",  # no extension: QEMU loads it
    *(["migrate/guests/kvm/_kvm.abi3.so"] if platform.machine() == "x86_64" else []),
    "migrate/guests/workload/_workload.abi3.so",
    "migrate/uffd/_uffd.abi3.so",
}
PROGRAMS = {"migrate/bench/postcopy-floor", "migrate/bench/postcopy-resolvers", "migrate/host/postcopy-trial"}
DATA = {"migrate/py.typed", "migrate/api/openapi.json", *PROGRAMS, "proto/PROTOCOL.md", "proto/frame.h"}


def run(*command: str | Path, directory: Path) -> str:
    """Standard output; fails with all that was said. Nothing of this process's Python settings reaches the child."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "POSTCOPY", "VIRTUAL_ENV"))
    }
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])  # ninja
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
    )
    assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """Built from the clone, with the build tools that are here (no network)."""
    directory = tmp_path_factory.mktemp("wheel")
    options = ["--no-build-isolation", "--no-deps", "--config-settings", f"build-dir={directory / 'build'}"]
    run(sys.executable, "-P", "-m", "pip", "wheel", *options, "--wheel-dir", directory, repository, directory=directory)
    [path] = directory.glob("*.whl")
    return path


def runtime_dependencies(name: str, extras: frozenset[str] = frozenset()) -> Iterator[Distribution]:
    """What the installed distribution declares, and what that declares in turn. Itself not included."""
    pending = [(name, extras)]
    seen = set(pending)
    while pending:
        name, extras = pending.pop()
        for text in distribution(name).requires or []:
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
                continue
            needed = (canonicalize_name(requirement.name), frozenset(requirement.extras))
            if needed not in seen:
                seen.add(needed)
                pending.append(needed)
                yield distribution(needed[0])


def link_dependencies(into: Path) -> None:
    """The declared dependencies and no other package: what the product imports undeclared is missing here."""
    into.mkdir()
    for dependency in runtime_dependencies("postcopy"):
        tops = {file.parts[0] for file in dependency.files or []} - {"..", "__pycache__"}
        assert tops, dependency
        for top in tops:
            if not (into / top).exists():
                (into / top).symlink_to(Path(str(dependency.locate_file(top))).resolve())


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path, repository: Path) -> None:
    assert wheel.name.split("-")[2:4] == ["cp311", "abi3"]
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
        metadata = [name.split("/", 1)[1] for name in archive.namelist() if ".dist-info/" in name]
        assert all(archive.getinfo(program).external_attr >> 16 & 0o100 for program in PROGRAMS)
    modules = {
        str(path.relative_to(repository)) for package in ("migrate", "proto") for path in (repository / package).rglob("*.py")
    }
    assert {name for name in files if name.endswith(".py")} == modules - {"migrate/build_ffi.py"}
    assert {name for name in files if name.endswith(".so")} == EXTENSIONS
    rest = {name for name in files if not name.endswith((".py", ".pyi", ".so"))}
    assert {name for name in rest if not name.startswith("proto/golden/")} == DATA
    assert {"licenses/LICENSE", "entry_points.txt"} <= set(metadata)


@pytest.mark.timeout(150)
@pytest.mark.requires("uffd")
def test_demo_runs_from_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True, with_pip=False)
    pip: list[str | Path] = [sys.executable, "-P", "-m", "pip", "--python", environment / "bin" / "python"]
    run(*pip, "install", "--no-index", "--no-deps", wheel, directory=tmp_path)
    link_dependencies(tmp_path / "dependencies")
    [packages] = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{tmp_path / 'dependencies'}\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    where = run(environment / "bin" / "python", "-P", "-c", "import migrate, proto; print(migrate.__file__)", directory=empty)
    assert Path(where.strip()).is_relative_to(packages)
    said = run(environment / "bin" / "postcopy", "demo", "--memory", "64M", directory=empty)
    assert "guest verified" in said
    assert list(empty.iterdir()) == []
