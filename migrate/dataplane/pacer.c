/* See pacer.h.
 *
 * A queue stands in the device, where no socket option reaches it, and urgent pages wait behind it (1 Gbit/s, 20 ms of queue: 8 ms
 * p99). It does not build up as long as bulk is sent below the bottleneck in small pieces. Nobody says where that is, so it is
 * found as delay-based congestion controls find it: the rate goes up until the bulk connection's round trip stands above
 * what it is without a queue; what is acknowledged while the queue stands is the bottleneck's rate. Then the queue is drained,
 * bulk goes on at 95 % of that, and now and then it tries whether there is more.
 *
 * On a path without a bottleneck the round trip stands high too: 0.4 to 1.2 ms over loopback at full rate, from the receiver's
 * copying (its socket is locked meanwhile) and the scheduler's slices. No threshold of delay tells that from a queue. Two things do:
 * a receiver without room limits by itself (rwnd_limited: 70 to 100 % of the time there, 0 behind a shaper), and nothing that
 * is faster than CEILING is paced: pieces that small would cost more CPU than the path has time for, and the queue is the CPUs'. */
#include "pacer.h"

#define US UINT64_C(1000)
#define MS UINT64_C(1000000)
#define SECOND UINT64_C(1000000000)

#define START_BYTES 62500000u    /* a second: 500 Mbit/s. On 100 Mbit/s the first two windows are 10 ms of queue, once */
#define CEILING_BYTES 500000000u /* a second: 4 Gbit/s */
#define FLOOR_BYTES 625000u      /* a second: 5 Mbit/s, whatever the samples say */

#define STANDING_NS (200 * US) /* above the path's own round trip: more than scheduling noise below full rate */
#define SAMPLES_MIN 3
#define WINDOW_NS MS           /* at a rate of ours; longer on longer paths */
#define WINDOW_OPEN_NS (25 * MS)
#define WINDOWS_OPEN 8         /* standing in a row, at one rate: what was that fast once is no slow link by a hiccup or two */
#define WINDOWS_HOLD 3
#define WINDOWS_RAMP 1
#define WINDOWS_STEP 2         /* at each rate: the least delay of the first one is still the last rate's */
#define SILENCE_NS (4 * MS)    /* without samples: the sender itself was kept from the CPU, and such a window says nothing */

#define DOUBT_NS (80 * MS)      /* at the rate, with no queue */

#define PROBE_WINDOWS 6        /* at 9/8 of the bottleneck, before the rate goes up further: a shaper's bucket hides the first of it */
#define PROBE_SOON_NS (25 * MS) /* for the first time, or less than before: true, or a hiccup? */
#define PROBE_FIRST_NS (100 * MS)
#define PROBE_MOST_NS SECOND

#define PIECE_NS (65 * US)     /* 8 KiB at 1 Gbit/s */
#define PIECE_LEAST_BYTES 2048u
#define PIECE_OPEN_BYTES (256u << 10)
#define LEAD_NS (2 * MS)       /* so far ahead of its time a piece may go to the socket: fewer wake-ups, and one may be late */
#define CREDIT_NS MS           /* later than that: so much is caught up with */
#define SMOOTH_MORE 9 / 8      /* the socket spreads pieces so much faster than they come: its timers are late, too */
#define WAIT_MOST_NS (100 * MS) /* a limit may change meanwhile */

static uint64_t at_rate(uint64_t bytes_per_second, uint64_t elapsed_ns)
{
    return (uint64_t)((double)bytes_per_second * (double)elapsed_ns / 1e9);
}

static uint64_t rate_of(uint64_t bytes, uint64_t elapsed_ns)
{
    return elapsed_ns == 0 ? 0 : (uint64_t)((double)bytes * 1e9 / (double)elapsed_ns);
}

