/* /init of the Linux test guest: the built-in workload on a large anonymous area, heartbeats, and disk I/O if it has a disk.
 *
 * Parameters are the kernel's, postcopy.NAME=VALUE (machine.py has them all with their meaning). What it finds goes out as debugcon.h says.
 *
 * Clocks. Touches are timed by CLOCK_MONOTONIC on clocksource=tsc (on the kernel's command line): read in user mode, without a
 * device of QEMU's that would have to be waited for, and it runs on while a virtual CPU stands in a fault, whose length is thus
 * told. It stands still while QEMU has stopped the machine: downtime is told by the heartbeats, dated by the host, and by nothing here.
 *
 * Where there are several virtual CPUs the touching threads have all but the last, which a heartbeat thread before all others,
 * the disk and the reports share: a fault of the one leaves the others running. No swap exists here. */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "debugcon.h"
#include "disk.h"
#include "workload.h"

#define BEAT_NS UINT64_C(1000000)
#define PAUSE_DEADLINE_NS UINT64_C(10000000000)
#define MIB (UINT64_C(1) << 20)
#define MODULES "/modules"

struct parameters {
    struct workload_config config;
    uint64_t memory_mib, report_ms, verify_ms, corrupt_page, corrupt_ms;
    char disk[32];
};

static const char *const pattern_names[] = {"sequential", "random", "zipf", "chase", "permute"};
static const char *const failure_names[] = {"intact", "lost", "stale", "torn", "swapped", "zeroed", "write-lost", "write-repeated", "rolled-back"};

static __attribute__((noreturn)) void fatal(int failure, const char *what)
{
    debugcon_line("fatal errno=%d what=%s", failure, what);
    sync();
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}

/* The value of postcopy.NAME on the command line, cut to fit; false: not given. */
static bool parameter_text(const char *line, const char *name, char *value, size_t capacity)
{
    char wanted[64];
    snprintf(wanted, sizeof wanted, " postcopy.%s=", name);
    const char *found = strstr(line, wanted);
    if (found == NULL)
        return false;
    found += strlen(wanted);
    size_t length = strcspn(found, " \n");
    snprintf(value, capacity, "%.*s", (int)length, found);
    return true;
}

static uint64_t parameter(const char *line, const char *name, uint64_t otherwise)
{
    char value[32], *end;
    if (!parameter_text(line, name, value, sizeof value))
        return otherwise;
    uint64_t number = strtoull(value, &end, 10);
    if (!isdigit((unsigned char)value[0]) || *end != '\0')
        fatal(EINVAL, name);
    return number;
}

static uint32_t parameter_pattern(const char *line)
{
    char value[32];
    if (!parameter_text(line, "pattern", value, sizeof value))
        return WORKLOAD_RANDOM;
    for (uint32_t i = 0; i < sizeof pattern_names / sizeof pattern_names[0]; i++)
        if (strcmp(value, pattern_names[i]) == 0)
            return i;
    fatal(EINVAL, "pattern");
}

static struct parameters parameters_read(void)
{
    char line[4096] = " ";
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, line + 1, sizeof line - 2) < 0)
        fatal(errno, "/proc/cmdline");
    close(fd);
    struct parameters parameters = {
        .config = {
            .seed = parameter(line, "seed", 1), .rate_per_second = parameter(line, "rate", 0),
            .threads = (uint32_t)parameter(line, "threads", 1), .pattern = parameter_pattern(line),
            .write_per_mille = (uint32_t)parameter(line, "write_percent", 25) * 10,
        },
        .memory_mib = parameter(line, "memory_mib", 64), .report_ms = parameter(line, "report_ms", 200),
        .verify_ms = parameter(line, "verify_ms", 0), .corrupt_page = parameter(line, "corrupt", 0),
        .corrupt_ms = parameter(line, "corrupt_ms", 0),
    };
    parameter_text(line, "disk", parameters.disk, sizeof parameters.disk);
    return parameters;
}

static void modules_load(void)
{
    struct dirent **names;
    char path[sizeof MODULES + 1 + sizeof names[0]->d_name];
    int count = scandir(MODULES, &names, NULL, alphasort); /* named in the order in which they need each other */
    for (int i = 0; i < count; i++) {
        if (names[i]->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, MODULES "/%s", names[i]->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST))
            fatal(errno, path);
        close(fd);
    }
}

/* The caller and the threads it makes from here on: on the last virtual CPU, or on all others. */
static void stay_on(bool last)
{
    int cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int cpu = 0; cpu < cpus; cpu++)
        if (cpus == 1 || (cpu == cpus - 1) == last)
            CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) != 0)
        fatal(errno, "sched_setaffinity");
}

static void *beat_main(void *argument)
{
    const struct workload *workload = argument;
    uint64_t steps = workload_steps(workload), due_ns = clock_monotonic_ns();
    for (;;) {
        uint64_t now_ns = clock_monotonic_ns(), before = steps;
        due_ns = due_ns + BEAT_NS > now_ns ? due_ns + BEAT_NS : now_ns; /* none is made up for */
        struct timespec due = {.tv_sec = (time_t)(due_ns / 1000000000u), .tv_nsec = (long)(due_ns % 1000000000u)};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
        steps = workload_steps(workload);
        debugcon_beat(steps != before);
    }
    return NULL;
}

static void beat_start(struct workload *workload)
{
    pthread_t thread;
    pthread_attr_t attributes;
    const struct sched_param priority = {.sched_priority = 1};
    pthread_attr_init(&attributes);
    pthread_attr_setinheritsched(&attributes, PTHREAD_EXPLICIT_SCHED);
    pthread_attr_setschedpolicy(&attributes, SCHED_FIFO);
    pthread_attr_setschedparam(&attributes, &priority);
    int failure = pthread_create(&thread, &attributes, beat_main, workload);
    if (failure != 0)
        fatal(failure, "heartbeat thread");
}

