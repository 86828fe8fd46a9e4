"""Write the C source of one cffi extension: ``build_ffi.py MODULE CDEF OUTPUT HEADER...`` (called by meson.build).

API mode: constants and struct layouts in the cdef end in ``...`` and the C compiler supplies them.
"""

import sys
from pathlib import Path

from cffi import FFI


def main() -> None:
    module, cdef_path, output_path, *headers = sys.argv[1:]
    builder = FFI()
    builder.cdef(Path(cdef_path).read_text())
    includes = "\n".join(f'#include "{header}"' for header in headers)
    builder.set_source(module, includes, py_limited_api=True)
    builder.emit_c_code(output_path)


main()
