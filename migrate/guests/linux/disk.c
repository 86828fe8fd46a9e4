/* See disk.h. The buffers are many pages, used in turn: QEMU reads and writes them itself, outside of any virtual CPU, and so takes
 * the faults of those that have not arrived yet inside the kernel, in pread and pwrite on the image. */
#include "disk.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "debugcon.h"
#include "verify.h"

#define BLOCK_BYTES 4096
#define WORDS (BLOCK_BYTES / 8)
#define BLOCKS_MAX 16384
#define BUFFERS 1024
#define PAUSE_NS 1000000 /* between two pairs of a write and a read */

static struct {
    int fd;
    uint64_t seed, random, blocks;
    uint8_t *buffers;
    uint32_t version[BLOCKS_MAX]; /* 0: not written yet */
    _Atomic uint64_t writes, reads, errors, wrong, used;
} disk;

static uint64_t word_of(uint64_t block, uint64_t version, uint64_t index)
{
    return mix64(disk.seed ^ block << 32 ^ version) + index;
}

static uint64_t next_random(void)
{
    return mix64(disk.random += UINT64_C(0x9e3779b97f4a7c15));
}

static uint64_t *next_buffer(void)
{
    return (uint64_t *)(void *)(disk.buffers + atomic_fetch_add(&disk.used, 1) % BUFFERS * BLOCK_BYTES);
}

static bool transferred(ssize_t done, bool write, uint64_t block)
{
    if (done == BLOCK_BYTES)
        return true;
    int failure = done < 0 ? errno : EIO;
    atomic_fetch_add(&disk.errors, 1);
    debugcon_line("disk-failed write=%d block=%llu errno=%d", write, (unsigned long long)block, failure);
    return false;
}

static void write_block(uint64_t block)
{
    uint64_t *words = next_buffer();
    uint32_t version = disk.version[block] + 1;
    for (uint64_t i = 0; i < WORDS; i++)
        words[i] = word_of(block, version, i);
    if (!transferred(pwrite(disk.fd, words, BLOCK_BYTES, (off_t)(block * BLOCK_BYTES)), true, block)) {
        disk.version[block] = 0; /* nobody knows what it holds now */
        return;
    }
    disk.version[block] = version;
    atomic_fetch_add(&disk.writes, 1);
}

static void read_block(uint64_t block)
{
    uint32_t version = disk.version[block];
    uint64_t *words = next_buffer();
    if (version == 0)
        return;
    if (!transferred(pread(disk.fd, words, BLOCK_BYTES, (off_t)(block * BLOCK_BYTES)), false, block))
        return;
    atomic_fetch_add(&disk.reads, 1);
    for (uint64_t i = 0; i < WORDS; i++) {
        uint64_t expected = word_of(block, version, i);
        if (words[i] == expected)
            continue;
        atomic_fetch_add(&disk.wrong, 1);
        debugcon_line("disk-wrong block=%llu version=%u expected=%llu got=%llu", (unsigned long long)block, version,
                      (unsigned long long)expected, (unsigned long long)words[i]);
        disk.version[block] = 0; /* said once */
        return;
    }
}

static void *disk_main(void *argument)
{
    const struct timespec pause = {.tv_nsec = PAUSE_NS};
    for (;;) {
        write_block(next_random() % disk.blocks);
        read_block(next_random() % disk.blocks);
        nanosleep(&pause, NULL);
    }
    return argument;
}

int disk_start(const char *device, uint64_t seed)
{
    uint64_t size_bytes = 0;
    pthread_t thread;
    disk.fd = open(device, O_RDWR | O_DIRECT | O_CLOEXEC);
    if (disk.fd < 0 || ioctl(disk.fd, BLKGETSIZE64, &size_bytes) != 0)
        return -errno;
    disk.blocks = size_bytes / BLOCK_BYTES < BLOCKS_MAX ? size_bytes / BLOCK_BYTES : BLOCKS_MAX;
    if (disk.blocks == 0)
        return -ENOSPC;
    disk.seed = disk.random = mix64(seed);
    disk.buffers = mmap(NULL, (size_t)BUFFERS * BLOCK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (disk.buffers == MAP_FAILED)
        return -errno;
    return -pthread_create(&thread, NULL, disk_main, NULL);
}

void disk_read(struct disk_report *report)
{
    *report = (struct disk_report){
        .writes = atomic_load(&disk.writes), .reads = atomic_load(&disk.reads),
        .errors = atomic_load(&disk.errors), .wrong = atomic_load(&disk.wrong),
    };
}
