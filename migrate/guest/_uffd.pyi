"""What cffi makes of cdef.txt: untyped; uffd.py and memory.py is the typed face."""

from typing import Any

ffi: Any
lib: Any
