"""A Linux machine under QEMU as a guest that proves itself: Debian's cloud kernel and an /init of the project's own (init.c).

``make guest-image`` builds it. It is what tests and benchmark move; it needs no disk, no network and no distribution inside.
"""
