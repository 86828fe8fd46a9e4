"""The product with one guard taken out: its C core as a program, its Python as a tree that comes before the installed one.

A mutation is an exact text that occurs once in a file, and what stands there instead; where the text is no longer there the
test fails and wants to be brought up to date, so that no guard goes untested unnoticed.
"""

import shutil
import subprocess
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
C_FOLDERS = ("migrate/dataplane", "migrate/guest", "migrate/uffd", "proto", "tests/path", "tests/failure")


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


def build_c(repository: Path, directory: Path, *mutations: Mutation, main: str = "tests/failure/guards_main.c") -> Path:
    """A main with the whole C core behind it."""
    for folder in C_FOLDERS:
        for source in (repository / folder).glob("*.[ch]"):
            (directory / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(source, directory / folder)
    for mutation in mutations:
        mutation.apply(directory)
    core = [str(path.relative_to(directory)) for folder in C_FOLDERS[:3] for path in (directory / folder).glob("*.c")]
    command = [*COMPILER, "-o", "guards", main, *core]
    subprocess.run(command, cwd=directory, check=True, timeout=60)
    return directory / "guards"


def python_tree(directory: Path, *mutations: Mutation) -> Path:
    """For PYTHONPATH: the installed packages, copied and changed."""
    directory.mkdir(parents=True, exist_ok=True)
    for package in (migrate, proto):
        assert package.__file__ is not None
        installed = Path(package.__file__).parent
        shutil.copytree(installed, directory / installed.name, ignore=shutil.ignore_patterns("__pycache__"))
    for mutation in mutations:
        mutation.apply(directory)
    return directory
