/* See patience.h. A timer of its own, since a deadline of poll(2) has the thread's slack of 50 us (timerfd has none). */
#include "patience.h"

#include <errno.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define PATIENCE_NS 200000u
#define AHEAD_PAGES 128u  /* that bulk brings in that time, at half of its rate */
#define FOLLOWS_PAGES 1024u

int patience_init(struct patience *patience)
{
    *patience = (struct patience){.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)};
    for (uint32_t i = 0; i < PATIENCE_RECENT; i++)
        patience->recent[i] = UINT64_MAX; /* which no page follows */
    return patience->timer_fd < 0 ? errno : 0;
}

void patience_deinit(struct patience *patience)
{
    if (patience->timer_fd >= 0)
        close(patience->timer_fd);
}

static void set_timer(const struct patience *patience)
{
    uint64_t until_ns = patience->count > 0 ? patience->wait[patience->first].until_ns : 0; /* 0: off */
    struct itimerspec at = {.it_value = {.tv_sec = (time_t)(until_ns / 1000000000u), .tv_nsec = (long)(until_ns % 1000000000u)}};
    timerfd_settime(patience->timer_fd, TFD_TIMER_ABSTIME, &at, NULL);
}

/* Has another fault been a little before this one? */
static bool follows(struct patience *patience, uint64_t page)
{
    bool found = false;
    for (uint32_t i = 0; i < PATIENCE_RECENT; i++)
        found = found || (page > patience->recent[i] && page - patience->recent[i] <= FOLLOWS_PAGES);
    patience->recent[patience->recent_next++ % PATIENCE_RECENT] = page;
    return found;
}

bool patience_put(struct patience *patience, uint64_t page, uint64_t bulk_next, uint64_t now_ns)
{
    bool coming = page >= bulk_next && page - bulk_next < AHEAD_PAGES;
    if (!follows(patience, page) || !coming || patience->count == PATIENCE_WAITS)
        return false;
    uint32_t at = (patience->first + patience->count++) % PATIENCE_WAITS;
    patience->wait[at].page = page;
    patience->wait[at].until_ns = now_ns + PATIENCE_NS;
    if (patience->count == 1)
        set_timer(patience);
    return true;
}

bool patience_take(struct patience *patience, uint64_t now_ns, uint64_t *page)
{
    if (patience->count == 0 || patience->wait[patience->first].until_ns > now_ns) {
        set_timer(patience);
        return false;
    }
    *page = patience->wait[patience->first].page;
    patience->first = (patience->first + 1) % PATIENCE_WAITS;
    patience->count--;
    return true;
}
