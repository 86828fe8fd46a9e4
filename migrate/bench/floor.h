/* What the parts of the floor program share. floor.c says what it is and how it is used. */
#ifndef POSTCOPY_FLOOR_H
#define POSTCOPY_FLOOR_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PAGE_BYTES 4096u
#define HUGE_PAGE_BYTES (2u << 20)
#define EXTENT_PAGES 64u /* zero pages come in extents of this many, as they do in real memory */

struct floor_options {
    const char *scenario;
    const char *congestion_control;
    uint64_t memory_bytes;
    uint64_t touches; /* moves, for hops */
    uint64_t seed;
    uint64_t zero_per_mille;
    uint64_t deadline_seconds;
};

/* One mapping that all processes share: what they found, read by the parent once it has reaped them. */
struct floor_report {
    _Atomic uint32_t stop; /* fault-under-stream: the stream is done */
    uint64_t count;        /* values in latency_ns */
    uint64_t touched;      /* pages touched, stalled or not */
    uint64_t events;       /* page faults that the destination read */
    uint64_t zero_pages;
    uint64_t stream_ns;
    double source_cpu_seconds, destination_cpu_seconds;
    uint64_t latency_ns[]; /* room for options.touches */
};

struct floor_world {
    struct floor_options options;
    uint64_t pages, page_bytes;
    struct floor_report *report;
    unsigned char *source_memory; /* fault-kvm: where the guest has its first life; NULL: made by the source itself */
    unsigned char *pool;        /* memory_bytes of warm memory, let go just before the measurement: see floor.c */
    int listener;               /* TCP on loopback, made before the processes are */
    int guest_end[2], daemon_end[2]; /* unix socket pairs; hops and fault-kvm use the second too */
};

/* The guest's memory as its own process sees it, and as the destination does once the descriptors have come. Of 4 KiB pages one more
 * than the scenario's: its fault says that the guest has finished, so that nothing but faults ever wakes the fault thread. */
struct floor_memory {
    uint64_t guest_address;
    uint64_t pages, page_bytes;
    int memfd, uffd;
    unsigned char *mapping; /* the guest's: registered; NULL at the destination */
};

/* A header on the bulk connection; the pages of a RUN_PAGES follow it. */
struct floor_run {
    uint64_t page_index;
    uint32_t page_count;
    uint32_t kind;
};
enum { RUN_PAGES = 1, RUN_ZERO = 2, RUN_END = 3 };

/* floor_process.c: processes and sockets. Everything here ends the process with a message on failure. */
void floor_expect(int condition, const char *what); /* a system call: tells errno */
void floor_check(int condition, const char *what);  /* a fact of ours */
void floor_name(const char *name);                  /* what this process is called in messages */
void floor_start(const char *name, void (*body)(struct floor_world *), struct floor_world *world);
void floor_reap(void); /* waits for every process started; if one failed, ends and reaps the others and exits 1 */
void floor_deadline(unsigned seconds);
int floor_listen(const char *congestion_control);
int floor_accept(int listener);
int floor_connect(const struct floor_world *world); /* to the listener */
void floor_send(int socket, const void *bytes, size_t size_bytes, int flags);
size_t floor_receive(int socket, void *bytes, size_t size_bytes); /* size_bytes, or 0 when the peer has closed */
double floor_cpu_seconds(void);                                   /* of this process, all threads, user and system */

/* floor_memory.c: the guest's memory and the source's, and what makes a page right. */
uint64_t floor_random(uint64_t *state);
void *floor_allocate(size_t size_bytes); /* touched, so that no measured path faults in it */
uint64_t floor_page_word(const struct floor_world *world, uint64_t page); /* first word of a page; 0: a zero page */
unsigned char *floor_source_memory(const struct floor_world *world);     /* every page written */
void floor_guest_create(const struct floor_world *world, struct floor_memory *memory); /* and pass it to the destination */
void floor_guest_adopt(const struct floor_world *world, struct floor_memory *memory);
void floor_let_warm_memory_go(const struct floor_world *world);
void floor_place(const struct floor_memory *memory, uint64_t page, const void *bytes, size_t size_bytes);
void floor_continue(const struct floor_memory *memory, uint64_t page, uint64_t count);
uint64_t floor_read_fault(const struct floor_memory *memory); /* blocks; the page's index */
void floor_release_end_page(const struct floor_memory *memory);

/* floor_fault.c, floor_stream.c, floor_hops.c, floor_huge.c: the scenarios. Each starts its processes and returns. */
void floor_fault(struct floor_world *world);
void floor_kvm_guest(struct floor_world *world); /* floor_kvm.c, where there is one */
void floor_stream(struct floor_world *world);
void floor_hops(struct floor_world *world);
void floor_huge(struct floor_world *world);
void floor_stream_send(const struct floor_world *world, int socket, const unsigned char *memory, uint64_t run_pages);

#endif
