/* See claims.h. */
#include "claims.h"

#include <errno.h>
#include <stdlib.h>

#include "destination.h"
#include "resolve.h"
#include "result.h"

/* A chunk's byte. */
#define CHUNK_CLAIMED 0x01u /* final content: somebody writes it, or has */
#define CHUNK_HELD 0x02u    /* has come in a round of precopy */
#define CHUNK_IN_FILE 0x04u /* the file holds bytes of it, stale ones perhaps */
#define CHUNK_URGENT 0x10u  /* has come by this path: a second time is the peer's error; a bit a path */
#define CHUNK_OF_PATH(path) ((uint8_t)(CHUNK_URGENT << (path)))

/* A page's word: four counts of its chunks, each of 16 bits but the last, and whether it is closed. */
#define ONE_PLACED (UINT64_C(1) << 0)  /* final, in place */
#define ONE_HELD (UINT64_C(1) << 16)
#define ONE_FILLED (UINT64_C(1) << 32) /* in the file */
#define ONE_WRITER (UINT64_C(1) << 48) /* being written */
#define CLOSED (UINT64_C(1) << 63)     /* discarded: one has it to himself, and no chunk begins any more */
#define PLACED(word) ((word) & 0xffff)
#define HELD(word) ((word) >> 16 & 0xffff)
#define FILLED(word) ((word) >> 32 & 0xffff)
#define WRITERS(word) ((word) >> 48 & 0x7fff)
_Static_assert(FRAME_LENGTH_BYTES_MAX / FRAME_CHUNK_BYTES < 0xffff, "the largest page's chunks are counted in 16 bits");

int claims_init(struct claims *claims, const struct memory *memory)
{
    if (memory->large_total == 0)
        return 0;
    claims->chunk = calloc(memory->chunk_total, sizeof(*claims->chunk));
    claims->page = calloc(memory->large_total, sizeof(*claims->page));
    return claims->chunk && claims->page ? 0 : ENOMEM;
}

void claims_deinit(struct claims *claims)
{
    free((void *)claims->chunk);
    free((void *)claims->page);
}

/* One chunk: where it is, and what is known of it. */
struct place_of_chunk {
    const struct region *region;
    uint64_t chunk_index; /* inside the region */
    uint64_t page_index;
    bool last; /* of its page */
    page_byte *state;
    _Atomic uint8_t *copies;
    _Atomic uint8_t *chunk;
    _Atomic uint64_t *word;
};

static struct place_of_chunk find(struct destination *destination, const struct region *region, uint64_t chunk_index)
{
    uint64_t page_index = chunk_index / region->page_chunks;
    return (struct place_of_chunk){
        .region = region,
        .chunk_index = chunk_index,
        .page_index = page_index,
        .last = (chunk_index + 1) % region->page_chunks == 0,
        .state = &destination->state[region->first_page + page_index],
        .copies = &destination->copies[region->first_page + page_index],
        .chunk = &destination->claims.chunk[region->first_chunk + chunk_index],
        .word = &destination->claims.page[region->first_large + page_index],
    };
}

/* Is it allowed by this path, and the first time? */
static bool note_copy(const struct destination *destination, const struct place_of_chunk *at, enum page_path path, struct loop_result *result)
{
    if (path == PATH_URGENT && !(atomic_load_explicit(at->copies, memory_order_relaxed) & COPY_ASKED))
        return destination_refuse_copy(destination, at->region, at->page_index, LOOP_PAGE_UNASKED, result);
    if (atomic_fetch_or_explicit(at->chunk, CHUNK_OF_PATH(path), memory_order_relaxed) & CHUNK_OF_PATH(path))
        return destination_refuse_copy(destination, at->region, at->page_index, LOOP_PAGE_DUPLICATE, result);
    return true;
}

/* Claim the chunk. False: somebody else has or had it, or nobody needs it. */
static bool begin_write(const struct place_of_chunk *at)
{
    if (!page_receive_chunk(at->state))
        return false;
    if (atomic_fetch_or_explicit(at->chunk, CHUNK_CLAIMED, memory_order_acquire) & CHUNK_CLAIMED)
        return false;
    if (!(atomic_fetch_add(at->word, ONE_WRITER) & CLOSED))
        return true;
    atomic_fetch_sub(at->word, ONE_WRITER);
    return false;
}

