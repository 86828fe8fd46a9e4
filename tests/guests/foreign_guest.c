/* A whole guest in one file, written from proto/PROTOCOL.md alone: no line and no header of the product, only C11, libc, Linux.
 * For authors of VMMs: all that an agent must do, and little else.
 *   foreign-guest running|waiting SOCKET GUEST_ID SIZE_BYTES SEED [STEPS]
 * SOCKET is the daemon's guests.sock. The guest works until its count of steps is STEPS, or for ever. What happens it tells as
 * JSON lines. Exit status: 0 released (it is whole elsewhere), 1 failed.
 *
 *   part           follows, of PROTOCOL.md
 *   work           nothing: what this guest does with its memory, and how it knows that the memory is right
 *   messages       Messages: length, msgpack, bounds
 *   attaching      Guest socket: hello, its descriptors, and what a waiting guest does before it
 *   agent          Guest socket: the table of messages, and what comes after it
 *
 * The agent is the main thread and never touches guest memory; only the worker does. VCPUs would stand where it stands. */
#include <endian.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096, PAGE_WORDS = PAGE_BYTES / 8, STATE_BYTES = 24, FIELDS_LIMIT = 8, TEXT_LIMIT = 4 * 2000 };
enum { MESSAGE_LIMIT = 1 << 20, STATE_LIMIT = 768 << 10 };

struct guest {
    const char *id, *socket_path;
    uint64_t seed, size_bytes, pages, steps_limit;
    unsigned char *memory;
    int memory_file, userfault, daemon; /* descriptors; -1: none */
    enum { WAITING, ARRIVING, RUNNING, PAUSED, DEPARTED } role;
    uint64_t epoch;              /* in which it is ARRIVING */
    uint64_t step, last_step_ns; /* the worker's while it works, the agent's while it stands */
    bool first_step;             /* not made yet, since it was resumed with a state */
    int orders[2], reports[2];   /* pipes: agent to worker, worker to agent */
    _Atomic int orders_unread;   /* looked at between two steps */
    uint64_t stands_ordered;
};

enum order { STAND = 's', GO = 'g', CHECK = 'c', END = 'e' };

struct report {
    enum { STANDS, STEPPED, ROUND, VERIFIED, BROKEN } what;
    uint64_t number; /* STANDS: orders to stand so far; STEPPED: when, in ns; ROUND, VERIFIED: steps made; BROKEN: page */
};

static void tell(const char *event, uint64_t number) {
    printf("{\"event\":\"%s\",\"number\":%ju}\n", event, (uintmax_t)number);
}

