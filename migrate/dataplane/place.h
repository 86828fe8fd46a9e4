/* Bringing bytes into place: into the memory file, never through the registered guest mapping. */
#ifndef POSTCOPY_PLACE_H
#define POSTCOPY_PLACE_H

#include "memory.h"

enum page_path { PATH_URGENT = 0, PATH_BULK = 1, PATH_AHEAD = 2 };

/* Write whole pages. 0 or an errno; never a signal. The caller has claimed every page of the run. */
int place_pages(const struct region *region, uint64_t page_index, uint64_t page_count, const void *bytes, enum page_path path);
/* What is there goes, and reads as zeroes: a hole, or on hugetlbfs cleared pages. 0 or an errno. */
int place_zeroes(const struct region *region, uint64_t page_index, uint64_t page_count);
/* The same, and the memory goes back to the system, on hugetlbfs with its reservation: the guest has given it up. 0 or an errno. */
int place_hole(const struct region *region, uint64_t page_index, uint64_t page_count);
/* The whole region is empty afterwards, whatever was there, and nothing of it mapped anywhere. 0 or an errno. */
int place_nothing(const struct region *region);
/* hugetlbfs. Reserve for the file what the region lacks, all or nothing; then take these pages, cleared, whoever else wants some. 0 or an
 * errno: ENOMEM, ENOSPC are want of room. */
int place_reserve(const struct region *region);
int place_allocate(const struct region *region, uint64_t page_index, uint64_t page_count);

#endif