/* Bytes, or zeroes, into the file. *filled: what that adds to the page's word. 0 or an errno. */
static int write_chunk(const struct place_of_chunk *at, struct chunk_bytes *from, enum page_path path, uint64_t *filled)
{
    bool in_file = atomic_load_explicit(at->chunk, memory_order_relaxed) & CHUNK_IN_FILE;
    *filled = 0;
    if (!from->bytes && !from->fill) {
        int error_number = in_file ? place_zero_chunk(at->region, at->chunk_index) : 0;
        if (in_file && error_number == 0) {
            atomic_fetch_and_explicit(at->chunk, (uint8_t)~CHUNK_IN_FILE, memory_order_relaxed);
            *filled = -ONE_FILLED;
        }
        return error_number;
    }
    if (!in_file) {
        atomic_fetch_or_explicit(at->chunk, CHUNK_IN_FILE, memory_order_relaxed);
        *filled = ONE_FILLED;
    }
    return from->fill ? from->fill(from, at->region->alias + at->chunk_index * FRAME_CHUNK_BYTES)
                      : place_chunk(at->region, at->chunk_index, from->bytes, path);
}

/* It is final: nobody need ask for it any more. */
static void note_whole(struct destination *destination, const struct place_of_chunk *at)
{
    if (atomic_fetch_or_explicit(at->copies, COPY_WHOLE, memory_order_relaxed) & COPY_ASKED)
        atomic_fetch_sub_explicit(&destination->requests_outstanding, 1, memory_order_relaxed);
}

/* The page is discarded. If nobody is writing any of it, it goes. */
static bool remove_if_quiet(struct destination *destination, const struct place_of_chunk *at, bool punch, struct loop_result *result)
{
    uint64_t seen = atomic_load(at->word);
    do {
        if (WRITERS(seen) != 0 || seen & CLOSED)
            return true;
    } while (!atomic_compare_exchange_weak(at->word, &seen, seen | CLOSED));
    note_whole(destination, at);
    int error_number = punch ? place_hole(at->region, at->page_index, 1) : 0;
    if (error_number != 0)
        return result_fail(result, LOOP_MEMORY_FAILED, error_number, "discard");
    return destination_leave_removed(destination, at->region, at->page_index, result);
}

/* All chunks are in place. */
static bool publish(struct destination *destination, const struct place_of_chunk *at, bool zero, enum page_path path, struct loop_result *result)
{
    bool waits = false;
    if (!page_publish_as(at->state, zero ? PAGE_ZERO : PAGE_PRESENT, &waits))
        return remove_if_quiet(destination, at, true, result);
    note_whole(destination, at);
    if (!zero && !destination_map_present(destination, at->region, at->page_index, 1, result))
        return false;
    if (zero && waits && !destination_map_zero(destination, at->region, at->page_index, result))
        return false;
    if (waits)
        destination_end_wait(destination, at->region->first_page + at->page_index, FAULT_REMOTE);
    _Atomic uint64_t *pages_placed[] = {&destination->pages_urgent, &destination->pages_bulk, &destination->pages_readahead};
    count(zero ? &destination->pages_zero : pages_placed[path], 1);
    destination_became_final(destination, 1);
    return true;
}

static bool take_chunk(struct destination *destination, const struct place_of_chunk *at, struct chunk_bytes *from, enum page_path path,
                       struct loop_result *result)
{
    if (!note_copy(destination, at, path, result))
        return false;
    if (!begin_write(at)) {
        if (at->last) /* a page, once */
            destination_count_dropped(destination, path);
        return true;
    }
    uint64_t filled;
    int error_number = write_chunk(at, from, path, &filled);
    if (error_number != 0)
        return result_fail(result, LOOP_MEMORY_FAILED, error_number, "place"); /* still claimed: the page never is PRESENT */
    events_applied(destination);
    uint64_t step = ONE_PLACED - ONE_WRITER + filled, now = atomic_fetch_add(at->word, step) + step;
    if (PLACED(now) == at->region->page_chunks)
        return publish(destination, at, FILLED(now) == 0, path, result);
    return !(atomic_load(at->state) & PAGE_DISCARDED) || remove_if_quiet(destination, at, true, result);
}

