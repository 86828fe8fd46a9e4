/* See debugcon.h. */
#include "debugcon.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/io.h>

#define PORT 0xe9
#define LINE_BYTES_MAX 16384 /* every bucket of a histogram: 496 of up to 32 characters */
#define BEAT 0x80
#define BEAT_STEPPED 0x40
#define BEAT_NUMBER_MASK 0x3f

static pthread_mutex_t one_line = PTHREAD_MUTEX_INITIALIZER;
static _Atomic uint64_t beats;

int debugcon_open(void)
{
    return ioperm(PORT, 1, 1);
}

void debugcon_beat(bool stepped)
{
    uint64_t number = atomic_load(&beats);
    outb((unsigned char)(BEAT | (stepped ? BEAT_STEPPED : 0) | (number & BEAT_NUMBER_MASK)), PORT);
    atomic_store(&beats, number + 1);
}

uint64_t debugcon_beats(void)
{
    return atomic_load(&beats);
}

void debugcon_line(const char *format, ...)
{
    static char line[LINE_BYTES_MAX];
    va_list arguments;
    pthread_mutex_lock(&one_line);
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    length = length < 0 ? 0 : length > (int)sizeof line - 2 ? (int)sizeof line - 2 : length;
    line[length++] = '\n';
    outsb(PORT, line, (unsigned long)length);
    pthread_mutex_unlock(&one_line);
}
