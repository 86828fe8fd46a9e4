"""What can be wrong with input from a peer, each naming what was expected and what came."""

TEXT_MAX = 400


def _bounded(value: object) -> str:
    """A peer's bytes end up in these texts: keep them short enough for ``refused`` and on one line of the log."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value)[:TEXT_MAX])


def sentence(what: str, expected: str, got: str) -> str:
    """``what: expected …, got …``: of the last two what there is."""
    facts = ", ".join(f"{name} {text}" for name, text in (("expected", expected), ("got", got)) if text)
    return f"{what}: {facts}" if facts else what


class ProtocolError(Exception):
    """The peer sent what the protocol does not allow. ``code`` is stable and goes over the wire in ``refused``."""

    def __init__(self, code: str, what: str, *, expected: object, got: object) -> None:
        self.code = code
        self.what = _bounded(what)
        self.expected = _bounded(expected)
        self.got = _bounded(got)
        super().__init__(sentence(self.what, self.expected, self.got))


class IllegalTransitionError(Exception):
    """An event that the state table does not allow in the current state."""

    def __init__(self, role: str, state: str, event: str) -> None:
        self.role, self.state, self.event = role, state, event
        super().__init__(f"{role} in state {state!r} cannot take event {event!r}")
