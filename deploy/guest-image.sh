#!/bin/sh
# The Linux test guest: `sh deploy/guest-image.sh kernel|initramfs DIRECTORY`, from the top of the clone. Nothing is installed.
#   kernel     vmlinuz and the virtio modules of Debian's cloud kernel, by this system's own apt: downloaded, unpacked
#   initramfs  a static /init (migrate/guests/linux/init.c) and those modules, as initramfs.cpio
set -eu
what=$1 directory=$2
compiler=${CC:-cc}
# In the order in which they need each other; what a kernel has built in is not there as a file.
modules="virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk"

fail() {
    echo "guest-image: $*" >&2
    exit 1
}

kernel() {
    [ "$(uname -m)" = x86_64 ] || fail "the guest is an x86-64 machine, this is $(uname -m)"
    command -v apt-get >/dev/null || fail "the kernel comes from Debian's archive, and this system has no apt-get"
    find_package() {
        apt-cache depends --important linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1
    }
    package=$(find_package)
    if [ -z "$package" ] && [ "$(id -u)" = 0 ]; then
        apt-get update
        package=$(find_package)
    fi
    [ -n "$package" ] || fail "apt knows no linux-image-cloud-amd64: run apt-get update, on Debian"
    rm -rf "$directory/kernel.new"
    mkdir -p "$directory/kernel.new/files" "$directory/kernel.new/modules"
    echo "guest-image: downloading $package"
    # As root apt drops its rights to download, and says so where the clone is closed to others; that user is not needed here.
    (cd "$directory/kernel.new" && apt-get download --quiet --option APT::Sandbox::User=root "$package")
    dpkg-deb --extract "$directory"/kernel.new/*.deb "$directory/kernel.new/files"
    number=10
    for module in $modules; do
        file=$(find "$directory/kernel.new/files" -name "$module.ko" -o -name "$module.ko.xz")
        case $file in
        *.xz) xz --decompress --stdout "$file" >"$directory/kernel.new/modules/$number-$module.ko" ;;
        ?*) cp "$file" "$directory/kernel.new/modules/$number-$module.ko" ;;
        esac
        number=$((number + 1))
    done
    rm -rf "$directory/modules"
    mv "$directory/kernel.new/modules" "$directory/modules"
    mv "$directory"/kernel.new/files/boot/vmlinuz-* "$directory/vmlinuz" # last: where it is, the modules are
    touch "$directory/vmlinuz"
    rm -rf "$directory/kernel.new"
}

initramfs() {
    command -v cpio >/dev/null || fail "no cpio (Debian: cpio)"
    rm -rf "$directory/root"
    mkdir -p "$directory/root"
    workload=migrate/guests/workload
    "$compiler" -static -std=gnu11 -D_GNU_SOURCE -O2 -Wall -Wextra -Wpedantic -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Werror \
        -pthread -Imigrate/dataplane -I$workload -o "$directory/root/init" migrate/guests/linux/*.c \
        $workload/*.c migrate/dataplane/histogram.c
    cp -R "$directory/modules" "$directory/root/modules"
    (cd "$directory/root" && find . | cpio --quiet --create --format=newc --owner=0:0) >"$directory/initramfs.new"
    mv "$directory/initramfs.new" "$directory/initramfs.cpio"
    rm -rf "$directory/root"
}

case $what in
kernel | initramfs) "$what" ;;
*) fail "kernel or initramfs, not $what" ;;
esac
