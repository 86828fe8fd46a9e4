/* Sleeping on a word until another thread changes it. Implemented in worker.c. */
#ifndef POSTCOPY_FUTEX_H
#define POSTCOPY_FUTEX_H

#include <stdatomic.h>
#include <stdint.h>

/* Sleep while *word == value, until woken or deadline_ns (CLOCK_MONOTONIC; UINT64_MAX: none). May return early. */
void futex_wait(const _Atomic uint32_t *word, uint32_t value, uint64_t deadline_ns);
void futex_wake_all(const _Atomic uint32_t *word);

#endif
