"""A program that maps the memory file as QEMU does, and speaks just enough of its monitor to be asked what it can do.

``fake_qemu.py CAPABILITY,… BLOCKED-REASON …``, then what the agent adds to a command line.
"""

import json
import mmap
import os
import re
import socket
import sys

words = " ".join(sys.argv)
memory = re.search(r"size=(\d+),.*mem-path=([^ ,]+)", words)
monitor = re.search(r"id=postcopy-qmp,fd=(\d+)", words)
assert memory is not None
assert monitor is not None
size_bytes = int(memory[1])
file = os.open(memory[2], os.O_RDWR)
mappings = [mmap.mmap(file, size_bytes, mmap.MAP_SHARED) for _ in range(2 if "twice" in sys.argv[1] else 1)]
answers = {
    "qmp_capabilities": {},
    "query-migrate-capabilities": [{"capability": name, "state": False} for name in sys.argv[1].split(",")],
    "query-migrate": {"blocked-reasons": [sys.argv[2]]} if sys.argv[2] else {},
}
connection = socket.socket(fileno=int(monitor[1]))
version = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}
connection.sendall(json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b"\n")
while data := connection.recv(1 << 16):  # one command at a time
    asked = json.loads(data)
    connection.sendall(json.dumps({"return": answers.get(asked["execute"], {}), "id": asked.get("id")}).encode() + b"\n")