_Noreturn static void fail(const char *reason) {
    printf("{\"event\":\"failed\",\"reason\":\"%s\"}\n", reason);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Work. The count of steps alone says what all of memory holds: who knows it can check every byte. Each round visits every page
 * once, in an order of its own, and takes it to its next generation. Generation 0 is memory as it is made: zeroes. */

static uint64_t mix(uint64_t value) { /* as splitmix64 ends */
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
    value = (value ^ value >> 27) * 0x94d049bb133111eb;
    return value ^ value >> 31;
}

static uint64_t page_of_step(const struct guest *guest, uint64_t step) {
    uint64_t order = mix(guest->seed ^ mix(step / guest->pages + 1));
    return (mix(order) + step * (order | 1)) % guest->pages; /* a power of two: an odd stride visits all */
}

static void content_of(const struct guest *guest, uint64_t page, uint64_t generation, uint64_t *words) {
    uint64_t key = mix(guest->seed + mix(page + mix(generation)));
    bool zeroes = generation == 0 || key % 8 == 0; /* some pages become zero again */
    for (uint64_t word = 0; word < PAGE_WORDS; word++)
        words[word] = zeroes ? 0 : mix(key + word);
}

static void report(const struct guest *guest, int what, uint64_t number) {
    struct report message = {.what = what, .number = number};
    if (write(guest->reports[1], &message, sizeof message) != sizeof message)
        abort();
}

/* False, and the agent knows: the page does not hold this generation. `change`: take it to the next. */
static bool visit(const struct guest *guest, uint64_t page, uint64_t generation, bool change) {
    uint64_t words[PAGE_WORDS];
    content_of(guest, page, generation, words);
    if (memcmp(guest->memory + page * PAGE_BYTES, words, PAGE_BYTES) != 0) {
        report(guest, BROKEN, page);
        return false;
    }
    if (change) {
        content_of(guest, page, generation + 1, words);
        memcpy(guest->memory + page * PAGE_BYTES, words, PAGE_BYTES);
    }
    return true;
}

static bool check_memory(const struct guest *guest) {
    uint64_t round = guest->step / guest->pages, first = round * guest->pages;
    for (uint64_t step = first; step < first + guest->pages; step++)
        if (!visit(guest, page_of_step(guest, step), round + (step < guest->step), false))
            return false;
    report(guest, VERIFIED, guest->step);
    return true;
}

static void *work(void *argument) { /* the worker; ends when it is told to, or finds its memory broken */
    struct guest *guest = argument;
    bool standing = guest->userfault >= 0; /* who waits is one that stands */
    for (uint64_t stands = 0;;) {
        while (guest->orders_unread > 0 || standing || guest->step >= guest->steps_limit) {
            char order;
            if (read(guest->orders[0], &order, 1) != 1)
                abort();
            guest->orders_unread--;
            standing = order == STAND || (standing && order != GO);
            if (order == STAND)
                report(guest, STANDS, ++stands);
            if (order == END || (order == CHECK && !check_memory(guest)))
                return NULL;
        }
        if (!visit(guest, page_of_step(guest, guest->step), guest->step / guest->pages, true))
            return NULL;
        guest->last_step_ns = now_ns();
        if (++guest->step == guest->pages)
            report(guest, ROUND, guest->step);
        if (guest->first_step)
            report(guest, STEPPED, guest->last_step_ns);
        guest->first_step = false;
    }
}

static void give_order(struct guest *guest, char order) {
    guest->orders_unread++;
    guest->stands_ordered += order == STAND;
    if (write(guest->orders[1], &order, 1) != 1)
        abort();
}

/* Messages out. */

struct item { /* one field: text, a map (in an array by itself), a state, or else a number */
    const char *key, *text;
    const struct item *map;
    const uint64_t *state;
    uint64_t number;
};

static void put_head(FILE *out, unsigned tag, uint64_t value, unsigned value_bytes) { /* msgpack is big-endian */
    putc((int)tag, out);
    while (value_bytes-- > 0)
        putc((int)(value >> 8 * value_bytes & 0xff), out);
}

static void put_text(FILE *out, const char *text) {
    put_head(out, 0xd9, strlen(text), 1); /* str 8: no text here has more than 255 bytes */
    fputs(text, out);
}

static void put_map(FILE *out, const struct item *item) { /* the last item has no key */
    unsigned count = 0;
    while (item[count].key != NULL)
        count++;
    for (put_head(out, 0x80 + count, 0, 0); item->key != NULL; item++) {
        put_text(out, item->key);
        if (item->text != NULL)
            put_text(out, item->text);
        else if (item->map != NULL)
            put_head(out, 0x91, 0, 0), put_map(out, item->map);
        else if (item->state != NULL)
            put_head(out, 0xc4, STATE_BYTES, 1), fwrite(item->state, STATE_BYTES, 1, out); /* bin 8 */
        else
            put_head(out, 0xcf, item->number, 8); /* uint 64 */
    }
}

static void send_with(const struct guest *guest, const int *descriptors, size_t count, const struct item *items) {
    char bytes[1024] = {0};
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {0};
    FILE *out = fmemopen(bytes + 4, sizeof bytes - 4, "w"); /* behind the length */
    put_map(out, items);
    struct iovec part = {.iov_base = bytes, .iov_len = 4 + (size_t)ftell(out)};
    uint32_t length = htole32((uint32_t)part.iov_len - 4);
    memcpy(bytes, &length, 4);
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count > 0) {
        message.msg_control = control, message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET, header->cmsg_type = SCM_RIGHTS, header->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(header), descriptors, count * sizeof(int));
    }
    if (fclose(out) != 0) /* it did not fit */
        abort();
    sendmsg(guest->daemon, &message, MSG_NOSIGNAL); /* all of it: it blocks. A daemon that is gone shows at the next reading */
}

#define TEXT(name, value) {.key = name, .text = value}
#define NUMBER(name, value) {.key = name, .number = value}
#define SAY(guest, ...) send_with(guest, NULL, 0, (struct item[]){__VA_ARGS__, {0}})

