"""What the API says and takes, beside the status of a migration (migrate/session.py)."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from migrate.guest_link import GuestState
from migrate.precopy import AUTO, DEADLINE_SECONDS_MAX, ROUNDS_MAX, PrecopyPolicy
from migrate.session import BULK_LIMIT_MAX, MigrationStatus
from proto.messages import FaultKind, Name, Streams
from proto.states import Role, State

PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
ADDRESS_PATTERN = rf"^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\]):{PORT}$"


def _address(text: str) -> str:
    """Against the pattern, in words that an operator wants to read."""
    if re.fullmatch(ADDRESS_PATTERN, text) is None:
        raise PydanticCustomError("address", "Input should be HOST:PORT or [IPv6]:PORT")
    return text


def _whole(value: object) -> object:
    """90.0 is an integer of JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)


class RegionInfo(BaseModel):
    """A contiguous range of guest memory with one page size."""

    size_bytes: int
    page_bytes: int


class GuestInfo(BaseModel):
    id: str
    state: GuestState
    size_bytes: int
    shape: Annotated[str, Field(description="The regions in words; a guest goes only where one of the same shape waits.")]
    regions: list[RegionInfo]
    pid: Annotated[int, Field(description="Of its agent, as the guest socket's peer credentials have it.")]
    migration_id: Annotated[str | None, Field(description="Of the migration that has not ended and that it is part of.")]


BulkLimit = Annotated[
    int | None,
    Field(ge=1, le=BULK_LIMIT_MAX, description="Of bulk and precopy together; none: as fast as the path lets them."),
    WHOLE,
]


class LimitRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"bulk_limit_bytes_per_second": 50000000}]}
    )

    bulk_limit_bytes_per_second: BulkLimit


class MigrateRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"guest_id": "web", "destination": "127.0.0.1:7641"}]}
    )

    guest_id: Annotated[Name, Field(description="Of a guest that runs here as a whole.")]
    destination: Annotated[
        str,
        Field(
            max_length=300,
            json_schema_extra={"pattern": ADDRESS_PATTERN},
            description="HOST:PORT or [IPv6]:PORT of the destination daemon.",
        ),
        AfterValidator(_address),
    ]
    bulk: Annotated[bool, Field(description="False: pages cross only when the guest touches them.")] = True
    precopy: Annotated[
        Literal["auto", "off"] | Annotated[int, Field(ge=1, le=ROUNDS_MAX), WHOLE],
        Field(description="Rounds while the guest still runs here: as long as they shrink what is stale, none, or so many."),
    ] = "auto"
    max_rounds: Annotated[int, Field(ge=1, le=ROUNDS_MAX, description="Of `auto`."), WHOLE] = AUTO.rounds_max
    max_stale_bytes: Annotated[
        int,
        Field(ge=0, le=1 << 50, description="Of `auto`: written since they were sent, few enough to switch over."),
        WHOLE,
    ] = AUTO.stale_bytes_max
    deadline_seconds: Annotated[
        float | None,
        Field(gt=0, le=DEADLINE_SECONDS_MAX, strict=False, description="Of precopy: after so long no further round begins."),
    ] = None
    streams: Annotated[Streams, Field(description="Bulk connections, at most: the destination may take fewer."), WHOLE] = 1

    bulk_limit_bytes_per_second: BulkLimit = None

    def policy(self) -> PrecopyPolicy:
        rounds = {"auto": None, "off": 0}[self.precopy] if isinstance(self.precopy, str) else self.precopy
        return PrecopyPolicy(rounds, self.max_rounds, self.max_stale_bytes, self.deadline_seconds)


class ResolveRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"runs": "here"}]})

    runs: Annotated[
        Literal["here", "there"],
        Field(description="here: it is resumed here. there: what is here is let go of, pages still to be sent with it."),
    ]


class RecoverRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"destination": "127.0.0.1:7642"}]})

    destination: Annotated[
        Annotated[
            str,
            Field(
                max_length=300,
                json_schema_extra={"pattern": ADDRESS_PATTERN},
                description="HOST:PORT where it is reached now.",
            ),
            AfterValidator(_address),
        ]
        | None,
        Field(description="Null: where it was."),
    ] = None


class KindLatency(BaseModel):
    """From reading a fault to its resolution. A value of a bucket is in [low, 17/16 low); the first holds all below it too."""

    count: int
    sum_ns: int
    max_ns: int
    buckets: Annotated[
        list[tuple[int, int]],
        Field(description="(lower bound in ns, count) of each bucket that holds anything; 16 buckets to each power of two."),
    ]


class Latency(BaseModel):
    migration_id: str
    kinds: dict[FaultKind, KindLatency]


class Limits(BaseModel):
    ended_migrations_kept: int
    events_kept: int
    streams: int
    connections: int
    body_bytes: int


class TlsInfo(BaseModel):
    """TLS of migration connections: what is in use, which may be older than the files."""

    certificate_names: Annotated[list[str], Field(description="DNS names of this daemon's certificate.")]
    certificate_expires_at: AwareDatetime
    allowed_names: Annotated[list[str], Field(description="A peer's certificate needs one of these (`--tls-allow`).")]


class DaemonInfo(BaseModel):
    role: Annotated[Literal["source", "destination"], Field(description="As it was started; either gives guests away.")]
    version: str
    protocol: Annotated[str, Field(description="MAJOR.MINOR of the wire (proto/PROTOCOL.md).")]
    pid: int
    started_at: AwareDatetime
    uptime_seconds: float
    migration_address: Annotated[str | None, Field(description="Where sources connect; none if it takes no guest.")]
    metrics_address: str | None
    insecure: Annotated[bool, Field(description="Addresses beyond loopback are allowed without TLS too.")]
    tls: Annotated[TlsInfo | None, Field(description="Null: migrations go in the clear.")]
    stopping: bool
    guests: int
    migrations_active: int
    migrations_ended: Annotated[int, Field(description="Of those that are kept.")]
    limits: Limits


class Health(BaseModel):
    status: Literal["ready"]


# --- events of a stream: the `data` of each, one JSON object ---------------------------------------------------------

EndReason = Literal["settled", "daemon-ending", "for-seconds"]


class StateEvent(BaseModel):
    """`event: state`: a migration has reached a state."""

    at: AwareDatetime
    migration_id: str
    role: Role
    guest_id: str
    state: State


class SettledEvent(BaseModel):
    """`event: settled`: nothing more happens to the migration by itself; its last figures."""

    at: AwareDatetime
    migration: MigrationStatus


class ProgressEvent(BaseModel):
    """`event: progress`, without an id: a migration under way, some times a second while its figures change."""

    at: AwareDatetime
    migration: MigrationStatus


class GuestEvent(BaseModel):
    """`event: guest`: one has attached or gone."""

    at: AwareDatetime
    guest_id: str
    change: Literal["attached", "detached"]
    state: GuestState
    pid: int


class SnapshotEvent(BaseModel):
    """`event: snapshot`: what there is, before anything that follows; migrations that have settled are left out."""

    at: AwareDatetime
    guests: list[GuestInfo]
    migrations: list[MigrationStatus]


class MissedEvent(BaseModel):
    """`event: missed`: events that are no longer kept, or that another run of this daemon numbered."""

    at: AwareDatetime
    count: Annotated[int | None, Field(description="None: nobody can say.")]


class EndEvent(BaseModel):
    """`event: end`: the last one of the stream. `settled`: of one migration, to which nothing more will happen."""

    at: AwareDatetime
    reason: EndReason
