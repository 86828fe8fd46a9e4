"""The user's own QEMU command line: what of it cannot be moved, said before anything starts, and what is added to it.

Only what this file names is looked at; everything else is QEMU's. The same command line serves both sides.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from migrate.errors import PostcopyError

MEMORY_ID = "postcopy-ram"
MONITOR_ID = "postcopy-qmp"
DEFAULT_MEMORY_BYTES = 128 << 20
"""QEMU's own, for a command line without -m."""
_SUFFIX = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_FLAGS = frozenset({
    "alt-grab", "async-teardown", "ctrl-grab", "curses", "daemonize", "enable-fips", "enable-kvm", "full-screen", "h",
    "help", "mem-prealloc", "no-acpi", "no-fd-bootchk", "no-hpet", "no-quit", "no-reboot", "no-shutdown",
    "no-user-config", "nodefaults", "nographic", "old-param", "only-migratable", "portrait", "preconfig", "S",
    "semihosting", "singlestep", "snapshot", "usb", "version", "win2k-hack", "xen-attach", "xen-domid-restrict",
})  # fmt: skip
"""Options without a value (qemu-options.hx of 7.2 to 9); every other one takes the next word."""


class CommandLineError(PostcopyError):
    """``what`` names the option, ``remedy`` what to change."""

    code = "usage"

    def __init__(self, option: str, why: str, remedy: str) -> None:
        self.option, self.why, self.remedy = option, why, remedy
        super().__init__(f"{option} cannot be moved: {why}; {remedy}")


@dataclass(frozen=True, slots=True)
class Option:
    """``name`` without its hyphens; ``head`` is the value's first part when that is no ``key=value``, such as a device's name."""

    name: str
    value: str
    head: str
    keys: dict[str, str]

    @classmethod
    def of(cls, name: str, value: str) -> "Option":
        """QEMU's two ways to write one: ``head,key=value``, where ``head`` may be written with its own key, and JSON."""
        if value.startswith("{"):
            try:
                keys = {key: _text(one) for key, one in _flat(json.loads(value))}
            except ValueError as error:
                raise CommandLineError(f"-{name} {value}", f"it is no JSON ({error})", "see the manual of QEMU") from error
        else:
            parts = [part.replace(",,", ",") for part in re.split(r"(?<!,),(?!,)", value)]
            if "=" not in parts[0]:
                return cls(name, value, parts[0], dict(part.partition("=")[::2] for part in parts[1:]))
            keys = dict(part.partition("=")[::2] for part in parts)
        return cls(name, value, next((keys[key] for key in ("driver", "qom-type", "type") if key in keys), ""), keys)

    def __str__(self) -> str:
        return f"-{self.name} {self.value}".rstrip()

    def on(self, *names: str) -> bool:
        """One of these is set to true; `prealloc` alone means that too."""
        return any(self.keys.get(name, "off").lower() in ("on", "yes", "true", "y", "") for name in names)


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, one in value.items():
        yield from _flat(one, f"{prefix}.{key}" if prefix else str(key))


def _text(value: object) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def options_of(arguments: Sequence[str]) -> list[Option]:
    """Of everything behind the program's name; a word without a hyphen is a disk image, as for QEMU."""
    options: list[Option] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("-") or word == "-":
            options.append(Option("hda", word, word, {}))
            continue
        name = word[2:] if word.startswith("--") else word[1:]
        options.append(Option(name, "", "", {}) if name in _FLAGS else Option.of(name, next(words, "")))
    return options


# --- what cannot be moved -----------------------------------------------------------------------------------------------

_OURS = "leave it out: postcopy adds what is needed"
_BEHIND = "it reaches guest memory by a mapping of its own, which userfaultfd does not see"
_DISCARDS = "it punches holes into guest memory, which raises no event"


@dataclass(frozen=True, slots=True)
class Refusal:
    """An option (several names for one) that cannot be moved where ``when`` says so."""

    names: str
    why: str
    remedy: str
    when: Callable[[Option], bool] = lambda _: True


def _device(*patterns: str) -> Callable[[Option], bool]:
    return lambda option: any(re.fullmatch(pattern, option.head) for pattern in patterns)


def _backend(condition: Callable[[Option], bool]) -> Callable[[Option], bool]:
    return lambda option: option.head.startswith("memory-backend") and condition(option)


_PREALLOC_WHY = "every page would be touched before the guest has arrived, and QEMU hang on the first"
_MLOCK_WHY = "locking memory touches every page before the guest has arrived, and QEMU would hang on the first"
_OWN_BACKEND = "leave it out: postcopy adds the only memory backend (-m says its size, --memory-kind its pages)"

