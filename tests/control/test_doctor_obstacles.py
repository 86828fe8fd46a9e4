"""`postcopy doctor` with something in the way: it names it, and what it says to change is what helps."""

import errno
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.errors import HostLacksError
from migrate.host.cgroup import top
from migrate.host.guests import SHMEM_ENABLED
from migrate.host.hugepages import POOL_2M
from migrate.host.report import Finding
from migrate.host.rights import misc_minor
from migrate.host.suite import CGROUP_LIMITS
from migrate.host.transport import allowed, available
from migrate.pair import COMMAND

from .obstacles import OWN_DEV, covered, doctors, in_namespace, nobodys_doctors

pytestmark = pytest.mark.requires("uffd", "root")
NO_DEVICE = f"{OWN_DEV}rm /dev/userfaultfd\n"
MINOR = misc_minor("userfaultfd")
ADMIT = "chgrp nogroup /dev/userfaultfd && chmod 0660 /dev/userfaultfd"
MAKE = f"mknod -m 0660 /dev/userfaultfd c 10 {MINOR} && chgrp nogroup /dev/userfaultfd"
REMOUNT = "mount -o remount,bind,dev /dev/userfaultfd"
ON_NODEV = f"""
mkdir /dev/elsewhere
mount -t tmpfs -o nodev,mode=0755 none /dev/elsewhere
mknod -m 0666 /dev/elsewhere/userfaultfd c 10 {MINOR}
mount --bind /dev/elsewhere/userfaultfd /dev/userfaultfd
"""


def command(told: Finding) -> str:
    """Of the remedy, without what it is called elsewhere: `ulimit -n 4096 (systemd: …)`."""
    return told.remedy.partition(" (")[0]


