"""What of a QEMU command line makes the Linux test guest: its image, its parameters, its devices."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from migrate.errors import HostLacksError

IMAGE_DIRECTORY = Path("build/guest")
"""Where ``make guest-image`` puts it, in the clone; POSTCOPY_GUEST_IMAGE names another folder."""
PAGE_BYTES = 4096
DEBUGCON_PORT = 0xE9
CLOCK = "clocksource=tsc tsc=reliable"
"""Touches are timed in user mode, without a device that QEMU would have to be asked for: init.c says why."""

TIMER = "no_timer_check"
"""The kernel waits some milliseconds for the timer's interrupt, and panics where a busy host kept QEMU from giving it."""


@dataclass(frozen=True, slots=True)
class GuestImage:
    kernel: Path
    initramfs: Path

    @classmethod
    def find(cls, directory: Path | None = None) -> Self:
        """Raises HostLacksError."""
        directory = directory or Path(os.environ.get("POSTCOPY_GUEST_IMAGE", IMAGE_DIRECTORY)).absolute()
        image = cls(directory / "vmlinuz", directory / "initramfs.cpio")
        for path in (image.kernel, image.initramfs):
            if not path.exists():
                raise HostLacksError("linux-guest", f"no {path}", "make guest-image, in the clone, on Debian for x86-64")
        return image


@dataclass(frozen=True, slots=True)
class LinuxGuest:
    """Defaults are init.c's too, but for the memory of the whole machine."""

    memory_mib: int = 64
    """The area that is worked on, with the tables of what its pages must hold: one page of them to 512 others."""
    machine_mib: int = 192
    vcpus: int = 2
    """Where there are several, the last one has the heartbeats and the disk, the others the touching threads."""
    threads: int = 1
    pattern: str = "random"
    """sequential, random, zipf, chase or permute: of the built-in workload."""
    write_percent: int = 25
    """Of the steps that also write their page."""
    rate: int = 0
    """Steps a second of all threads; 0: flat out."""
    seed: int = 1
    report_ms: int = 200
    verify_ms: int = 0
    """Every so often all memory is checked against the workload's root; 0: only what is touched."""
    corrupt: int = 0
    """This page's middle byte is flipped behind the checker's back; 0: none. (Page 0 is one of the tables.)"""
    corrupt_ms: int = 0
    """So long after the beginning."""

    def kernel_command_line(self, *, disk: bool = False) -> str:
        names = [field.name for field in fields(self) if field.name not in ("machine_mib", "vcpus")]
        parameters = [f"postcopy.{name}={getattr(self, name)}" for name in names] + ["postcopy.disk=/dev/vda"] * disk
        return " ".join([f"console=ttyS0 quiet panic=-1 {TIMER} {CLOCK}", *parameters])

    def arguments(self, image: GuestImage, debugcon: Path, *, serial: Path | None = None, disk: Path | None = None) -> list[str]:
        """All but ``-machine``, ``-object`` for its memory, and QMP, which are the mover's.

        ``debugcon``: unix socket that somebody listens on (debugcon.py). ``disk``: raw image, its content will be lost; both ends
        of a migration may have it open.
        """
        arguments = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        arguments += ["-m", f"{self.machine_mib}M", "-smp", str(self.vcpus)]
        arguments += ["-kernel", str(image.kernel), "-initrd", str(image.initramfs)]
        arguments += ["-append", self.kernel_command_line(disk=disk is not None)]
        arguments += ["-chardev", f"socket,id=debugcon,path={_escaped(debugcon)}"]
        arguments += ["-device", f"isa-debugcon,iobase={DEBUGCON_PORT:#x},chardev=debugcon"]
        if disk is not None:
            arguments += ["-drive", f"file={_escaped(disk)},file.locking=off,format=raw,if=none,id=disk"]
            arguments += ["-device", "virtio-blk-pci,drive=disk"]
        return [*arguments, "-serial", f"file:{serial}" if serial is not None else "null"]


def _escaped(path: Path) -> str:
    """In QEMU's option lists a comma is written twice."""
    return str(path).replace(",", ",,")
