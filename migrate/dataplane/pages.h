/* The state of a page at the destination: one byte, atomic, and the only moves it may make.
 *
 *   ABSENT -> REQUESTED -> RECEIVING -> PRESENT -> MAPPED        RECEIVING -> ZERO -> MAPPED (touched)
 *   precopy: ABSENT | HELD | HELD_ZERO -> RECEIVING -> HELD | HELD_ZERO
 *   stale set: HELD -> PRESENT or ABSENT, HELD_ZERO -> ZERO or ABSENT       a fault before it: HELD | HELD_ZERO -> REQUESTED
 *   discard: ABSENT | REQUESTED | HELD | HELD_ZERO -> RECEIVING -> REMOVED -> MAPPED (touched)      RECEIVING (another's) -> REMOVED
 *   given up: ABSENT | REQUESTED | HELD | HELD_ZERO | RECEIVING (in chunks) -> LOST
 *
 * Every change is a compare-and-swap or an exchange, never a plain store. RECEIVING is a claim: only who made that
 * change writes the page (P1), and PRESENT, MAPPED, ZERO, REMOVED, LOST refuse every write. The WANTED bit says that a fault waits;
 * whoever leaves RECEIVING and finds it set resolves the page at once. The DISCARDED bit goes with RECEIVING alone: what is being
 * brought into place is worthless by now, and whoever brings it leaves a zero page instead.
 *
 * Of a page that comes in chunks (claims.h) RECEIVING is no claim: it says that some of it is here, for as long as the network takes. */
#ifndef POSTCOPY_PAGES_H
#define POSTCOPY_PAGES_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum page_state {
    PAGE_ABSENT = 0,
    PAGE_REQUESTED = 1,
    PAGE_RECEIVING = 2,
    PAGE_PRESENT = 3,
    PAGE_MAPPED = 4,
    PAGE_HELD = 5,      /* precopied, not known final: never mapped (P2) */
    PAGE_HELD_ZERO = 6, /* the same of a zero page: a hole */
    PAGE_ZERO = 7,
    PAGE_REMOVED = 8, /* discarded by the guest before it had come: a hole, never fetched */
    PAGE_LOST = 9,    /* given up (abandon.c): poisoned, never written any more */
};
#define PAGE_WANTED 0x80u
#define PAGE_DISCARDED 0x40u
#define PAGE_STATE(byte) ((byte) & 0x0fu)

typedef _Atomic uint8_t page_byte;

static inline uint8_t page_load(const page_byte *page)
{
    return atomic_load_explicit(page, memory_order_acquire);
}

/* Claim the page for writing. False: somebody else has or had it, drop the bytes. Acquire: what the last owner did is seen. */
static inline bool page_claim(page_byte *page)
{
    uint8_t seen = atomic_load_explicit(page, memory_order_relaxed);
    while (PAGE_STATE(seen) == PAGE_ABSENT || PAGE_STATE(seen) == PAGE_REQUESTED) {
        uint8_t claimed = (uint8_t)(PAGE_RECEIVING | (seen & PAGE_WANTED));
        if (atomic_compare_exchange_weak_explicit(page, &seen, claimed, memory_order_acquire, memory_order_relaxed))
            return true;
    }
    return false;
}

/* The same while the guest still runs at the source: a page held already is written again. */
static inline bool page_claim_precopy(page_byte *page, uint8_t *before)
{
    *before = atomic_load_explicit(page, memory_order_relaxed);
    while (*before == PAGE_ABSENT || *before == PAGE_HELD || *before == PAGE_HELD_ZERO)
        if (atomic_compare_exchange_weak_explicit(page, before, PAGE_RECEIVING, memory_order_acquire, memory_order_relaxed))
            return true;
    return false;
}

/* The stale set speaks: what is held is final, or lacking. Only held pages heed it: one that was asked for meanwhile comes as
 * urgent, and one that has come is final. Returns the state that the page has now got, PAGE_HELD when it was none of ours. */
static inline enum page_state page_judge(page_byte *page, bool stale)
{
    uint8_t seen = atomic_load_explicit(page, memory_order_acquire);
    while (seen == PAGE_HELD || seen == PAGE_HELD_ZERO) {
        enum page_state next = stale ? PAGE_ABSENT : seen == PAGE_HELD ? PAGE_PRESENT : PAGE_ZERO;
        if (atomic_compare_exchange_weak_explicit(page, &seen, (uint8_t)next, memory_order_acq_rel, memory_order_acquire))
            return next;
    }
    return PAGE_HELD;
}

/* The guest has discarded the page. True: it is claimed, to be left as REMOVED. False: it is here, and what the guest did to it is
 * done; or somebody is receiving it, and will find out. */
static inline bool page_discard(page_byte *page)
{
    uint8_t seen = atomic_load_explicit(page, memory_order_acquire);
    for (;;) {
        bool receiving = PAGE_STATE(seen) == PAGE_RECEIVING;
        if (PAGE_STATE(seen) == PAGE_PRESENT || PAGE_STATE(seen) == PAGE_MAPPED || PAGE_STATE(seen) >= PAGE_ZERO)
            return false;
        uint8_t next = (uint8_t)(receiving ? seen | PAGE_DISCARDED : PAGE_RECEIVING | (seen & PAGE_WANTED));
        if (atomic_compare_exchange_weak_explicit(page, &seen, next, memory_order_acq_rel, memory_order_acquire))
            return !receiving;
    }
}

