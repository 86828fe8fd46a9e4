/* See waiting.h. Only the fault loop puts; several threads take. */
#include "waiting.h"

static uint32_t place_of(uint64_t page)
{
    return (uint32_t)((page * UINT64_C(0x9e3779b97f4a7c15)) >> 54) & (WAITING_SLOTS - 1);
}

bool waiting_put(struct waiting *waiting, uint64_t page, uint64_t since_ns)
{
    uint32_t start = place_of(page);
    for (uint32_t i = 0; i < WAITING_PROBES; i++)
        if (atomic_load_explicit(&waiting->slot[(start + i) % WAITING_SLOTS].key, memory_order_relaxed) == page + 1)
            return true;
    for (uint32_t i = 0; i < WAITING_PROBES; i++) {
        uint32_t at = (start + i) % WAITING_SLOTS;
        if (atomic_load_explicit(&waiting->slot[at].key, memory_order_acquire) != 0)
            continue;
        atomic_store_explicit(&waiting->slot[at].since_ns, since_ns, memory_order_relaxed);
        atomic_store_explicit(&waiting->slot[at].key, page + 1, memory_order_release);
        return true;
    }
    return false;
}

bool waiting_take(struct waiting *waiting, uint64_t page, uint64_t *since_ns)
{
    uint32_t start = place_of(page);
    for (uint32_t i = 0; i < WAITING_PROBES; i++) {
        uint32_t at = (start + i) % WAITING_SLOTS;
        uint64_t key = page + 1;
        if (atomic_load_explicit(&waiting->slot[at].key, memory_order_acquire) != key)
            continue;
        *since_ns = atomic_load_explicit(&waiting->slot[at].since_ns, memory_order_relaxed);
        if (atomic_compare_exchange_strong_explicit(&waiting->slot[at].key, &key, 0, memory_order_acq_rel, memory_order_relaxed))
            return true;
    }
    return false;
}
