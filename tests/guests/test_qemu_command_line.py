"""What of a QEMU command line cannot be moved is refused before anything starts, with the option, the reason and the remedy."""

import subprocess
from pathlib import Path

import pytest

from migrate.cli import EXIT_CODES
from migrate.guests.qemu.command_line import REFUSALS, CommandLine, CommandLineError, options_of
from migrate.pair import COMMAND

QEMU = "qemu-system-x86_64"
REFUSED = {
    "-mem-prealloc": "every page would be touched",
    "-object memory-backend-ram,id=m,size=1G,prealloc=on": "every page would be touched",
    "-object memory-backend-file,id=m,size=1G,mem-path=/dev/shm/m,share=on,prealloc": "every page would be touched",
    '-object {"qom-type":"memory-backend-ram","id":"m","size":1,"prealloc":true}': "every page would be touched",
    "-object memory-backend-ram,id=m,size=1G": "not shared",
    "--object memory-backend-file,id=m,size=1G,mem-path=/m": "not shared",
    "-object memory-backend-memfd,id=m,size=1G,share=on": "one memory backend",
    "-overcommit mem-lock=on": "locking memory",
    "-realtime mlock=on": "locking memory",
    "-mem-path /dev/hugepages": "one memory backend",
    "-machine q35,memory-backend=m": "one memory backend",
    "-M memory-backend=m": "one memory backend",
    "-machine q35,confidential-guest-support=sev0": "encrypted",
    "-m 1G,slots=2,maxmem=4G": "plugged in later",
    "-numa node,memdev=m": "several nodes",
    "-device vfio-pci,host=01:00.0": "its DMA cannot be seen",
    '-device {"driver":"vfio-pci","host":"01:00.0"}': "its DMA cannot be seen",
    "-device driver=vfio-pci,host=01:00.0": "its DMA cannot be seen",
    "-device vhost-user-blk-pci,chardev=c": "mapping of its own",
    "-device ivshmem-plain,memdev=m": "mapping of its own",
    "-device vhost-vdpa-device-pci,vhostdev=/dev/vhost-vdpa-0": "mapping of its own",
    "-device virtio-balloon-pci": "punches holes",
    "-device virtio-mem-pci,memdev=m": "punches holes",
    "-device pc-dimm,memdev=m": "no part of -m",
    "-device nvdimm,memdev=m": "no part of -m",
    "-netdev vhost-user,id=n,chardev=c": "mapping of its own",
    "-netdev type=vhost-vdpa,id=n": "mapping of its own",
    "-nic vhost-user": "mapping of its own",
    "-balloon virtio": "punches holes",
    "-virtfs local,path=/srv,mount_tag=srv,security_model=none": "mounted host directory",
    "-snapshot": "writes of its own",
    "-drive file=disk.img,snapshot=on": "writes of its own",
    "-incoming defer": "the agent feeds QEMU",
    "-S": "the agent starts the VM",
    "-preconfig": "the agent starts the VM",
    "-daemonize": "ends with its agent",
    "-loadvm before": "not what the other side",
    "-readconfig vm.cfg": "not looked at",
    "-xen-attach": "Xen has",
    "-m much": "not understood",
    "-device {broken": "no JSON",
}
ACCEPTED = (
    "",
    "disk.img",
    "-M q35,accel=kvm -cpu host -smp 4 -m 2G -drive file=disk.qcow2,if=virtio -nic user,model=virtio",
    "-machine type=q35 -overcommit mem-lock=off -object rng-random,id=r,filename=/dev/urandom -device virtio-rng-pci,rng=r",
    "-netdev tap,id=n,vhost=on -device virtio-net-pci,netdev=n -nographic -append console=ttyS0",
    "-object iothread,id=t -drive file=a,,b.img,snapshot=off,if=none,id=d -device virtio-blk-pci,drive=d,iothread=t",
    "-snapshot-of-nothing x -no-reboot -S-is-no-option x",
)


def words(text: str) -> list[str]:
    return [QEMU, *text.split()]


