"""A daemon that was killed, and is started anew: what becomes of each migration of its earlier life (P4, P6).

A record says what may have been done (record.py), the guest says how it stands; together they decide:

    guest says   record                        what follows
    running      any                           it runs here: a source's record is void, at a destination it is whole
    waiting      destination, any              it was never resumed here and never will be: ``aborted``
    paused       source, switchover not sent   it is resumed here
    paused       source, aborted               likewise
    paused       source, complete              it is whole elsewhere: ``released``
    paused       source, switchover sent       the destination is asked: PAUSED, and dialled
    arriving     destination                   it runs here, on what is here; the source will ask: PAUSED
    arriving     destination, abandoned        it runs here, what is not here is lost: ABANDONED, once that holds again
    paused, arriving   none that fits          undecided: it is left as it is, and a person decides

The source does not wait for its guest where the service manager has kept the memory (descriptor_store.py): the destination is
asked at once, and a guest that comes back later finds its migration, or how that has ended. So it is served although the guest's
process at the source has ended too. At the destination a guest whose process has ended ends its migration: ``gone``.

A destination that had recorded no resume decides at once, before any guest is here. The agent is the authority on who runs: it
has read all of its old connection before it says hello.

What has stalled goes on in the same way without a restart, when a person says so: another migration takes its place
(``go_on_at_source``, ``go_on_at_destination``).
"""

import hmac
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import structlog

from migrate.descriptor_store import HeldSet, identity
from migrate.destination import DestinationMigration, abandoned
from migrate.errors import GuestGoneError, NotResolvableError, PostcopyError
from migrate.greeting import Incoming
from migrate.guest_link import GuestLink, GuestState
from migrate.record import UNREADABLE_HINT, Record
from migrate.source import SourceMigration
from proto.errors import ProtocolError
from proto.messages import Aborted, Complete, GuestReleased, Recover, Released, Resume
from proto.preamble import AnswerCode, Preamble
from proto.states import Role, State

if TYPE_CHECKING:
    from migrate.daemon import Daemon

log = structlog.get_logger("postcopy.returning")
ANSWER_DEADLINE_SECONDS = 10.0


def decide(daemon: "Daemon") -> None:
    """At the start, before anybody is answered. Raises OSError."""
    for record in list(daemon.records.earlier.values()):
        if record.role is Role.DESTINATION and not record.may_run_there and not record.verdict:
            _conclude(daemon, record, verdict="aborted")
        elif not record.verdict:
            told = {"guest": record.guest_id, "migration": record.migration_id}
            log.warning("migration of an earlier life: waiting for its guest", **told)


def take_up(daemon: "Daemon") -> None:
    """Behind ``decide``: what the service manager has kept, and a record says what to do with it."""
    for held in list(daemon.store.held):
        record = daemon.records.earlier.get(held.migration_id)
        if held.role is Role.DESTINATION and held.guest_has_ended:
            if record is not None and not record.verdict:
                _conclude(daemon, record, verdict="gone")
            daemon.store.drop(held, "its process has ended")
        elif record is not None and held.role is record.role is Role.SOURCE:
            if record.verdict == "complete":
                daemon.store.drop(held, "its migration is complete")
            elif record.may_run_there and not record.verdict:
                _take_up(daemon, held, record)


def _take_up(daemon: "Daemon", held: HeldSet, record: Record) -> None:
    try:
        if [identity(descriptor) for descriptor in held.memory_files] != record.files or not record.regions:
            raise PostcopyError(
                f"memory of guest {held.guest_id}", expected="what its record says", got="other files, or no regions"
            )
        link = GuestLink.ended(record.guest_id, record.regions, held.memory_files)
    except (PostcopyError, OSError) as error:
        log.error("migration not taken up from what is held", guest=held.guest_id, migration=held.migration_id, reason=str(error))
        return
    daemon.store.taken_up(held, link)
    daemon.take_back_source(link, _taken(daemon, record))


def _conclude(daemon: "Daemon", record: Record, verdict: str) -> None:
    """Recorded before it is said."""
    concluded = record.changed(verdict=verdict)
    daemon.records.write(concluded)
    daemon.records.earlier[record.migration_id] = concluded
    log.info("migration of an earlier life", guest=record.guest_id, migration=record.migration_id, verdict=verdict)


def go_on(daemon: "Daemon", link: GuestLink) -> Callable[[], object] | None:
    """A guest has attached: what is to be done once it is welcomed."""
    assert link.hello is not None
    if (under_way := _taken_up(daemon, link)) is not None:
        return partial(under_way.guest_returns, link)
    here = daemon.records.of_guest(Role.SOURCE, link.guest_id, link.files)
    there = daemon.records.of_guest(Role.DESTINATION, link.guest_id, link.files)
    said = link.hello.role
    if said == "paused":
        return _paused(daemon, link, here)
    if said == "arriving":
        return _arriving(daemon, link, there)
    if said == "running" and here is not None:
        daemon.records.remove(here.migration_id)
    if there is not None and (not there.verdict or (said == "running" and there.verdict == "abandoned")):
        _conclude(daemon, there, "complete" if said == "running" else "aborted")
    return None


def _lacking(daemon: "Daemon") -> list[SourceMigration]:
    return [one for one in daemon.migrations.values() if isinstance(one, SourceMigration) and one.lacks_guest]


def guest_that_lacks(daemon: "Daemon", guest_id: str) -> GuestLink | None:
    """What stands for a guest of that name whose process has not come back."""
    kept = (one for one in daemon.migrations.values() if isinstance(one, SourceMigration) and one.holds_memory_alone)
    return next((one.guest for one in kept if one.guest_id == guest_id), None)


