/* Where a guest's memory lies in its address space. memory.py is the typed face. */
#ifndef POSTCOPY_MAPPING_H
#define POSTCOPY_MAPPING_H

#include <stdint.h>

/* Address space for several regions side by side, aligned to 2 MiB, from 1 GiB on to 1 GiB; and one region of it. NULL/errno on failure. */
void *mapping_reserve(uint64_t size_bytes);
int mapping_place(void *address, uint64_t size_bytes, int memory_fd, uint64_t offset_bytes);
int mapping_release(void *address, uint64_t size_bytes);

#endif