/* Behind the checker's back, while nothing touches: the middle byte of a page. */
static void corrupt(struct workload *workload, uint8_t *memory, uint64_t page)
{
    if (workload_pause(workload, clock_monotonic_ns() + PAUSE_DEADLINE_NS) != 0)
        fatal(ETIMEDOUT, "corrupt");
    memory[page * WORKLOAD_BLOCK_BYTES + WORKLOAD_BLOCK_BYTES / 2] ^= 0xff;
    debugcon_line("flipped page=%llu byte=%d", (unsigned long long)page, WORKLOAD_BLOCK_BYTES / 2);
    workload_resume(workload);
}

static void tell_touches(const struct histogram_copy *touch)
{
    static char text[HISTOGRAM_BUCKETS * 32];
    size_t length = 0;
    for (uint32_t i = 0; i < HISTOGRAM_BUCKETS; i++)
        if (touch->bucket[i] != 0)
            length += (size_t)snprintf(text + length, sizeof text - length, " %llu:%llu", (unsigned long long)histogram_bucket_low_ns(i),
                                       (unsigned long long)touch->bucket[i]);
    debugcon_line("touch%s", length != 0 ? text : "");
}

static void tell_failure(const struct workload_failure *failure)
{
    debugcon_line("failed kind=%s thread=%u page=%llu pages=%llu expected=%llu got=%llu", failure_names[failure->kind], failure->thread,
                  (unsigned long long)failure->block_index, (unsigned long long)failure->block_count,
                  (unsigned long long)failure->expected, (unsigned long long)failure->got);
}

/* All of it each time: a line that a switch from one host to another cuts in two is nobody's. */
static void tell(const struct workload *workload, bool with_disk)
{
    static struct workload_report report;
    struct disk_report disk;
    workload_read(workload, &report);
    debugcon_line("report ns=%llu steps=%llu writes=%llu verifications=%u beats=%llu", (unsigned long long)clock_monotonic_ns(),
                  (unsigned long long)report.steps, (unsigned long long)report.writes, report.verifications,
                  (unsigned long long)debugcon_beats());
    tell_touches(&report.touch);
    if (with_disk) {
        disk_read(&disk);
        debugcon_line("disk writes=%llu reads=%llu errors=%llu wrong=%llu", (unsigned long long)disk.writes, (unsigned long long)disk.reads,
                      (unsigned long long)disk.errors, (unsigned long long)disk.wrong);
    }
    if (report.phase == WORKLOAD_FAILED)
        tell_failure(&report.failure);
}

static void sleep_ms(uint64_t milliseconds)
{
    const struct timespec duration = {.tv_sec = (time_t)(milliseconds / 1000), .tv_nsec = (long)(milliseconds % 1000 * 1000000)};
    nanosleep(&duration, NULL);
}

static struct workload *work_start(const struct parameters *parameters, uint8_t *memory)
{
    struct workload *workload = workload_create(memory, parameters->memory_mib * MIB);
    stay_on(false);
    int result = workload == NULL ? -errno : workload_start(workload, &parameters->config);
    if (result != 0)
        fatal(-result, "workload");
    stay_on(true);
    while (workload_steps(workload) == 0) /* all is written before the first step */
        sleep_ms(1);
    return workload;
}

static __attribute__((noreturn)) void report_for_ever(struct workload *workload, uint8_t *memory, const struct parameters *parameters)
{
    uint64_t begun_ns = clock_monotonic_ns(), verified_ns = begun_ns;
    bool corrupted = parameters->corrupt_page == 0;
    for (;;) {
        uint64_t now_ns = clock_monotonic_ns();
        if (!corrupted && now_ns - begun_ns >= parameters->corrupt_ms * 1000000) {
            corrupt(workload, memory, parameters->corrupt_page);
            corrupted = true;
        }
        if (parameters->verify_ms != 0 && now_ns - verified_ns >= parameters->verify_ms * 1000000) {
            workload_verify(workload);
            verified_ns = now_ns;
        }
        tell(workload, parameters->disk[0] != '\0');
        sleep_ms(parameters->report_ms);
    }
}

int main(void)
{
    if (debugcon_open() != 0 || mkdir("/proc", 0755) != 0 || mount("proc", "/proc", "proc", 0, NULL) != 0)
        fatal(errno, "/proc");
    if ((mkdir("/dev", 0755) != 0 && errno != EEXIST) || mount("devtmpfs", "/dev", "devtmpfs", 0, NULL) != 0)
        fatal(errno, "/dev");
    struct parameters parameters = parameters_read();
    modules_load();

    uint8_t *memory = mmap(NULL, parameters.memory_mib * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fatal(errno, "memory");
    struct workload *workload = work_start(&parameters, memory);
    beat_start(workload);
    int result = parameters.disk[0] != '\0' ? disk_start(parameters.disk, parameters.config.seed) : 0;
    if (result != 0)
        fatal(-result, parameters.disk);
    debugcon_line("ready vcpus=%ld threads=%u pages=%llu seed=%llu", sysconf(_SC_NPROCESSORS_ONLN), parameters.config.threads,
                  (unsigned long long)(parameters.memory_mib * MIB / WORKLOAD_BLOCK_BYTES), (unsigned long long)parameters.config.seed);
    if (parameters.report_ms == 0 || parameters.corrupt_page >= parameters.memory_mib * MIB / WORKLOAD_BLOCK_BYTES)
        fatal(EINVAL, "report_ms or corrupt");
    report_for_ever(workload, memory, &parameters);
}
