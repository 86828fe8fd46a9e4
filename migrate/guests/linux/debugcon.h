/* What the guest tells the host: bytes written to QEMU's isa-debugcon (port 0xe9), one stream of two kinds of byte.
 *
 * 0x80..0xff  a heartbeat, one a millisecond: bits 0-5 count them (modulo 64), bit 6 says that the touching threads have completed
 *             a step since the last one. The host dates them as it reads them: the guest's clocks stand still with the guest.
 * 0x00..0x7f  text in lines that end in '\n'; heartbeats come between its bytes. A line is a word and fields NAME=VALUE:
 *
 *     ready vcpus= threads= pages= seed=         memory is written; from here on it is touched and checked
 *     report ns= steps= writes= verifications= beats=    totals, every report_ms; ns: the guest's CLOCK_MONOTONIC
 *     touch LOW:COUNT ...                        latencies of all touches so far: lower bound of a bucket in ns, how many
 *     disk writes= reads= errors= wrong=         totals, if there is a disk
 *     failed kind= thread= page= pages= expected= got=   a check of memory has failed, nothing is touched any more
 *     disk-failed write= block= errno=           a read (write=0) or write of the disk failed
 *     disk-wrong block= version= expected= got=  a block read back does not hold what was written: its first wrong word
 *     flipped page= byte=                        what postcopy.corrupt asked for is done
 *     fatal errno= what=                         the guest cannot work, and powers off
 *
 * report, touch, disk and failed come again and again. A machine that is moved may be amid a line: its end is the first that the
 * destination tells, and belongs to nothing there. */
#ifndef POSTCOPY_LINUX_DEBUGCON_H
#define POSTCOPY_LINUX_DEBUGCON_H

#include <stdbool.h>
#include <stdint.h>

/* The right to write to the port: threads made later have it too. 0 or -1 with errno. */
int debugcon_open(void);
/* No lock: never behind a line, nor behind a thread that stands in a fault. One thread's alone. */
void debugcon_beat(bool stepped);
uint64_t debugcon_beats(void);
/* One line, whole; the newline is added. Any thread. */
__attribute__((format(printf, 1, 2))) void debugcon_line(const char *format, ...);

#endif
