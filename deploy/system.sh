#!/bin/sh
# What building and testing need from the system: `PYTHON=python3 sh deploy/system.sh`. Looks first, and only where something
# is missing calls apt-get (as root, saying so) or names the packages and the command (otherwise).
set -eu
python=${PYTHON:-python3}
compiler=${CC:-cc}
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # ip is there, and an ordinary user's PATH often is not
packages=

lacks() { # WHAT PACKAGE...
    echo "missing: $1" >&2
    shift
    packages="$packages $*"
}

fail() {
    echo "make system: $*" >&2
    exit 1
}

if ! command -v "$python" >/dev/null; then
    lacks "$python" python3 python3-dev python3-venv
else
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$python is $("$python" -V 2>&1), and postcopy needs Python 3.11 or later: make PYTHON=/path/to/python3.11"
    # python3.12 of a distribution whose python3 is 3.11 has packages of its own name.
    base=$("$python" -c 'import os, sys; print(os.path.realpath(sys._base_executable))')
    name=python3
    [ "$base" = "$(readlink -f /usr/bin/python3 || true)" ] || name=${base##*/}
    header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
    if [ ! -e "$header" ]; then
        case $base in
        /usr/bin/*) lacks "$header" "$name-dev" ;;
        *) fail "$python has no $header: install it with its headers, or choose another: make PYTHON=/usr/bin/python3" ;;
        esac
    fi
    if ! "$python" -c 'import venv; from ensurepip import bootstrap' 2>/dev/null; then
        case $base in
        /usr/bin/*) lacks "venv and ensurepip of $python" "$name-venv" ;;
        *) fail "$python has no venv or no ensurepip; choose another: make PYTHON=/usr/bin/python3" ;;
        esac
    fi
fi

# The headers of libc and of the kernel's interface come by their own packages, which gcc only recommends.
printf '#include <pthread.h>\n#include <linux/userfaultfd.h>\nint main(void) { return 0; }\n' |
    "$compiler" -x c -o /dev/null - 2>/dev/null || lacks "a C compiler with its headers ($compiler)" gcc libc6-dev
printf '#include <openssl/ssl.h>\n#if OPENSSL_VERSION_MAJOR < 3\n#error\n#endif\n' | "$compiler" -x c -E -o /dev/null - 2>/dev/null ||
    lacks "the headers of OpenSSL 3.0 or later" libssl-dev
command -v pkg-config >/dev/null || lacks "pkg-config" pkg-config
command -v openssl >/dev/null || lacks "openssl (the tests make their certificates with it)" openssl
command -v ip >/dev/null || lacks "ip" iproute2
for tool in unshare setpriv setarch; do
    command -v "$tool" >/dev/null || { lacks "$tool" util-linux; break; }
done
command -v systemd-analyze >/dev/null || lacks "systemd-analyze (the tests try the units with it)" systemd
for tool in prometheus promtool; do
    command -v "$tool" >/dev/null || { lacks "$tool" prometheus; break; }
done
# Coverage-guided fuzzing (make fuzz) alone needs another compiler.
if [ -n "${FUZZ:-}" ]; then
    printf 'int LLVMFuzzerTestOneInput(const char *d, long n) { (void)d; return n < 0; }\n' |
        clang -fsanitize=fuzzer,address -x c -o /dev/null - 2>/dev/null || lacks "clang with libFuzzer" clang 'libclang-rt-14-dev'
fi
# The Linux test guest is an x86-64 machine (make guest-image).
if [ "$(uname -m)" = x86_64 ]; then
    command -v qemu-system-x86_64 >/dev/null || lacks "qemu-system-x86_64" qemu-system-x86
    command -v cpio >/dev/null || lacks "cpio" cpio
fi

[ -n "$packages" ] || exit 0
[ -z "${POSTCOPY_SYSTEM_INSTALLED-}" ] || fail "still missing after the installation; see above"
install="apt-get install --yes --no-install-recommends$packages"
command -v apt-get >/dev/null || fail "install by this system's own means what Debian calls:$packages"
[ "$(id -u)" = 0 ] || fail "this needs root; as root, run:  apt-get update && $install"
echo "make system: installing as root:$packages"
export DEBIAN_FRONTEND=noninteractive
apt-get update
# shellcheck disable=SC2086 # a list of words
$install
case $packages in
*prometheus*) # only its programs are wanted: Debian also starts a server on port 9090, now and at every boot
    { update-rc.d prometheus disable && service prometheus stop; } ||
        echo "make system: the package prometheus may have left its server running; see: systemctl status prometheus" >&2
    ;;
esac
POSTCOPY_SYSTEM_INSTALLED=yes exec sh "$0" # is it all there now, and is this Python young enough?