REFUSALS = (
    Refusal("mem-prealloc", _PREALLOC_WHY, "leave it out"),
    Refusal("object", _PREALLOC_WHY, "set prealloc=off, or better leave the backend out", _backend(lambda o: o.on("prealloc"))),
    Refusal(
        "object",
        "memory that is not shared can be filled by nobody but QEMU",
        _OWN_BACKEND,
        _backend(lambda o: not o.on("share") and o.head != "memory-backend-epc"),
    ),
    Refusal("object", "there is one memory backend, the daemon's", _OWN_BACKEND, _backend(lambda _: True)),
    Refusal("overcommit", _MLOCK_WHY, "set mem-lock=off", lambda o: o.on("mem-lock")),
    Refusal("realtime", _MLOCK_WHY, "set mlock=off", lambda o: o.on("mlock")),
    Refusal("mem-path", "there is one memory backend, the daemon's", "leave it out: --memory-kind hugetlb gives huge pages"),
    Refusal("machine M", "there is one memory backend, the daemon's", _OWN_BACKEND, lambda o: "memory-backend" in o.keys),
    Refusal(
        "machine M",
        "encrypted guest memory cannot be read here",
        "leave it out",
        lambda o: "confidential-guest-support" in o.keys or "memory-encryption" in o.keys,
    ),
    Refusal("m", "memory that is plugged in later has not been registered", "say the size alone", lambda o: "maxmem" in o.keys),
    Refusal("numa", "guest memory in several nodes is not handled", "leave it out"),
    Refusal("device", "a device of the host does not move, and its DMA cannot be seen", "leave it out", _device("vfio-.*")),
    Refusal("device", _BEHIND, "use the device of QEMU itself (virtio-…)", _device("vhost-user-.*", "ivshmem.*")),
    Refusal("device", _BEHIND, "use a device of QEMU itself", _device("vhost-vdpa.*", "vhost-scsi.*")),
    Refusal("device", _DISCARDS, "leave it out", _device("virtio-balloon.*", "virtio-mem.*")),
    Refusal(
        "device",
        "memory that is no part of -m has not been registered",
        "leave it out",
        _device("pc-dimm", "nvdimm", "virtio-pmem.*"),
    ),
    Refusal("netdev nic net", _BEHIND, "use a backend of QEMU itself (tap, user)", _device("vhost-user", "vhost-vdpa")),
    Refusal("balloon", _DISCARDS, "leave it out", lambda o: o.head != "none"),
    Refusal("virtfs fsdev", "QEMU does not migrate a mounted host directory", "leave it out"),
    Refusal("snapshot", "each side would have writes of its own to the disk", "leave it out"),
    Refusal("drive", "each side would have writes of its own to the disk", "set snapshot=off", lambda o: o.on("snapshot")),
    Refusal("incoming", "the agent feeds QEMU", f"{_OURS}; --waiting waits for a guest"),
    Refusal("S", "the agent starts the VM when it is attached", _OURS),
    Refusal("preconfig", "the agent starts the VM when it is attached", _OURS),
    Refusal("daemonize", "QEMU ends with its agent, which stays", "run postcopy itself in the background"),
    Refusal("loadvm", "what it restores is not what the other side starts with", "leave it out"),
    Refusal("readconfig", "what it says is not looked at", "write its options into the command line"),
    Refusal("xen-attach xen-domid", "Xen has the guest's memory", "use -accel kvm or -accel tcg"),
)


def refuse_what_cannot_move(options: Sequence[Option]) -> None:
    """Raises CommandLineError for the first that cannot."""
    for option in options:
        for refusal in REFUSALS:
            if option.name in refusal.names.split() and refusal.when(option):
                raise CommandLineError(str(option), refusal.why, refusal.remedy)


def direct_io(options: Sequence[Option]) -> bool:
    """A disk is read by DMA into pages that are pinned: what comes after a scan is not seen, so there is no precopy."""
    return any(
        option.name in ("drive", "blockdev")
        and (
            option.keys.get("cache") in ("none", "directsync")
            or option.keys.get("aio") == "native"
            or any(key.endswith("cache.direct") and option.on(key) for key in option.keys)
        )
        for option in options
    )


def uses_stdio(options: Sequence[Option]) -> bool:
    """Then standard output is the VM's, and what the agent tells goes to standard error."""
    named = any(
        option.name in ("serial", "monitor", "chardev", "qmp", "debugcon") and "stdio" in option.value for option in options
    )
    return named or any(option.name in ("nographic", "curses") for option in options)


def memory_bytes(options: Sequence[Option]) -> int:
    """What -m says; without a suffix in MiB, as QEMU has it."""
    for option in reversed(options):
        if option.name == "m":
            text = option.keys.get("size", option.head)
            match = re.fullmatch(r"(\d+)([bkmgt]?)", text.lower())
            if match is None or int(match[1]) == 0:
                raise CommandLineError(str(option), "its size is not understood", "write a whole number, such as -m 512 or -m 2G")
            return int(match[1]) * _SUFFIX[match[2] or "m"]
    return DEFAULT_MEMORY_BYTES


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A command line that can be moved."""

    words: tuple[str, ...]
    memory_bytes: int
    direct_io: bool
    uses_stdio: bool

    @classmethod
    def parse(cls, words: Sequence[str]) -> "CommandLine":
        """Raises CommandLineError."""
        options = options_of(words[1:])
        refuse_what_cannot_move(options)
        return cls(tuple(words), memory_bytes(options), direct_io(options), uses_stdio(options))

    def completed(self, memory_fd: int, monitor_fd: int, *, waiting: bool) -> list[str]:
        """With the memory backend, the monitor, and the VM stopped until the agent starts it."""
        backend = f"memory-backend-file,id={MEMORY_ID},size={self.memory_bytes},share=on,prealloc=off"
        return [
            *self.words,
            *("-object", f"{backend},mem-path=/proc/self/fd/{memory_fd}", "-machine", f"memory-backend={MEMORY_ID}"),
            *("-chardev", f"socket,id={MONITOR_ID},fd={monitor_fd}", "-mon", f"chardev={MONITOR_ID},mode=control"),
            "-only-migratable",
            "-S",
            *(("-incoming", "defer") if waiting else ()),
        ]
