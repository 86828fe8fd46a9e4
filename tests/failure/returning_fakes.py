"""Fake guests amid a migration at a daemon that is killed and started anew; the other daemon is a fake too."""

import contextlib
import itertools
import os
import resource
from collections.abc import Iterator

from migrate.pair import DaemonProcess, Pair
from proto.messages import Recover, Welcome, control_decoder, encode
from proto.preamble import Answer, AnswerCode, ConnectionKind, Preamble

from .fakes import PREAMBLE_BYTES, TOKEN, Connection, FakeDestination, FakeGuest, FakeSource, receive_exactly
from .killing import slain

LEAVING_DESCRIPTORS = 3
"""Of a guest its socket and its memory file; and one for who asks meanwhile."""
ARRIVING_DESCRIPTORS = 5
"""A userfaultfd and page states besides."""


class Leaving:
    """A fake guest at a real source daemon, whose destination is a fake."""

    def __init__(self, pair: Pair, guest: FakeGuest, fake: FakeDestination) -> None:
        self.pair, self.guest, self.fake = pair, guest, fake
        guest.attach(pair.source.runtime_dir / "guests.sock")
        with pair.source.client() as client:
            self.id = client.migrate(guest.guest_id, fake.address, precopy="off").id
        fake.prepare(guest)

    def kill(self) -> None:
        slain(self.pair, self.pair.source)
        self.guest_returns()

    def guest_returns(self) -> None:
        answer = self.guest.connect_again(self.pair.source.runtime_dir / "guests.sock", role="paused")
        assert isinstance(answer, Welcome)

    def dialled(self) -> Connection:
        """In a later epoch, by a source that proves itself."""
        sock = self.fake.accept()
        preamble = Preamble.decode(receive_exactly(sock, PREAMBLE_BYTES))
        assert (preamble.kind, preamble.token) == (ConnectionKind.CONTROL, TOKEN)
        self.epoch = preamble.epoch
        assert self.epoch > 0
        sock.sendall(Answer(AnswerCode.WELCOME).encode())
        connection = Connection(sock, control_decoder())
        assert connection.receive(Recover).epoch == preamble.epoch
        return connection


class Arriving:
    """A fake guest at a real destination daemon, whose source is a fake."""

    def __init__(self, pair: Pair, guest: FakeGuest, source: FakeSource) -> None:
        self.pair, self.guest, self.source, self.id = pair, guest, source, source.migration_id.hex()
        guest.connect(pair.destination.runtime_dir / "guests.sock")
        guest.send(encode(guest.hello(offers=["keep"])), guest.descriptors())
        guest.connection.receive(Welcome)
        streams = source.offer().streams
        self.states_fd = guest.receive_kept()
        source.attach_accepted(streams)
        source.prepare_attached(guest)

    def kill(self) -> None:
        slain(self.pair, self.pair.destination)

    def guest_returns(self, **hello: object) -> None:
        """It says where it stands."""
        socket_path = self.pair.destination.runtime_dir / "guests.sock"
        answer = self.guest.connect_again(socket_path, [self.states_fd], page_states=True, **hello)
        assert isinstance(answer, Welcome)
        os.close(self.states_fd)

    def dial(self, epoch: int) -> AnswerCode:
        sock, answer = self.source.dial(ConnectionKind.CONTROL, token=self.source.token, epoch=epoch)
        self.control = Connection(sock, control_decoder())
        if answer.code is AnswerCode.WELCOME:
            self.control.send(Recover(epoch=epoch))
        return answer.code


def records(daemon: DaemonProcess) -> list[str]:
    return [path.name for path in (daemon.runtime_dir / "migrations").iterdir()]


@contextlib.contextmanager
def short_of_descriptors(daemon: DaemonProcess, count: int) -> Iterator[DaemonProcess]:
    """It gets so many more and, with that, no data plane."""
    before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir(f"/proc/{daemon.pid}/fd")}
    free = (number for number in itertools.count() if number not in taken)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (next(itertools.islice(free, count, None)), before[1]))
    try:
        yield daemon
    finally:
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)


def told_of(daemon: DaemonProcess, migration_id: str, words: str) -> int:
    """How often its log has said so of that migration."""
    return sum(migration_id in line and words in line for line in daemon.log().splitlines())