/* Messages in. */

struct value {
    enum { OTHER, NIL, INT, MAP, STR, BIN } kind;
    uint64_t number; /* an INT's value, a MAP's fields, the bytes of STR and BIN */
    const unsigned char *bytes;
};

struct in {
    const unsigned char *at, *end;
    size_t count;
    struct value keys[FIELDS_LIMIT], values[FIELDS_LIMIT];
    unsigned char bytes[MESSAGE_LIMIT];
};

static bool take_number(struct in *in, size_t bytes, uint64_t *number) {
    if ((size_t)(in->end - in->at) < bytes)
        return false;
    for (*number = 0; bytes > 0; bytes--)
        *number = *number << 8 | *in->at++;
    return true;
}

static bool take_value(struct in *in, struct value *value) {
    static const struct { unsigned first, last, kind, bytes; } TAGS[] = {/* the number is in the tag, or in 1, 2, 4, 8 bytes */
        {0x00, 0x7f, INT, 0}, {0x80, 0x8f, MAP, 0}, {0xa0, 0xbf, STR, 0}, {0xc0, 0xc0, NIL, 0}, {0xc4, 0xc6, BIN, 1},
        {0xcc, 0xcf, INT, 1}, {0xd0, 0xd3, INT, 1}, {0xd9, 0xdb, STR, 1}, {0xde, 0xdf, MAP, 2}};
    uint64_t tag;
    *value = (struct value){.kind = OTHER};
    if (!take_number(in, 1, &tag))
        return false;
    for (size_t i = 0; i < sizeof TAGS / sizeof *TAGS; i++)
        if (tag >= TAGS[i].first && tag <= TAGS[i].last) {
            size_t bytes = TAGS[i].bytes == 0 ? 0 : (size_t)TAGS[i].bytes << (tag - TAGS[i].first);
            value->kind = TAGS[i].kind, value->number = tag - TAGS[i].first;
            if (bytes > 0 && !take_number(in, bytes, &value->number))
                return false;
            if (TAGS[i].first == 0xd0 && value->number >> (8 * bytes - 1) != 0)
                return false; /* an agent is sent nothing negative */
        }
    if (value->kind < STR)
        return value->kind != OTHER;
    if (value->number > (uint64_t)(in->end - in->at))
        return false;
    value->bytes = in->at, in->at += value->number;
    return true;
}

static bool take_message(const struct guest *guest, struct in *in) { /* false: not a map, or the daemon is gone */
    uint32_t length;
    struct value map;
    if (recv(guest->daemon, &length, 4, MSG_WAITALL) != 4 || (length = le32toh(length)) > MESSAGE_LIMIT ||
        recv(guest->daemon, in->bytes, length, MSG_WAITALL) != (ssize_t)length)
        return false;
    in->at = in->bytes, in->end = in->bytes + length;
    if (!take_value(in, &map) || map.kind != MAP || map.number > FIELDS_LIMIT)
        return false;
    for (in->count = 0; in->count < map.number; in->count++)
        if (!take_value(in, &in->keys[in->count]) || !take_value(in, &in->values[in->count]))
            return false;
    return in->at == in->end;
}

static bool is_text(const struct value *value, const char *text) {
    return value->kind == STR && value->number == strlen(text) && memcmp(value->bytes, text, value->number) == 0;
}

/* NULL: not there, of another kind, or out of bounds (an INT's value; the number of bytes). */
static const struct value *field(const struct in *in, const char *key, unsigned kind, uint64_t least, uint64_t most) {
    for (size_t i = 0; i < in->count; i++)
        if (is_text(&in->keys[i], key)) {
            const struct value *value = &in->values[i];
            return value->kind == kind && value->number >= least && value->number <= most ? value : NULL;
        }
    return NULL;
}

/* Of this type, with so many fields: all of them are known when so many are found. */
static bool is_message(const struct in *in, const char *type, size_t fields) {
    const struct value *value = field(in, "type", STR, 1, 64);
    return value != NULL && is_text(value, type) && in->count == 1 + fields;
}

/* Attaching. */