@pytest.mark.parametrize("text", REFUSED)
def test_refused_with_the_option_the_reason_and_the_remedy(text: str) -> None:
    with pytest.raises(CommandLineError) as refusal:
        CommandLine.parse(words(f"-nodefaults {text} -no-reboot"))
    assert refusal.value.option.lstrip("-").split()[0] == text.lstrip("-").split()[0]
    assert REFUSED[text] in refusal.value.why
    assert refusal.value.remedy
    assert refusal.value.code == "usage"


def test_every_refusal_has_its_row() -> None:
    first = {}
    for text in REFUSED:
        for option in options_of(text.split()) if "broken" not in text else ():
            for index, refusal in enumerate(REFUSALS):
                if option.name in refusal.names.split() and refusal.when(option):
                    first.setdefault(index, text)
                    break
    assert sorted(first) == list(range(len(REFUSALS)))


@pytest.mark.parametrize("text", ACCEPTED)
def test_the_rest_is_left_as_it_is(text: str) -> None:
    line = CommandLine.parse(words(text))
    assert line.completed(7, 8, waiting=False)[: len(words(text))] == words(text)


def test_what_is_added() -> None:
    running = CommandLine.parse(words("-m 1G")).completed(7, 8, waiting=False)[3:]
    assert running == [
        *("-object", "memory-backend-file,id=postcopy-ram,size=1073741824,share=on,prealloc=off,mem-path=/proc/self/fd/7"),
        *("-machine", "memory-backend=postcopy-ram"),
        *("-chardev", "socket,id=postcopy-qmp,fd=8", "-mon", "chardev=postcopy-qmp,mode=control"),
        *("-only-migratable", "-S"),
    ]
    waiting = CommandLine.parse(words("-m 1G")).completed(7, 8, waiting=True)[3:]
    assert waiting == [*running, "-incoming", "defer"]


@pytest.mark.parametrize(
    ("text", "mebibytes"),
    [("", 128), ("-m 512", 512), ("-m 2G", 2048), ("-m size=3g", 3072), ("-m 256M -m 1T", 1 << 20), ("--m 65536k", 64)],
)
def test_size_of_memory(text: str, mebibytes: int) -> None:
    assert CommandLine.parse(words(text)).memory_bytes == mebibytes << 20


@pytest.mark.parametrize(
    ("text", "direct"),
    [
        ("-drive file=d,cache=none", True),
        ("-drive file=d,cache=directsync", True),
        ("-drive file=d,cache.direct=on", True),
        ("-drive file=d,file.cache.direct=on", True),
        ("-drive file=d,aio=native,cache.direct=on", True),
        ("-blockdev driver=file,filename=d,node-name=n,cache.direct=on", True),
        ('-blockdev {"driver":"file","filename":"d","node-name":"n","cache":{"direct":true}}', True),
        ('-blockdev {"driver":"file","filename":"d","node-name":"n","cache":{"direct":false}}', False),
        ("-drive file=d,cache=writeback", False),
        ("-drive file=d,cache.direct=off", False),
        ("-hda d", False),
    ],
)
def test_disks_that_are_read_by_dma(text: str, direct: bool) -> None:
    assert CommandLine.parse(words(text)).direct_io is direct


@pytest.mark.parametrize(
    ("text", "uses"),
    [("-nographic", True), ("-serial mon:stdio", True), ("-chardev stdio,id=c", True), ("-display none -serial null", False)],
)
def test_standard_output_that_is_the_machines(text: str, uses: bool) -> None:
    assert CommandLine.parse(words(text)).uses_stdio is uses


def test_refused_before_anything_is_started(tmp_path: Path) -> None:
    """By the command itself: one line, the status of wrong usage, and no QEMU was run."""
    program = tmp_path / QEMU
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    command = [*COMMAND, "guest", "qemu", "--daemon", str(tmp_path), "--", str(program), "-m", "1G", "-device", "virtio-balloon"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (EXIT_CODES["usage"], "")
    why = "it punches holes into guest memory, which raises no event"
    assert done.stderr == f"postcopy: -device virtio-balloon cannot be moved: {why}; leave it out\n"
    assert list(tmp_path.iterdir()) == [program]