@pytest.fixture(scope="module")
def refuse_userfaultfd(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("seccomp") / "refuse-userfaultfd"
    source = repository / "tests" / "control" / "refuse_userfaultfd.c"
    subprocess.run(["cc", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True, timeout=30)
    return program


# ---- userfaultfd for kernel-mode faults: three ways to have it, all missing for nobody ----


@pytest.mark.requires("uffd-restricted", "uffd-kernel")
def test_nobody_lacks_every_right_and_each_is_named() -> None:
    before, after = nobodys_doctors("chmod 0000 /dev/userfaultfd", ADMIT)
    assert before.status == 0
    assert before["uffd"].verdict == "yes"
    told = before["uffd-kernel"]
    assert told.verdict == "no"
    named = (
        "/dev/userfaultfd: EACCES (Permission denied), the node is root:root 0000 and this is nobody:nogroup",
        "userfaultfd(2): EPERM (Operation not permitted), vm.unprivileged_userfaultfd is 0",
        "CAP_SYS_PTRACE is missing, in the bounding set too",
        "no_new_privs keeps it from being gained",
        "no seccomp filter",
    )
    assert [words for words in named if words not in told.reason] == []
    assert told.remedy == ADMIT
    assert after["uffd-kernel"].verdict == "yes"
    assert before["kvm"].verdict == "no"
    assert "the node is root:root 0600 and this is nobody:nogroup" in before["kvm"].reason
    user = before.report.facts.user
    assert (user.name, user.no_new_privs, int(user.capabilities_bounding, 16)) == ("nobody", True, 0)


@pytest.mark.requires("uffd-restricted", "uffd-kernel")
@pytest.mark.parametrize(
    ("obstacle", "why", "remedy"),
    [
        pytest.param(
            "rm /dev/userfaultfd",
            f"ENOENT (No such file or directory), though this kernel has the device ({MINOR} in /proc/misc)",
            MAKE,
            id="absent",
        ),
        pytest.param(
            "rm /dev/userfaultfd; mknod -m 0666 /dev/userfaultfd c 1 3",
            "ENOTTY (Inappropriate ioctl for device), the node is not this kernel's device of that name",
            f"rm /dev/userfaultfd; {MAKE}",
            id="another-device",
        ),
        pytest.param(ON_NODEV, "EACCES (Permission denied), /dev/userfaultfd is mounted nodev", REMOUNT, id="nodev"),
    ],
)
def test_device_and_the_one_change_that_helps(obstacle: str, why: str, remedy: str) -> None:
    before, after = nobodys_doctors(obstacle, remedy)
    assert before["uffd-kernel"].verdict == "no"
    assert f"/dev/userfaultfd: {why}" in before["uffd-kernel"].reason
    assert command(before["uffd-kernel"]) == remedy
    assert before["uffd"].verdict == "yes"
    assert after["uffd-kernel"].verdict == "yes"
    assert after["uffd-kernel"].remedy == ""


@pytest.mark.requires("uffd-restricted")
def test_group_of_the_node_is_the_way_where_it_has_one() -> None:
    [told] = nobodys_doctors("chgrp games /dev/userfaultfd; chmod 0660 /dev/userfaultfd")
    assert "the node is root:games 0660" in told["uffd-kernel"].reason
    assert told["uffd-kernel"].remedy == "usermod -aG games nobody, and log in again"


@pytest.mark.requires("uffd-restricted")
def test_root_without_the_capability() -> None:
    """As in a container whose root has a short list of capabilities."""
    [told] = doctors(NO_DEVICE, wrapped_in=("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-all"))
    assert told.status == 0
    assert told["uffd"].verdict == "yes"
    assert told["uffd-kernel"].verdict == "no"
    assert "CAP_SYS_PTRACE is missing, in the bounding set too" in told["uffd-kernel"].reason
    assert "no_new_privs" not in told["uffd-kernel"].reason
    assert command(told["uffd-kernel"]) == f"mknod -m 0600 /dev/userfaultfd c 10 {MINOR}"


# ---- nothing works ----


@pytest.mark.parametrize(
    ("error_number", "words"),
    [
        (
            errno.EPERM,
            "EPERM (Operation not permitted), though everyone may have user-mode faults: the seccomp filter refuses it",
        ),
        (errno.ENOSYS, "ENOSYS (Function not implemented), though this kernel has the call: the seccomp filter answers so"),
    ],
    ids=["EPERM", "ENOSYS"],
)
def test_seccomp_is_told_from_missing_rights(refuse_userfaultfd: Path, error_number: int, words: str) -> None:
    [told] = doctors(NO_DEVICE, wrapped_in=(str(refuse_userfaultfd), str(error_number)))
    assert told.status == 5
    assert not told.report.works
    assert told["uffd"].verdict == "no"
    assert f"userfaultfd(2): {words}" in told["uffd"].reason
    assert "/dev/userfaultfd: ENOENT" in told["uffd"].reason
    assert told["uffd"].remedy.startswith("allow the system call userfaultfd in the seccomp profile")
    assert told["uffd-kernel"].remedy == told["uffd"].remedy


def test_seccomp_that_kills_does_not_kill_the_doctor(refuse_userfaultfd: Path) -> None:
    """The answer of systemd's SystemCallFilter= unless it is told another."""
    [told] = doctors(NO_DEVICE, wrapped_in=(str(refuse_userfaultfd), "0"))
    assert told.status == 5
    for name in ("uffd", "uffd-kernel", "dirty-tracking", "poison", "move"):
        assert told[name].verdict == "no"
        assert told[name].reason == "userfaultfd(2): killed by SIGSYS, a seccomp filter kills processes that ask for one"
        assert told[name].remedy.startswith("allow the system call userfaultfd in the seccomp profile")


def test_guest_doctor_and_suite_say_the_same(refuse_userfaultfd: Path) -> None:
    """The guest's error, the doctor's row, and why a test would be deselected."""
    guest = [*COMMAND, "guest", "workload", "--memory", "1M", "--waiting"]
    asked = [*COMMAND[:2], "-c", "from migrate import host; print(host.feature('uffd'))"]
    refused = [str(refuse_userfaultfd), str(errno.EPERM)]
    script = f"""{NO_DEVICE}
        {shlex.join([*refused, *asked])}
        status=0; {shlex.join([*refused, *guest])} 2>&1 || status=$?
        echo $status
        {shlex.join([*refused, *COMMAND, "doctor"])} || echo $?
        """
    suite, guest_error, guest_status, *doctor, verdict, doctor_status = in_namespace(script).splitlines()
    why, _, remedy = suite.removeprefix("uffd: no, ").rpartition("; allow the system call ")
    remedy = f"allow the system call {remedy}"
    assert guest_error == f"postcopy: {HostLacksError('userfaultfd', why, remedy)}"
    assert guest_status == doctor_status == "5"
    assert verdict == "No guest can be moved from here or to here."
    assert f"    {remedy}" in doctor
    column = next(line.index("no ") for line in doctor if line.startswith("  process guests")) + len("limited  ")
    assert why.replace(" ", "") in "".join(line[column:].strip() for line in doctor).replace(" ", "")


# ---- memory, descriptors, time ----


@pytest.mark.requires("hugetlb")
def test_nobody_in_a_narrow_place() -> None:
    """Everything that is short at once: each row says its own."""
    pool = f"""
        mount -t tmpfs none {POOL_2M}
        for name in nr free resv surplus nr_overcommit; do echo 0 >{POOL_2M}/${{name}}_hugepages; done
        """
    steps = f"{pool}{covered(SHMEM_ENABLED, '[always] within_size never')}mount -o remount,size=64m /dev/shm\n"
    [told] = nobodys_doctors(steps, limits=("prlimit", "--nofile=256:512", "--memlock=0:0"))
    assert told.status == 0
    pages = told["hugetlb-2m"]
    assert (pages.verdict, pages.remedy) == ("no", "sysctl vm.nr_hugepages=512")
    assert pages.reason == "pages of 2 MiB: 512 needed, 0 free (0 in the pool, 0 reserved), as for a guest of 1 GiB"
    shared = told["shared-memory"]
    assert shared.verdict == "limited"
    assert "of 64 MiB are free in /dev/shm" in shared.reason
    assert shared.remedy == "mount -o remount,size=50% /dev/shm (docker: --shm-size)"
    files = told["open-files"]
    assert (files.verdict, files.remedy) == ("limited", "ulimit -n 4096 (systemd: LimitNOFILE=4096)")
    assert files.reason == "256 open files (hard limit 512): a daemon moves 14 guests at once"
    locked = told["memory-locking"]
    assert (locked.verdict, locked.remedy) == ("limited", "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity)")
    grains = told["page-granularity"]
    assert (grains.verdict, grains.remedy) == ("limited", f"echo advise > {SHMEM_ENABLED}")
    # A setting for the whole machine, read-only in other network namespaces: what it is here is what is compared with.
    refused = [name for name in available() if name not in allowed()]
    control = told["congestion-control"]
    assert control.verdict == ("limited" if refused else "yes")
    assert control.reason.endswith(f", not {', '.join(refused)} (no CAP_NET_ADMIN)" if refused else ", ".join(available()))
    facts = told.report.facts
    assert (facts.limits.open_files_soft, facts.limits.open_files_hard, facts.limits.locked_bytes) == (256, 512, 0)
    assert facts.memory.shmem_huge_pages == "always"


@pytest.mark.requires("kvm")
def test_kvm_and_the_one_change_that_helps() -> None:
    remedy = f"mknod -m 0600 /dev/kvm c 10 {misc_minor('kvm')}"
    before, after = doctors(f"{OWN_DEV}rm /dev/kvm", remedy)
    assert before["kvm"].verdict == "no"
    assert "/dev/kvm: ENOENT (No such file or directory), though this kernel has the device" in before["kvm"].reason
    assert command(before["kvm"]) == remedy
    assert before["uffd-kernel"].verdict == "yes"
    assert after["kvm"].verdict == "yes"


@pytest.mark.requires("netns", "timens")
def test_congestion_control_and_clock_of_a_namespace() -> None:
    namespaces = ("--net", "--time", "--fork", "--monotonic", "60")
    [told] = doctors("echo reno >/proc/sys/net/ipv4/tcp_congestion_control", namespaces=namespaces)
    assert told["congestion-control"].reason.startswith("reno unless told otherwise; ")
    assert told.report.facts.network.congestion_control_default == "reno"
    assert told["clock"].verdict == "limited"
    assert "this time namespace shifts monotonic by 60 s: a guest and its daemon must share it" in told["clock"].reason


@pytest.fixture
def cgroups() -> Iterator[dict[str, Path]]:
    """By file, a new cgroup that has it: one in each hierarchy, or the same one (version 2)."""
    made: dict[Path, Path] = {}
    files: dict[str, Path] = {}
    try:
        for controller, names in CGROUP_LIMITS.items():
            place = top(controller)
            assert place is not None
            if place not in made:
                made[place] = Path(tempfile.mkdtemp(prefix="postcopy-test-", dir=place))
            files |= {name: made[place] / name for name in names if (made[place] / name).exists()}
        yield files
    finally:
        for directory in made.values():
            directory.rmdir()


@pytest.mark.requires("cgroup")
def test_limits_of_cgroups_name_their_files(cgroups: dict[str, Path]) -> None:
    set_to = {
        "memory": {"memory.max": f"{512 << 20}", "memory.limit_in_bytes": f"{512 << 20}"},
        "processors": {"cpu.max": "50000 100000", "cpu.cfs_quota_us": "50000"},
        "threads": {"pids.max": "60"},
    }
    lifted_by = {"memory.limit_in_bytes": "-1", "cpu.cfs_quota_us": "-1"}
    limiting = {row: next(path for name, path in cgroups.items() if name in values) for row, values in set_to.items()}
    narrow = [f"echo {set_to[row][path.name]} > {path}" for row, path in limiting.items()]
    join = [f"echo $$ > {directory}/cgroup.procs" for directory in {path.parent for path in limiting.values()}]
    lift = {row: f"echo {lifted_by.get(path.name, 'max')} > {path}" for row, path in limiting.items()}
    before, after = doctors("\n".join(narrow + join), "\n".join(lift.values()))
    for row, path in limiting.items():
        assert before[row].verdict == "limited"
        assert before[row].reason.startswith(f"{path} {'allows 0.5 CPUs' if row == 'processors' else 'leaves '}")
        assert before[row].remedy == lift[row]
        assert after[row].verdict == "yes"
    told = {one.kind: (one.path, one.value) for one in before.report.facts.limits.cgroup}
    assert told == {
        "memory": (str(limiting["memory"]), 512 << 20),
        "processes": (str(limiting["threads"]), 60),
        "cpus": (str(limiting["processors"]), 0.5),
    }


@pytest.mark.requires("root")
def test_place_without_proc() -> None:
    said = in_namespace(
        f"mount -t tmpfs none /proc\nstatus=0\n{shlex.join([*COMMAND, 'doctor'])} 2>&1 || status=$?\necho $status"
    )
    assert said == "postcopy: /proc is not available here: no procfs is mounted there; mount -t proc proc /proc\n5\n"


@pytest.mark.requires("root", "uffd")
def test_read_only_place() -> None:
    """Where nothing can be written, temporary files neither: the way to the sockets is still the same for all."""
    [told] = doctors("mount -t tmpfs -o ro none /tmp\nunset TMPDIR XDG_RUNTIME_DIR POSTCOPY_RUNTIME_DIR\n")
    assert (told.status, told["runtime-directory"].verdict) == (0, "no")
    assert told["runtime-directory"].reason.startswith("/tmp/postcopy-0")