static void make_memory(struct guest *guest) {
    guest->memory_file = memfd_create("foreign-guest", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (guest->memory_file < 0 || ftruncate(guest->memory_file, (off_t)guest->size_bytes) != 0)
        fail("no memory file");
    guest->memory = mmap(NULL, guest->size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, guest->memory_file, 0);
    if (guest->memory == MAP_FAILED || madvise(guest->memory, guest->size_bytes, MADV_DONTFORK) != 0)
        fail("no memory");
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM};
    struct uffdio_register all = {.range = {.start = (uintptr_t)guest->memory, .len = guest->size_bytes},
                                  .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR};
    if (guest->role == WAITING) /* UFFD_USER_MODE_ONLY is not for KVM, which touches memory in the kernel */
        guest->userfault = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (guest->role == WAITING && (ioctl(guest->userfault, UFFDIO_API, &api) || ioctl(guest->userfault, UFFDIO_REGISTER, &all)))
        fail("no userfaultfd with missing and minor faults");
}

static void attach(struct guest *guest) { /* no daemon there: none */
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, guest->socket_path, sizeof address.sun_path - 1);
    guest->daemon = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(guest->daemon, (struct sockaddr *)&address, sizeof address) != 0) {
        close(guest->daemon);
        guest->daemon = -1;
        return;
    }
    const struct item region[] = {
        NUMBER("guest_address", (uintptr_t)guest->memory), NUMBER("size_bytes", guest->size_bytes), NUMBER("offset_bytes", 0),
        NUMBER("page_bytes", PAGE_BYTES), NUMBER("memory_file", 0), {0}};
    const struct item hello[] = {
        TEXT("type", "hello"), NUMBER("major", 1), NUMBER("minor", 0), TEXT("guest_id", guest->id),
        TEXT("role", guest->role == WAITING ? "waiting" : "running"), {.key = "regions", .map = region},
        NUMBER("memory_files", 1), {0}};
    send_with(guest, (int[]){guest->memory_file, guest->userfault}, guest->role == WAITING ? 2 : 1, hello);
}

/* Agent. */

static bool hear_worker(struct guest *guest) { /* true: it stands, as last ordered */
    static const char *const NAMES[] = {"stands", "stepped", "round", "verified", "broken"};
    struct report said;
    if (read(guest->reports[0], &said, sizeof said) != sizeof said)
        abort();
    tell(NAMES[said.what], said.number);
    if (said.what == STEPPED)
        SAY(guest, TEXT("type", "stepped"), NUMBER("first_step_ns", said.number));
    if (said.what == BROKEN) {
        SAY(guest, TEXT("type", "failed"), TEXT("reason", "a page does not hold what it should"));
        fail("a page does not hold what it should");
    }
    return said.what == STANDS && said.number == guest->stands_ordered;
}

static void pause_guest(struct guest *guest, uint64_t deadline_ms) {
    uint64_t until_ns = now_ns() + deadline_ms * 1000000, now;
    struct pollfd ready = {.fd = guest->reports[0], .events = POLLIN};
    bool whole = guest->role == RUNNING, stands = false;
    if (whole)
        give_order(guest, STAND);
    while (whole && !stands && (now = now_ns()) < until_ns)
        stands = poll(&ready, 1, (int)((until_ns - now) / 1000000) + 1) == 1 && hear_worker(guest);
    if (!stands) {
        if (whole)
            give_order(guest, GO);
        SAY(guest, TEXT("type", "pause_failed"), TEXT("reason", whole ? "a step took too long" : "it does not run as a whole"));
        return;
    }
    guest->role = PAUSED;
    uint64_t state[STATE_BYTES / 8] = {htole64(guest->seed), htole64(guest->size_bytes), htole64(guest->step)};
    SAY(guest, TEXT("type", "paused"), {.key = "state", .state = state}, NUMBER("last_step_ns", guest->last_step_ns));
    tell("paused", guest->step);
}

static void resume_guest(struct guest *guest, uint64_t epoch, const struct value *state) {
    uint64_t saved[STATE_BYTES / 8] = {0};
    if (state->kind == BIN && state->number == STATE_BYTES)
        memcpy(saved, state->bytes, STATE_BYTES);
    bool fits = le64toh(saved[0]) == guest->seed && le64toh(saved[1]) == guest->size_bytes;
    if ((state->kind == NIL && guest->role == PAUSED) || (fits && guest->role == WAITING)) {
        if (fits)
            guest->epoch = epoch, guest->step = le64toh(saved[2]), guest->first_step = true;
        guest->role = fits ? ARRIVING : RUNNING;
        tell("resumed", guest->step);
        give_order(guest, GO);
    }
    if (state->kind == BIN && guest->role == ARRIVING && guest->epoch == epoch) /* also when it is asked again */
        SAY(guest, TEXT("type", "running"), NUMBER("epoch", epoch));
    else if (state->kind == BIN)
        SAY(guest, TEXT("type", "resume_failed"), NUMBER("epoch", epoch), TEXT("reason", "it does not wait for this state"));
}

