"""``python -m migrate.host`` prints every feature; ``--available`` the names of those present, joined by commas."""

import sys

from migrate.host import PROBES, feature


def main(arguments: list[str]) -> None:
    found = [feature(name) for name in PROBES]
    if arguments == ["--available"]:
        print(",".join(one.name for one in found if one.available))
    else:
        print(*found, sep="\n")


main(sys.argv[1:])
