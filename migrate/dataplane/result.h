/* Filling in a loop's typed result. */
#ifndef POSTCOPY_RESULT_H
#define POSTCOPY_RESULT_H

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "dataplane.h"
#include "frame.h"

static inline void result_reset(struct loop_result *result)
{
    memset(result, 0, sizeof(*result));
}

/* Returns false, so that `return result_fail(...)` reads as what it is. */
static inline bool result_fail(struct loop_result *result, enum loop_reason reason, int error_number, const char *where)
{
    result->reason = reason;
    result->error_number = error_number;
    snprintf(result->where, sizeof(result->where), "%s", where);
    return false;
}

static inline bool result_frame(struct loop_result *result, enum loop_reason reason, const struct frame_header *frame,
                                struct frame_verdict verdict)
{
    result->reason = reason;
    result->field = verdict.field;
    result->expected = verdict.expected;
    result->got = verdict.got;
    result->region = frame->region;
    result->page_index = frame->page_index;
    snprintf(result->where, sizeof(result->where), "frame");
    return false;
}

#endif