/* A chunk of the page has come: RECEIVING, whoever made it so. False: the page is final, or discarded: drop the bytes. */
static inline bool page_receive_chunk(page_byte *page)
{
    uint8_t seen = atomic_load_explicit(page, memory_order_acquire);
    while (PAGE_STATE(seen) < PAGE_RECEIVING) { /* ABSENT, REQUESTED */
        uint8_t next = (uint8_t)(PAGE_RECEIVING | (seen & PAGE_WANTED));
        if (atomic_compare_exchange_weak_explicit(page, &seen, next, memory_order_acq_rel, memory_order_acquire))
            return true;
    }
    return PAGE_STATE(seen) == PAGE_RECEIVING && !(seen & PAGE_DISCARDED);
}

/* The guest has discarded a page that comes in chunks. True: it is RECEIVING and DISCARDED now, until it is REMOVED. False: it is here. */
static inline bool page_discard_chunks(page_byte *page)
{
    uint8_t seen = atomic_load(page);
    while (PAGE_STATE(seen) != PAGE_PRESENT && PAGE_STATE(seen) != PAGE_MAPPED && PAGE_STATE(seen) < PAGE_ZERO)
        if (atomic_compare_exchange_weak(page, &seen, (uint8_t)(PAGE_RECEIVING | PAGE_DISCARDED | (seen & PAGE_WANTED))))
            return true;
    return false;
}

/* Leave RECEIVING for PRESENT (a page in chunks: or ZERO) once the content is in place. False: it has been discarded meanwhile; it is still claimed, to be
 * cleared and left as REMOVED. Release: the content is visible to whoever reads the state. *wanted: a fault waits for it. */
static inline bool page_publish_as(page_byte *page, enum page_state state, bool *wanted)
{
    uint8_t seen = atomic_load_explicit(page, memory_order_relaxed);
    while (!(seen & PAGE_DISCARDED))
        if (atomic_compare_exchange_weak_explicit(page, &seen, (uint8_t)state, memory_order_acq_rel, memory_order_relaxed)) {
            *wanted = seen & PAGE_WANTED;
            return true;
        }
    return false;
}

static inline bool page_publish(page_byte *page, bool *wanted)
{
    return page_publish_as(page, PAGE_PRESENT, wanted);
}

/* Leave RECEIVING otherwise: to ZERO or REMOVED (precopy: HELD or HELD_ZERO), or back to ABSENT when it could not be placed.
 * Release, as above. True: a fault waits for this page. */
static inline bool page_leave_receiving(page_byte *page, enum page_state state)
{
    return atomic_exchange_explicit(page, (uint8_t)state, memory_order_acq_rel) & PAGE_WANTED;
}

/* PRESENT, ZERO or REMOVED, after the kernel has mapped it. Anything else is left as it is. */
static inline void page_mapped(page_byte *page, enum page_state from)
{
    uint8_t seen = (uint8_t)from;
    atomic_compare_exchange_strong_explicit(page, &seen, PAGE_MAPPED, memory_order_acq_rel, memory_order_relaxed);
}

/* No loop brings pages any more, and none will: what is not here is LOST. Returns the state that the page is in then; RECEIVING: somebody
 * is discarding it, look again. chunks: it comes in these, so RECEIVING is no claim. */
static inline enum page_state page_lose(page_byte *page, bool chunks)
{
    uint8_t seen = atomic_load_explicit(page, memory_order_acquire);
    for (;;) {
        bool claimed = PAGE_STATE(seen) == PAGE_RECEIVING && (!chunks || (seen & PAGE_DISCARDED));
        bool decided = PAGE_STATE(seen) == PAGE_PRESENT || PAGE_STATE(seen) == PAGE_MAPPED || PAGE_STATE(seen) >= PAGE_ZERO;
        if (claimed || decided)
            return (enum page_state)PAGE_STATE(seen);
        if (atomic_compare_exchange_weak_explicit(page, &seen, PAGE_LOST, memory_order_acq_rel, memory_order_acquire))
            return PAGE_LOST;
    }
}

/* LOST, but nobody can miss it. True: it is ABSENT now, and nobody will bring it. */
static inline bool page_find(page_byte *page)
{
    uint8_t seen = PAGE_LOST;
    return atomic_compare_exchange_strong_explicit(page, &seen, PAGE_ABSENT, memory_order_acq_rel, memory_order_relaxed);
}

/* A fault waits for the page. Returns the byte that decided: ABSENT, HELD, and REQUESTED or RECEIVING without WANTED have been
 * changed (request it: asking the source is always right; or wait for whoever receives it); any other is the caller's to resolve or already waited for. */
static inline uint8_t page_want(page_byte *page)
{
    uint8_t seen = atomic_load_explicit(page, memory_order_acquire);
    for (;;) {
        uint8_t next;
        if (seen == PAGE_ABSENT || seen == PAGE_HELD || seen == PAGE_HELD_ZERO)
            next = PAGE_REQUESTED | PAGE_WANTED;
        else if (!(seen & PAGE_WANTED) && (PAGE_STATE(seen) == PAGE_REQUESTED || PAGE_STATE(seen) == PAGE_RECEIVING))
            next = (uint8_t)(seen | PAGE_WANTED);
        else
            return seen;
        if (atomic_compare_exchange_weak_explicit(page, &seen, next, memory_order_acq_rel, memory_order_acquire))
            return seen;
    }
}

#endif
