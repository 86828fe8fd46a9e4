"""What cffi generates from cdef.txt."""

from typing import Any

ffi: Any
lib: Any
