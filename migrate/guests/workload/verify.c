/* See verify.h. The loops over a block's words are plain, so that the compiler turns them into vector code: a check
 * costs about what reading the block does. */
#include "verify.h"

#define STAMP_STEP UINT64_C(0x9e3779b97f4a7c15) /* odd: no two words of a block are equal */
#define STAMP_FIRST 3                            /* words before it: identity, version, write count */
#define STAMP_WORDS (BLOCK_WORDS - STAMP_FIRST)
#define ROOT_SALT UINT64_C(0xa24baed4963ee407)
#define ZERO_SALT UINT64_C(0x8cb92ba72f3d8dd7)

/* splitmix64's finaliser, and its inverse. */
uint64_t mix64(uint64_t value)
{
    value = (value ^ (value >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    value = (value ^ (value >> 27)) * UINT64_C(0x94d049bb133111eb);
    return value ^ (value >> 31);
}

static uint64_t unmix64(uint64_t value)
{
    value = (value ^ (value >> 31) ^ (value >> 62)) * UINT64_C(0x319642b2d24d8ec3);
    value = (value ^ (value >> 27) ^ (value >> 54)) * UINT64_C(0x96de1b173f119089);
    return value ^ (value >> 30) ^ (value >> 60);
}

static uint64_t identity_of(const struct slice *slice, uint64_t block)
{
    return mix64(block ^ slice->key);
}

static uint64_t stamp_base(uint64_t identity, uint64_t version)
{
    return mix64(version ^ identity);
}

/* The version of the block `identity` that has this word here; not a version (over 32 bits) when none has. */
static uint64_t stamped_version(uint64_t identity, uint64_t word_index, uint64_t word)
{
    return unmix64(word - word_index * STAMP_STEP) ^ identity;
}

static uint64_t entry_version(uint64_t entry)
{
    return entry & UINT32_MAX;
}

static uint64_t entry_count(uint64_t entry)
{
    return entry >> 32;
}

/* 32 bits can wrap on a block written without end; 0 keeps its meaning. */
static uint64_t next_count(uint64_t count)
{
    return count >= UINT32_MAX ? 1 : count + 1;
}

bool slice_init(struct slice *slice, void *memory, uint64_t memory_blocks, uint32_t threads, uint32_t thread, uint64_t seed)
{
    uint64_t first = memory_blocks * thread / threads;
    uint64_t blocks = memory_blocks * (thread + 1) / threads - first;
    if (blocks < 2)
        return false;
    slice->memory = memory;
    slice->memory_blocks = memory_blocks;
    slice->first_block = first;
    slice->table_blocks = (blocks + BLOCK_WORDS) / (BLOCK_WORDS + 1);
    slice->data_blocks = blocks - slice->table_blocks;
    slice->key = mix64(seed);
    return true;
}

static bool all_zero(const uint64_t *words)
{
    uint64_t set = 0;
    for (uint64_t i = 0; i < BLOCK_WORDS; i++)
        set |= words[i];
    return set == 0;
}

static bool stamps_match(const uint64_t *words, uint64_t identity, uint64_t version)
{
    uint64_t base = stamp_base(identity, version);
    uint64_t wrong = (words[0] ^ identity) | (words[1] ^ version);
    for (uint64_t i = STAMP_FIRST; i < BLOCK_WORDS; i++)
        wrong |= words[i] ^ (base + i * STAMP_STEP);
    return wrong == 0;
}

bool block_matches(const struct slice *slice, uint64_t data_index, uint64_t entry)
{
    const uint64_t *words = slice_words(slice, data_index);
    if (entry == 0)
        return all_zero(words);
    uint64_t identity = identity_of(slice, slice_data_block(slice, data_index));
    return words[2] == entry_count(entry) && stamps_match(words, identity, entry_version(entry));
}

uint64_t block_write(const struct slice *slice, uint64_t data_index, uint64_t entry)
{
    uint64_t *words = slice_words(slice, data_index);
    uint64_t identity = identity_of(slice, slice_data_block(slice, data_index));
    uint64_t version = next_count(entry_version(entry));
    uint64_t base = stamp_base(identity, version);
    words[0] = identity;
    words[1] = version;
    words[2] = next_count(words[2]); /* counted where it lies: a write made twice, or undone, stays visible */
    for (uint64_t i = STAMP_FIRST; i < BLOCK_WORDS; i++)
        words[i] = base + i * STAMP_STEP;
    uint64_t written = version | next_count(entry_count(entry)) << 32;
    *slice_entry(slice, data_index) = written;
    return written;
}

uint64_t root_share(const struct slice *slice, uint64_t data_index, uint64_t entry)
{
    if (entry == 0)
        return 0;
    return mix64(mix64(identity_of(slice, slice_data_block(slice, data_index)) ^ ROOT_SALT) + entry);
}

bool block_starts_zero(const struct slice *slice, uint64_t data_index, uint32_t zero_per_mille)
{
    return mix64(identity_of(slice, slice_data_block(slice, data_index)) ^ ZERO_SALT) % 1000 < zero_per_mille;
}

static void name(struct workload_failure *failure, uint32_t kind, uint64_t expected, uint64_t got)
{
    failure->kind = kind;
    failure->expected = expected;
    failure->got = got;
}

/* A data block ahead of its entry, whole: no write leaves that behind, the table is what is wrong. Among all blocks
 * that this table block describes, the number that are ahead, and that are behind. */
static void table_compare(const struct slice *slice, uint64_t data_index, uint64_t *ahead, uint64_t *behind)
{
    uint64_t first = data_index - data_index % BLOCK_WORDS;
    uint64_t end = first + BLOCK_WORDS < slice->data_blocks ? first + BLOCK_WORDS : slice->data_blocks;
    *ahead = *behind = 0;
    for (uint64_t i = first; i < end; i++) {
        const uint64_t *words = slice_words(slice, i);
        uint64_t version = words[1], expected = entry_version(*slice_entry(slice, i));
        if (version == expected || !stamps_match(words, identity_of(slice, slice_data_block(slice, i)), version))
            continue;
        *ahead += version > expected;
        *behind += version < expected;
    }
}

/* Whether the table block rather than the data block is wrong; named then. */
static bool table_classify(const struct slice *slice, uint64_t data_index, uint64_t entry, struct workload_failure *failure)
{
    uint64_t version = slice_words(slice, data_index)[1], ahead, behind;
    table_compare(slice, data_index, &ahead, &behind);
    bool malformed = entry_version(entry) != entry_count(entry);
    if (!malformed && (ahead == 0 || (ahead == 1 && entry == 0))) /* one alone, ahead of nothing: it was discarded, and is back */
        return false;
    failure->block_index = slice_table_block(slice, data_index);
    if (all_zero(slice->memory + failure->block_index * BLOCK_WORDS))
        name(failure, WORKLOAD_PAGE_ZEROED, version, 0);
    else if (malformed)
        name(failure, WORKLOAD_PAGE_LOST, version, entry_version(entry));
    else
        name(failure, behind != 0 ? WORKLOAD_PAGE_SWAPPED : WORKLOAD_PAGE_STALE, version, entry_version(entry));
    return true;
}

void block_classify(const struct slice *slice, uint64_t data_index, uint64_t entry, struct workload_failure *failure)
{
    const uint64_t *words = slice_words(slice, data_index);
    uint64_t block = slice_data_block(slice, data_index);
    uint64_t identity = identity_of(slice, block), expected = entry_version(entry);
    failure->block_index = block;
    failure->block_count = 1;
    if (table_classify(slice, data_index, entry, failure))
        return;

    uint64_t current = 0, other = 0, other_version = 0; /* words of the expected version; of another one of this block */
    for (uint64_t i = STAMP_FIRST; i < BLOCK_WORDS; i++) {
        uint64_t version = stamped_version(identity, i, words[i]);
        if (version == 0 || version > UINT32_MAX)
            continue;
        if (version == expected) {
            current++;
        } else {
            other++;
            other_version = version;
        }
    }
    if (all_zero(words)) {
        name(failure, WORKLOAD_PAGE_ZEROED, expected, 0);
    } else if (current == STAMP_WORDS && words[0] == identity && words[1] == expected && words[2] != entry_count(entry)) {
        uint32_t kind = words[2] < entry_count(entry) ? WORKLOAD_WRITE_LOST : WORKLOAD_WRITE_REPEATED;
        name(failure, kind, entry_count(entry), words[2]);
    } else if (other == STAMP_WORDS && stamps_match(words, identity, words[1])) {
        name(failure, WORKLOAD_PAGE_STALE, expected, words[1]);
    } else if (current + other > 0) {
        /* Also where it reads whole by now: it was being filled while the guest read it. */
        name(failure, WORKLOAD_PAGE_TORN, expected, other_version);
    } else {
        uint64_t owner = unmix64(words[0]) ^ slice->key;
        if (owner < slice->memory_blocks && stamps_match(words, words[0], words[1]))
            name(failure, WORKLOAD_PAGE_SWAPPED, block, owner);
        else
            name(failure, WORKLOAD_PAGE_LOST, expected, 0);
    }
}
