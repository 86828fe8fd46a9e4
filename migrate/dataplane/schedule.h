/* What a thread tells the scheduler of itself. Hints that need no privilege; where the kernel does not know them, nothing. */
#ifndef POSTCOPY_SCHEDULE_H
#define POSTCOPY_SCHEDULE_H

/* Somebody waits for this thread: run it soon after it is woken. */
void schedule_urgent(void);
/* Nobody waits: let others go first. */
void schedule_bulk(void);

#endif
