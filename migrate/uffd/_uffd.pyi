"""What cffi makes of cdef.txt: untyped; __init__.py is the typed face."""

from typing import Any

ffi: Any
lib: Any