static uint64_t larger(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static void window_begin(struct pacer *pacer, uint64_t now_ns)
{
    pacer->window = (struct pacer_window){.began_ns = now_ns, .rtt_least_ns = UINT64_MAX, .unacked_least_bytes = UINT64_MAX};
}

void pacer_init(struct pacer *pacer)
{
    *pacer = (struct pacer){.mode = PACER_RAMP, .rate_bytes = START_BYTES, .windows_step = WINDOWS_STEP, .probe_interval_ns = PROBE_FIRST_NS};
    window_begin(pacer, 0);
}

void pacer_limit(struct pacer *pacer, uint64_t bytes_per_second, uint64_t now_ns)
{
    pacer->limit_bytes = bytes_per_second;
    if (pacer->next_ns > now_ns)
        pacer->next_ns = now_ns;
}

void pacer_blind(struct pacer *pacer)
{
    pacer->mode = PACER_OPEN;
}

uint64_t pacer_rate(const struct pacer *pacer)
{
    if (pacer->mode == PACER_OPEN)
        return pacer->limit_bytes;
    return pacer->limit_bytes != 0 && pacer->limit_bytes < pacer->rate_bytes ? pacer->limit_bytes : pacer->rate_bytes;
}

uint64_t pacer_smooth_rate(const struct pacer *pacer)
{
    bool found = pacer->capacity_bytes != 0 || pacer->mode == PACER_DRAIN;
    return found ? pacer_rate(pacer) * SMOOTH_MORE : 0;
}

uint64_t pacer_piece_bytes(const struct pacer *pacer)
{
    uint64_t rate_bytes = pacer_rate(pacer);
    if (rate_bytes == 0)
        return PIECE_OPEN_BYTES;
    uint64_t piece_bytes = larger(at_rate(rate_bytes, PIECE_NS), PIECE_LEAST_BYTES);
    return piece_bytes < PIECE_OPEN_BYTES ? piece_bytes : PIECE_OPEN_BYTES;
}

uint64_t pacer_wait_ns(const struct pacer *pacer, uint64_t now_ns)
{
    if (pacer->next_ns <= now_ns + LEAD_NS || pacer_rate(pacer) == 0)
        return 0;
    uint64_t wait_ns = pacer->next_ns - now_ns - LEAD_NS / 2;
    return wait_ns < WAIT_MOST_NS ? wait_ns : WAIT_MOST_NS;
}

void pacer_sent(struct pacer *pacer, uint64_t now_ns, uint64_t sent_bytes)
{
    pacer->window.sent_bytes += sent_bytes;
    uint64_t rate_bytes = pacer_rate(pacer);
    if (rate_bytes == 0)
        return;
    uint64_t from_ns = now_ns > CREDIT_NS ? larger(pacer->next_ns, now_ns - CREDIT_NS) : pacer->next_ns;
    pacer->next_ns = from_ns + (uint64_t)((double)sent_bytes * 1e9 / (double)rate_bytes);
}

/* Above the path's own round trip, a queue is told from noise. On a long path in proportion: nobody waits longer for that. */
static uint64_t standing_ns(const struct pacer *pacer)
{
    return larger(STANDING_NS, pacer->base_rtt_ns / 8);
}

static bool stands(const struct pacer *pacer, const struct pacer_window *window, uint64_t elapsed_ns, uint64_t above_ns)
{
    uint64_t delay_ns = pacer->base_rtt_ns + above_ns;
    return window->rtt_least_ns > delay_ns && window->unacked_least_bytes > at_rate(rate_of(window->acked_bytes, elapsed_ns), delay_ns);
}

static void set_rate(struct pacer *pacer, uint64_t rate_bytes)
{
    pacer->rate_bytes = larger(rate_bytes, FLOOR_BYTES);
}

static void hold(struct pacer *pacer, uint64_t now_ns)
{
    pacer->mode = PACER_HOLD;
    set_rate(pacer, pacer->capacity_bytes / 20 * 19);
    pacer->probe_at_ns = now_ns + pacer->probe_interval_ns;
}

/* A queue stands: what has been acknowledged since then is the bottleneck's rate. */
static void drain(struct pacer *pacer, const struct pacer_window *window, uint64_t now_ns)
{
    uint64_t excess_ns = window->rtt_least_ns - pacer->base_rtt_ns;
    pacer->found_most_bytes = pacer->mode == PACER_OPEN ? UINT64_MAX : pacer->rate_bytes;
    pacer->mode = PACER_DRAIN;
    set_rate(pacer, larger(rate_of(pacer->queue_acked_bytes, pacer->queue_ns) / 2, pacer->capacity_bytes / 16));
    pacer->drain_until_ns = now_ns + 20 * MS + 4 * excess_ns + pacer->base_rtt_ns;
}

/* Less than before: a hiccup of the scheduler looks the same, so it is believed when it comes twice with little between that went well,
 * and step by step. */
static uint64_t believed(struct pacer *pacer, uint64_t found_bytes)
{
    bool twice = pacer->doubt_left_ns > 0;
    pacer->doubt_left_ns = DOUBT_NS;
    return twice ? larger(found_bytes, pacer->capacity_bytes * 2 / 3) : pacer->capacity_bytes;
}

/* One that is found again where it was is tried less and less often. */
static void drained(struct pacer *pacer, uint64_t now_ns)
{
    uint64_t found_bytes = rate_of(pacer->queue_acked_bytes, pacer->queue_ns), known_bytes = pacer->capacity_bytes;
    if (found_bytes > pacer->found_most_bytes) /* acknowledgements that were held up come in a bunch */
        found_bytes = pacer->found_most_bytes;
    if (known_bytes == 0 || found_bytes > known_bytes / 6 * 7) {
        pacer->probe_interval_ns = known_bytes == 0 ? PROBE_SOON_NS : PROBE_FIRST_NS;
        pacer->capacity_bytes = found_bytes;
    } else if (found_bytes < known_bytes / 6 * 5) {
        pacer->probe_interval_ns = PROBE_SOON_NS;
        pacer->capacity_bytes = believed(pacer, found_bytes);
    } else {
        pacer->probe_interval_ns = pacer->probe_interval_ns * 2 < PROBE_MOST_NS ? pacer->probe_interval_ns * 2 : PROBE_MOST_NS;
        pacer->capacity_bytes = found_bytes < known_bytes ? (7 * known_bytes + found_bytes) / 8 : (known_bytes + found_bytes) / 2;
    }
    hold(pacer, now_ns);
}

static void ramp_window(struct pacer *pacer, bool used)
{
    if (!used || ++pacer->windows_ramped < pacer->windows_step)
        return;
    if (pacer->rate_bytes >= CEILING_BYTES) {
        pacer->mode = PACER_OPEN;
        pacer->capacity_bytes = 0;
        return;
    }
    set_rate(pacer, pacer->capacity_bytes == 0 ? pacer->rate_bytes * 2 : pacer->rate_bytes / 4 * 5);
    pacer->windows_ramped = 0;
    pacer->windows_step = WINDOWS_STEP;
}

static void drain_window(struct pacer *pacer, const struct pacer_window *window, uint64_t now_ns)
{
    if (!stands(pacer, window, now_ns - window->began_ns, standing_ns(pacer) / 2)) {
        drained(pacer, now_ns);
    } else if (now_ns >= pacer->drain_until_ns) { /* what stays is not ours: the path has changed, or others fill it */
        pacer->base_rtt_ns = window->rtt_least_ns;
        pacer->capacity_bytes = 0; /* what was acknowledged meanwhile is all that is known */
        drained(pacer, now_ns);
    } else {
        pacer->queue_acked_bytes += window->acked_bytes;
        pacer->queue_ns += now_ns - window->began_ns;
    }
}

/* A link's rate is the same in each window; that of CPUs which others want too differs by half and more. */
static void note_steady(struct pacer *pacer, uint64_t rate_bytes)
{
    if (pacer->windows_standing == 1)
        pacer->steady_least_bytes = pacer->steady_most_bytes = rate_bytes;
    if (rate_bytes < pacer->steady_least_bytes)
        pacer->steady_least_bytes = rate_bytes;
    pacer->steady_most_bytes = larger(pacer->steady_most_bytes, rate_bytes);
    if (pacer->steady_most_bytes > pacer->steady_least_bytes / 3 * 4 || pacer->steady_most_bytes > CEILING_BYTES)
        pacer->windows_standing = 0;
}

static void window_end(struct pacer *pacer, uint64_t now_ns)
{
    struct pacer_window window = pacer->window;
    uint64_t elapsed_ns = now_ns - window.began_ns;
    window_begin(pacer, now_ns);
    if (pacer->base_rtt_ns == 0 || window.rtt_least_ns < pacer->base_rtt_ns)
        pacer->base_rtt_ns = window.rtt_least_ns;
    if (pacer->mode == PACER_DRAIN) {
        drain_window(pacer, &window, now_ns);
        return;
    }
    bool standing = stands(pacer, &window, elapsed_ns, standing_ns(pacer)) && window.starved_ns < elapsed_ns / 4;
    pacer->windows_standing = standing ? pacer->windows_standing + 1 : 0;
    if (!standing || pacer->windows_standing == 1)
        pacer->queue_acked_bytes = pacer->queue_ns = 0;
    pacer->queue_acked_bytes += window.acked_bytes;
    pacer->queue_ns += elapsed_ns;
    bool used = window.sent_bytes >= at_rate(pacer->rate_bytes, elapsed_ns) / 4 * 3; /* not below a lower limit */
    if (!standing && used)
        pacer->doubt_left_ns -= elapsed_ns < pacer->doubt_left_ns ? elapsed_ns : pacer->doubt_left_ns;
    if (standing) {
        if (pacer->mode == PACER_OPEN)
            note_steady(pacer, rate_of(window.acked_bytes, elapsed_ns));
        uint32_t windows = pacer->mode == PACER_OPEN ? WINDOWS_OPEN : pacer->mode == PACER_HOLD ? WINDOWS_HOLD : WINDOWS_RAMP;
        if (pacer->windows_standing >= windows)
            drain(pacer, &window, now_ns);
    } else if (pacer->mode == PACER_RAMP) {
        ramp_window(pacer, used);
    } else if (pacer->mode == PACER_HOLD && used && now_ns >= pacer->probe_at_ns) {
        pacer->mode = PACER_RAMP;
        pacer->windows_ramped = 0;
        pacer->windows_step = PROBE_WINDOWS;
        set_rate(pacer, pacer->capacity_bytes / 8 * 9);
    }
}

void pacer_sample(struct pacer *pacer, const struct pacer_sample *sample)
{
    struct pacer_window *window = &pacer->window;
    uint64_t piece_ns = UINT64_C(1000) * PIECE_LEAST_BYTES * 1000000 / pacer->rate_bytes;
    uint64_t silence_ns = SILENCE_NS + 4 * piece_ns + pacer->base_rtt_ns + sample->blocked_ns;
    if (pacer->mode != PACER_OPEN && sample->now_ns - pacer->sampled_ns > silence_ns) {
        pacer->windows_standing = 0;
        window_begin(pacer, sample->now_ns);
    }
    pacer->sampled_ns = sample->now_ns;
    if (sample->rtt_ns < window->rtt_least_ns)
        window->rtt_least_ns = sample->rtt_ns;
    if (sample->unacked_bytes < window->unacked_least_bytes)
        window->unacked_least_bytes = sample->unacked_bytes;
    window->acked_bytes += sample->acked_bytes;
    window->starved_ns += sample->starved_ns;
    window->samples++;
    uint64_t least_ns = pacer->mode == PACER_OPEN ? WINDOW_OPEN_NS : WINDOW_NS + pacer->base_rtt_ns;
    if (window->samples >= SAMPLES_MIN && sample->now_ns - window->began_ns >= least_ns)
        window_end(pacer, sample->now_ns);
}
