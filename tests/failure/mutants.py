"""The product with one guard taken out: its C core as a program, its Python as a tree that comes before the installed one.

A mutation is an exact text that occurs once in a file, and what stands there instead; where the text is no longer there the
test fails and wants to be brought up to date, so that no guard goes untested unnoticed.
"""

import atexit
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import migrate
import proto

COMPILER = (
    "cc",
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-O1",
    "-w",
    "-pthread",
    "-Iproto",
    "-Imigrate/dataplane",
    "-Imigrate/guest",
    "-Imigrate/uffd",
)
CORE = ("migrate/dataplane", "migrate/guest", "migrate/uffd")
C_FOLDERS = (*CORE, "proto", "tests", "tests/path", "tests/failure")


@dataclass(frozen=True)
class Mutation:
    file: str
    text: str
    instead: str

    def apply(self, root: Path) -> None:
        path = root / self.file
        source = path.read_text()
        assert source.count(self.text) == 1, f"{self.file} has {source.count(self.text)} times: {self.text}"
        path.write_text(source.replace(self.text, self.instead))


NONE: tuple[Mutation, ...] = ()


@functools.cache
def _unmutated(repository: Path) -> Path:
    """A copy of the C core with an object beside each file of it, and what each was made from: compiled once for all guards."""
    directory = Path(tempfile.mkdtemp(prefix="postcopy-guards-"))
    atexit.register(shutil.rmtree, directory)
    for folder in C_FOLDERS:
        (directory / folder).mkdir(parents=True)
        for source in (repository / folder).glob("*.[ch]"):
            shutil.copy(source, directory / folder)
    _compile(directory, [path.relative_to(directory) for folder in CORE for path in (directory / folder).glob("*.c")])
    return directory


def _compile(directory: Path, sources: Iterable[Path]) -> None:
    """NAME.o and NAME.d (a rule of make: NAME.o and all that it was made from) beside each NAME.c; two at a time."""

    def compile_one(source: Path) -> None:
        command = [*COMPILER, "-MMD", "-c", "-o", str(source.with_suffix(".o")), str(source)]
        subprocess.run(command, cwd=directory, check=True, timeout=60)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources))


def build_c(repository: Path, directory: Path, *mutations: Mutation, main: str = "tests/failure/guards_main.c") -> Path:
    """A main with the whole C core behind it; only what the mutations touch is compiled anew."""
    shutil.copytree(_unmutated(repository), directory, dirs_exist_ok=True)
    for mutation in mutations:
        mutation.apply(directory)
    changed = {mutation.file for mutation in mutations}
    made_from = {
        path.relative_to(directory): path.read_text().split() for folder in CORE for path in (directory / folder).glob("*.d")
    }
    _compile(directory, [path.with_suffix(".c") for path, files in made_from.items() if changed.intersection(files)])
    objects = [str(path.with_suffix(".o")) for path in made_from]
    subprocess.run([*COMPILER, "-o", "guards", main, *objects, "-lssl", "-lcrypto"], cwd=directory, check=True, timeout=60)
    return directory / "guards"


def python_tree(directory: Path, *mutations: Mutation) -> Path:
    """For PYTHONPATH: the installed packages, copied and changed."""
    directory.mkdir(parents=True, exist_ok=True)
    for package in (migrate, proto):
        assert package.__file__ is not None
        installed = Path(package.__file__).parent
        shutil.copytree(installed, directory / installed.name)  # with what is compiled: its files keep their times
    for mutation in mutations:
        mutation.apply(directory)
    return directory
