"""One plain TCP connection, flat out: ``receive ADDRESS`` and ``send ADDRESS PORT CONGESTION_CONTROL SECONDS``.

A program of its own: either end runs in a network namespace of its own (shaped_link.py), and nothing imports it.
"""

import socket
import sys
import time

PIECE_BYTES = 1 << 20
ACCEPT_SECONDS = 20.0


def receive(address: str) -> None:
    """Says its port, then at how many bytes a second one connection came, from its first byte on."""
    with socket.create_server((address, 0)) as listener:
        listener.settimeout(ACCEPT_SECONDS)
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
    buffer = bytearray(PIECE_BYTES)
    connection.recv_into(buffer)
    began = time.monotonic()
    received_bytes = 0
    while got_bytes := connection.recv_into(buffer):
        received_bytes += got_bytes
    print(received_bytes / (time.monotonic() - began))


def send(address: str, port: int, congestion_control: str, seconds: float) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion_control.encode())
        sock.connect((address, port))
        piece = bytes(PIECE_BYTES)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            sock.sendall(piece)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(sys.argv[2])
    else:
        send(sys.argv[2], int(sys.argv[3]), sys.argv[4], float(sys.argv[5]))