static bool obey(struct guest *guest, const struct in *in) { /* false: a message that may not come, or not now */
    const struct value *deadline = field(in, "deadline_ms", INT, 1, 600000), *epoch = field(in, "epoch", INT, 0, UINT32_MAX);
    const struct value *state = field(in, "state", BIN, 0, STATE_LIMIT);
    state = state != NULL ? state : field(in, "state", NIL, 0, 0);
    if (is_message(in, "welcome", 3) && field(in, "major", INT, 1, 1))
        tell(guest->role == WAITING ? "waiting" : "started", 0);
    else if (is_message(in, "refused", 4))
        fail("refused"); /* a VMM would show `what`, `expected` and `got`; a guest that runs would run on */
    else if (is_message(in, "prepare", 0))
        SAY(guest, TEXT("type", "prepared")); /* the worker is there already, and its memory must not be touched */
    else if (is_message(in, "pause", 1) && deadline != NULL)
        pause_guest(guest, deadline->number);
    else if (is_message(in, "resume", 2) && epoch != NULL && state != NULL)
        resume_guest(guest, epoch->number, state);
    else if (is_message(in, "complete", 0) && guest->role == ARRIVING) {
        close(guest->userfault);
        guest->userfault = -1, guest->role = RUNNING;
        give_order(guest, CHECK);
    } else if (is_message(in, "released", 0) && guest->role == PAUSED)
        guest->role = DEPARTED;
    else
        return false;
    return true;
}

int main(int count, char **arguments) {
    static struct in in;
    static struct guest guest = {.userfault = -1, .daemon = -1};
    pthread_t worker;
    setvbuf(stdout, NULL, _IOLBF, 0);
    bool waiting = count > 1 && strcmp(arguments[1], "waiting") == 0;
    if (count < 6 || count > 7 || (!waiting && strcmp(arguments[1], "running") != 0) || strlen(arguments[3]) > 64)
        fail("usage: foreign-guest running|waiting SOCKET GUEST_ID SIZE_BYTES SEED [STEPS]");
    guest.role = waiting ? WAITING : RUNNING, guest.socket_path = arguments[2], guest.id = arguments[3];
    guest.size_bytes = strtoull(arguments[4], NULL, 10), guest.pages = guest.size_bytes / PAGE_BYTES;
    guest.seed = strtoull(arguments[5], NULL, 10);
    guest.steps_limit = count == 7 ? strtoull(arguments[6], NULL, 10) : UINT64_MAX;
    if (guest.pages == 0 || (guest.size_bytes & (guest.size_bytes - 1)) != 0)
        fail("SIZE_BYTES is not a power of two of at least a page");
    make_memory(&guest);
    if (pipe2(guest.orders, O_CLOEXEC) || pipe2(guest.reports, O_CLOEXEC) || pthread_create(&worker, NULL, work, &guest))
        fail("no worker");
    while (guest.role != DEPARTED) {
        if (guest.daemon < 0 && (guest.role == WAITING || guest.role == RUNNING))
            attach(&guest); /* the others stay as they are without a daemon: it may be that they run elsewhere */
        struct pollfd ready[2] = {{.fd = guest.reports[0], .events = POLLIN}, {.fd = guest.daemon, .events = POLLIN}};
        poll(ready, 2, guest.daemon < 0 ? 100 : -1);
        if (ready[0].revents != 0)
            hear_worker(&guest);
        else if (ready[1].revents != 0 && !(take_message(&guest, &in) && obey(&guest, &in))) {
            close(guest.daemon); /* gone or confused: no reason for a guest to end */
            guest.daemon = -1;
            tell("detached", 0);
        }
    }
    give_order(&guest, END);
    pthread_join(worker, NULL);
    tell("released", guest.step);
    return 0;
}
