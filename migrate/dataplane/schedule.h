/* What a thread tells the scheduler of itself. Hints that need no privilege; where the kernel does not know them, nothing. */
#ifndef POSTCOPY_SCHEDULE_H
#define POSTCOPY_SCHEDULE_H

/* The name that ps -L, top -H and perf show: fault, receive, serve, stream. */
void thread_named(const char *name);

/* A page fault waits for this thread: run it as soon as it is woken, before all others here. */
void schedule_urgent(void);
/* Other processes wait for this thread's answers: run it before those that only work. */
void schedule_soon(void);
/* As any thread: what threads that are made from here on inherit. */
void schedule_normal(void);
/* Nobody waits: let others go first. */
void schedule_bulk(void);

#endif
