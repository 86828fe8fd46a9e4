"""``postcopy guest kvm``: run the KVM guest."""

from typing import Annotated

import typer

from migrate.cli import DaemonOption, GuestIdOption, memory_of, runtime_dir_of
from migrate.cli.guests import RatioOption


def register(_: typer.Typer, guest_app: typer.Typer) -> None:
    guest_app.command()(kvm)


def kvm(
    memory: Annotated[
        list[str], typer.Option(callback=memory_of, help="SIZE[:memfd|:tmpfs|:hugetlb]; repeat for several regions.")
    ],
    guest_id: GuestIdOption = "kvm",
    daemon: DaemonOption = "source",
    waiting: Annotated[
        bool, typer.Option("--waiting", help="Wait for a guest of this size and as many vCPUs to arrive.")
    ] = False,
    stay: Annotated[bool, typer.Option("--stay", help="After departing, wait for the next guest.")] = False,
    verify: Annotated[bool, typer.Option(help="Check all memory against the root once it is complete.")] = True,
    vcpus: Annotated[int, typer.Option(min=1, max=16)] = 2,
    write_ratio: RatioOption = 0.25,
    zero_ratio: RatioOption = 0.0,
    rate: Annotated[int, typer.Option(min=0, help="Steps a second of all vCPUs, about; 0: flat out.")] = 0,
    steps_a_beat: Annotated[int, typer.Option(min=1, max=32768, help="A heartbeat at least that often.")] = 32,
    seed: Annotated[int, typer.Option(min=0)] = 1,
) -> None:
    """A small machine on /dev/kvm whose program works on its memory and checks every page of it."""
    from migrate.daemon_paths import GUEST_SOCKET
    from migrate.guest.memory import MemorySpec
    from migrate.guests.kvm.guest import KvmOptions, run
    from migrate.guests.kvm.native import KvmConfig

    run(
        KvmOptions(
            guest_id=guest_id,
            socket_path=runtime_dir_of(daemon) / GUEST_SOCKET,
            memory=[MemorySpec.parse(text) for text in memory],
            vcpus=vcpus,
            waiting=waiting,
            stay=stay,
            verify=verify,
            config=KvmConfig(
                write_per_mille=round(write_ratio * 1000),
                zero_per_mille=round(zero_ratio * 1000),
                rate_per_second=rate,
                beat_steps=steps_a_beat,
                seed=seed,
            ),
        )
    )
