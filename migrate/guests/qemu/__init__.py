"""An unmodified QEMU as a guest: its user's own command line, a preloaded object inside it, and an agent beside it."""
