/* What the C programs beside the tests check, wherever they stand: the first that does not hold ends the program. */
#ifndef POSTCOPY_TESTS_CHECK_H
#define POSTCOPY_TESTS_CHECK_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                                          \
    do {                                                                                                          \
        if (!(condition)) {                                                                                       \
            fprintf(stderr, "%s:%d: failed: %s (errno %d)\n", __FILE__, __LINE__, #condition, errno);             \
            exit(1);                                                                                              \
        }                                                                                                         \
    } while (0)

#endif
