/* What a block of guest memory must hold, and what is wrong with it when it does not. Internal to the workload.
 *
 * A slice is one thread's part of guest memory, and nobody else's:
 *
 *     | table of versions: 512 entries a block | data blocks ...                    |
 *
 * entry   of each data block, in guest memory: version in the low half, write count in the high half; 0: never
 *         written, or discarded since: must read as zeroes. Both grow by one with a write, so halves that differ are nobody's entry.
 * block   word 0 identity, word 1 version, word 2 write count, words 3.. base(identity, version) + index * odd constant.
 * root    sum of a hash of every (block, entry), never in guest memory: memory that agrees with itself and not with
 *         the root was rolled back as a whole.
 *
 * identity and base are invertible, so a word that does not belong here still tells whose it is, and which version's. */
#ifndef POSTCOPY_WORKLOAD_VERIFY_H
#define POSTCOPY_WORKLOAD_VERIFY_H

#include <stdbool.h>
#include <stdint.h>

#include "workload.h"

#define BLOCK_WORDS (WORKLOAD_BLOCK_BYTES / 8) /* also the entries of one table block */

struct slice {
    uint64_t *memory; /* the guest's first word */
    uint64_t memory_blocks;
    uint64_t first_block; /* guest-wide index of the slice's first table block */
    uint64_t table_blocks;
    uint64_t data_blocks;
    uint64_t key; /* mixed from the seed */
};

/* The thread-th of `threads` slices of the memory; false where there is no room for a table and one data block. */
bool slice_init(struct slice *slice, void *memory, uint64_t memory_blocks, uint32_t threads, uint32_t thread, uint64_t seed);

/* data_index counts the slice's data blocks; block indexes are guest-wide. */
static inline uint64_t slice_data_block(const struct slice *slice, uint64_t data_index)
{
    return slice->first_block + slice->table_blocks + data_index;
}

static inline uint64_t slice_table_block(const struct slice *slice, uint64_t data_index)
{
    return slice->first_block + data_index / BLOCK_WORDS;
}

static inline uint64_t *slice_words(const struct slice *slice, uint64_t data_index)
{
    return slice->memory + slice_data_block(slice, data_index) * BLOCK_WORDS;
}

static inline uint64_t *slice_entry(const struct slice *slice, uint64_t data_index)
{
    return slice->memory + slice->first_block * BLOCK_WORDS + data_index;
}

/* Whether every byte of the block is what its entry demands. */
bool block_matches(const struct slice *slice, uint64_t data_index, uint64_t entry);

/* Write the block's next version over what it holds, its table entry too; returns the new entry. */
uint64_t block_write(const struct slice *slice, uint64_t data_index, uint64_t entry);

/* The block's part of the root; 0 for a block never written. */
uint64_t root_share(const struct slice *slice, uint64_t data_index, uint64_t entry);

/* Whether a fresh guest leaves this block unwritten (config.zero_per_mille). */
bool block_starts_zero(const struct slice *slice, uint64_t data_index, uint32_t zero_per_mille);

/* Name what is wrong with a block that does not match; fills all of `failure` but its thread. Slow, and may read the
 * headers of other blocks of the slice: it runs once in the life of a guest. */
void block_classify(const struct slice *slice, uint64_t data_index, uint64_t entry, struct workload_failure *failure);

uint64_t mix64(uint64_t value); /* a bijection in which every bit of the input moves half of the output's */

#endif
