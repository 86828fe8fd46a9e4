"""``python -m migrate``: the command ``postcopy``."""

from migrate.cli import main

main()
