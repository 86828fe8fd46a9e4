"""What cffi makes of cdef.txt: untyped; memory.py and schedule.py are the typed faces."""

from typing import Any

ffi: Any
lib: Any
