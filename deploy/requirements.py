"""Print what .venv needs, one requirement a line: ``requirements.py PYPROJECT``. pyproject.toml stays the only list.

Not ``pip install --group``: that needs a pip younger than the one Debian's python3 brings.
"""

import sys
import tomllib
from pathlib import Path


def main() -> None:
    project = tomllib.loads(Path(sys.argv[1]).read_text())
    groups = (project["build-system"]["requires"], project["project"]["dependencies"], project["dependency-groups"]["dev"])
    print(*(requirement for group in groups for requirement in group), sep="\n")


main()
