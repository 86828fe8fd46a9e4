/* See answers.h. */
#include "answers.h"

#include <string.h>

void answers_put(struct answers *answers, const struct region *region, uint64_t page_index)
{
    answers->answer[answers->count].region = region;
    answers->answer[answers->count].page_index = page_index;
    answers->answer[answers->count++].chunk = 0;
}

static uint32_t smallest(const struct answers *answers)
{
    uint32_t least = 0;
    for (uint32_t i = 1; i < answers->count; i++)
        if (answers->answer[i].region->page_chunks < answers->answer[least].region->page_chunks)
            least = i;
    return least;
}

bool answers_send(struct answers *answers, struct run_sender *sender, struct loop_result *result)
{
    uint32_t next = smallest(answers);
    if (!run_send_piece(sender, answers->answer[next].region, answers->answer[next].page_index, &answers->answer[next].chunk, result))
        return false;
    if (answers->answer[next].chunk < answers->answer[next].region->page_chunks)
        return true;
    answers->count--;
    memmove(&answers->answer[next], &answers->answer[next + 1], (answers->count - next) * sizeof(answers->answer[0]));
    return true;
}