def _taken_up(daemon: "Daemon", link: GuestLink) -> SourceMigration | None:
    """The migration that has begun without this guest."""
    if link.hello is None or link.hello.role not in ("paused", "running"):
        return None
    return next((one for one in _lacking(daemon) if (one.guest_id, one.guest.files) == (link.guest_id, link.files)), None)


def _paused(daemon: "Daemon", link: GuestLink, record: Record | None) -> Callable[[], object] | None:
    if record is None:
        _tell_undecided(daemon, link)
        return None
    if record.verdict == "complete":
        return partial(_release, daemon, link, record)
    if not record.may_run_there or record.verdict == "aborted":
        return partial(run_on, daemon, link, record)
    link.state = GuestState.LEAVING
    return lambda: daemon.take_back_source(link, _taken(daemon, record))


def _arriving(daemon: "Daemon", link: GuestLink, record: Record | None) -> Callable[[], object] | None:
    if record is None or record.verdict == "aborted":
        _tell_undecided(daemon, link)
        return None
    link.state = GuestState.ARRIVING
    return lambda: daemon.take_back_destination(link, _taken(daemon, record))


def _taken(daemon: "Daemon", record: Record) -> Record:
    """It is a migration of this life now; its record stays written."""
    daemon.records.earlier.pop(record.migration_id, None)
    return record


def _tell_undecided(daemon: "Daemon", link: GuestLink) -> None:
    hint = "give this daemon the runtime directory of the one that it had"
    if damaged := daemon.records.unreadable:
        hint = f"its record may be one that cannot be read: {', '.join(map(str, damaged[:8]))}; {UNREADABLE_HINT}"
    log.error(
        "guest amid a migration of which nothing is known here: it is left as it is",
        guest=link.guest_id,
        hint=hint,
    )


def resolve(daemon: "Daemon", link: GuestLink, *, here: bool) -> None:
    """A person has decided where the guest runs. Raises NotResolvableError unless it is paused here."""
    migration = daemon.migration_of(link)
    if isinstance(migration, SourceMigration):
        migration.check_resolvable(here=here)
        if migration.state is State.STALLED:
            migration = go_on_at_source(daemon, migration)
        migration.resolve(here=here)
        return
    if link.state is not GuestState.UNDECIDED or link.hello is None or link.hello.role != "paused":
        raise NotResolvableError(f"guest {link.guest_id}", expected="paused here, its end unknown", got=str(link.state))
    if here:
        run_on(daemon, link, None)
        return
    link.send(GuestReleased())
    link.close()


def go_on_at_source(daemon: "Daemon", stalled: SourceMigration) -> SourceMigration:
    """A person has said so: another migration in the place of one that has stalled, from its record, as after a restart.
    Raises NotRecoverableError."""
    record = stalled.leave()
    log.info("stalled migration is taken up again", guest=stalled.guest_id, migration=stalled.id)
    return daemon.take_back_source(stalled.guest, record, stalled.bulk_limit_bytes_per_second)


def go_on_at_destination(daemon: "Daemon", stalled: DestinationMigration) -> DestinationMigration:
    """Its source has dialled again."""
    guest, record = stalled.leave()
    log.info("stalled migration is taken up again", guest=stalled.guest_id, migration=stalled.id)
    again = daemon.take_back_destination(guest, record)
    again.downtime_ns, again.downtime_uncertainty_ns = stalled.downtime_ns, stalled.downtime_uncertainty_ns
    return again


def run_on(daemon: "Daemon", link: GuestLink, record: Record | None) -> None:
    """A paused guest runs on here."""
    link.state = GuestState.RUNNING
    link.send(Resume(epoch=0 if record is None else record.epoch, state=None))
    if record is not None:
        daemon.records.remove(record.migration_id)
    log.info("guest runs on here", guest=link.guest_id)


def _release(daemon: "Daemon", link: GuestLink, record: Record) -> None:
    link.send(GuestReleased())
    daemon.records.remove(record.migration_id)
    link.close()


def can_answer(daemon: "Daemon", preamble: Preamble) -> bool:
    record = daemon.records.earlier.get(preamble.migration_id.hex())
    return record is not None and record.role is Role.DESTINATION and bool(record.verdict)


async def answer_source(daemon: "Daemon", came: Incoming, preamble: Preamble) -> None:
    """The source of a migration that has ended here in an earlier life dials again: it is told how. Raises ProtocolError."""
    record = daemon.records.earlier[preamble.migration_id.hex()]
    if not hmac.compare_digest(preamble.token, bytes.fromhex(record.token)):
        await came.answer(AnswerCode.TOKEN_WRONG)
        raise ProtocolError("token-wrong", "control connection", expected="the migration's token", got="another")
    await came.answer(AnswerCode.WELCOME)
    control = await came.control()
    try:
        await control.receive(Recover, deadline_seconds=ANSWER_DEADLINE_SECONDS)
        if record.verdict == "abandoned":
            control.refuse(abandoned(record.guest_id))
            return
        if record.verdict == "gone":
            control.refuse(GuestGoneError(f"guest {record.guest_id}", expected="one that can go on", got="its process has ended"))
            return
        if record.verdict == "aborted":
            control.send(Aborted(epoch=0, reason="the daemon was started anew before the guest had been resumed"))
            return
        control.send(Complete(downtime_ns=None, downtime_uncertainty_ns=0, faults={}, pages={}))
        await control.receive(Released, deadline_seconds=ANSWER_DEADLINE_SECONDS)
        daemon.records.remove(record.migration_id)
    except (PostcopyError, ProtocolError) as error:
        log.warning("source of an earlier migration", migration=record.migration_id, reason=str(error))
    finally:
        control.close()