static bool hold_chunk(struct destination *destination, const struct place_of_chunk *at, struct chunk_bytes *from, struct loop_result *result)
{
    uint8_t before;
    if (!page_claim_precopy(at->state, &before)) { /* a waiting guest that touches its memory has asked for it: it comes when it is final */
        count(&destination->pages_dropped, at->last);
        return true;
    }
    uint64_t step;
    int error_number = write_chunk(at, from, PATH_BULK, &step);
    if (!(atomic_fetch_or_explicit(at->chunk, CHUNK_HELD, memory_order_relaxed) & CHUNK_HELD))
        step += ONE_HELD;
    uint64_t now = atomic_fetch_add(at->word, step) + step;
    bool whole = HELD(now) == at->region->page_chunks && error_number == 0;
    enum page_state next = !whole ? PAGE_ABSENT : FILLED(now) == 0 ? PAGE_HELD_ZERO : PAGE_HELD;
    if (page_leave_receiving(at->state, next)) /* who waits faults anew and finds it so */
        resolve_wake(destination->userfaultfd, at->region, at->page_index, 1);
    if (error_number != 0)
        return result_fail(result, LOOP_MEMORY_FAILED, error_number, "place");
    count(&destination->pages_held, whole && before == PAGE_ABSENT);
    count(&destination->pages_precopy, at->last);
    return true;
}

bool claims_take_one(struct destination *destination, const struct region *region, uint64_t chunk_index, struct chunk_bytes *from, bool held,
                     enum page_path path, struct loop_result *result)
{
    struct place_of_chunk at = find(destination, region, chunk_index);
    return held ? hold_chunk(destination, &at, from, result) : take_chunk(destination, &at, from, path, result);
}

static bool take_all(struct destination *destination, const struct region *region, uint64_t chunk_index, uint64_t chunk_count, const char *bytes,
                     bool held, enum page_path path, struct loop_result *result)
{
    for (uint64_t i = 0; i < chunk_count; i++) {
        struct chunk_bytes from = {.bytes = bytes ? bytes + i * FRAME_CHUNK_BYTES : NULL};
        if (!claims_take_one(destination, region, chunk_index + i, &from, held, path, result))
            return false;
    }
    return true;
}

bool claims_take(struct destination *destination, const struct region *region, uint64_t chunk_index, uint64_t chunk_count,
                 const char *bytes, enum page_path path, struct loop_result *result)
{
    return take_all(destination, region, chunk_index, chunk_count, bytes, false, path, result);
}

bool claims_hold(struct destination *destination, const struct region *region, uint64_t chunk_index, uint64_t chunk_count,
                 const char *bytes, struct loop_result *result)
{
    return take_all(destination, region, chunk_index, chunk_count, bytes, true, PATH_BULK, result);
}

bool claims_discard(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count, bool punch,
                    struct loop_result *result)
{
    for (uint64_t end = page_index + page_count; page_index < end; page_index++) {
        struct place_of_chunk at = find(destination, region, page_index * region->page_chunks);
        if (page_discard_chunks(at.state)) {
            if (!remove_if_quiet(destination, &at, punch, result))
                return false;
            continue;
        }
        int error_number = punch ? place_hole(region, page_index, 1) : 0;
        if (error_number != 0)
            return result_fail(result, LOOP_MEMORY_FAILED, error_number, "discard");
    }
    return true;
}

void claims_restore(struct claims *claims, const struct region *region, uint64_t page_index)
{
    for (uint64_t i = 0; i < region->page_chunks; i++)
        atomic_store_explicit(&claims->chunk[region->first_chunk + page_index * region->page_chunks + i], CHUNK_IN_FILE, memory_order_relaxed);
    atomic_store_explicit(&claims->page[region->first_large + page_index], region->page_chunks * ONE_FILLED, memory_order_relaxed);
}

static void forget_what_is_on_its_way(struct destination *destination, const struct region *region)
{
    for (uint64_t i = 0; region->page_chunks > 0 && i < region->page_count; i++) {
        page_byte *state = &destination->state[region->first_page + i];
        uint8_t seen = page_load(state);
        if (PAGE_STATE(seen) == PAGE_RECEIVING)
            atomic_store_explicit(state, seen & PAGE_WANTED ? PAGE_REQUESTED | PAGE_WANTED : PAGE_ABSENT, memory_order_release);
    }
}

void claims_next_epoch(struct destination *destination)
{
    const struct memory *memory = &destination->memory;
    for (uint64_t i = 0; memory->large_total > 0 && i < memory->chunk_total; i++)
        atomic_fetch_and_explicit(&destination->claims.chunk[i], CHUNK_CLAIMED | CHUNK_HELD | CHUNK_IN_FILE, memory_order_relaxed);
    for (uint32_t r = 0; r < memory->region_count; r++)
        forget_what_is_on_its_way(destination, &memory->regions[r]);
}
