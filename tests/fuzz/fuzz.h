/* What a fuzz target is: libFuzzer's own entry (make fuzz, clang), or replay_main.c's (the suite, any compiler).
 *
 * A target checks what must hold after any input, and aborts where it does not. What touches a userfaultfd registers memory that nobody
 * touches: an input cannot hang in a page fault. */
#ifndef POSTCOPY_FUZZ_H
#define POSTCOPY_FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                \
        }                                                                           \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes);

/* An input as it is consumed; beyond its end all bytes are 0. */
struct taker {
    const uint8_t *data;
    size_t left_bytes;
};

static inline uint8_t take(struct taker *taker)
{
    if (taker->left_bytes == 0)
        return 0;
    taker->left_bytes--;
    return *taker->data++;
}

#endif
