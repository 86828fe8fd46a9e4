/* Processes and sockets of the floor: started by fork, bound to their parent, reaped by id. */
#include "floor.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define PROCESSES_MAX 4

static const char *own_name = "parent";
static const char *process_name[PROCESSES_MAX];
static volatile pid_t process[PROCESSES_MAX]; /* 0 once reaped */
static volatile sig_atomic_t process_count, deadline_passed;
static char deadline_message[128]; /* for a process that is alone */

static void kill_processes(void)
{
    for (int i = 0; i < process_count; i++)
        if (process[i] != 0)
            kill(process[i], SIGKILL);
}

void floor_name(const char *name)
{
    own_name = name;
}

void floor_expect(int condition, const char *what)
{
    if (condition)
        return;
    fprintf(stderr, "%s: %s: %s%s%s\n", program_invocation_short_name, own_name, what, errno ? ": " : " is not as it should be",
            errno ? strerror(errno) : "");
    if (process_count > 0) { /* the parent: end what it started, and reap it */
        kill_processes();
        floor_reap();
    }
    _exit(1);
}

void floor_check(int condition, const char *what)
{
    errno = 0;
    floor_expect(condition, what);
}

void floor_start(const char *name, void (*body)(struct floor_world *), struct floor_world *world)
{
    pid_t parent = getpid();
    pid_t pid = fork();
    floor_expect(pid >= 0, "fork");
    if (pid == 0) {
        process_count = 0;
        own_name = name;
        floor_expect(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0 && getppid() == parent, "bind to the parent");
        body(world);
        _exit(0);
    }
    process_name[process_count] = name;
    process[process_count] = pid;
    process_count++;
}

void floor_reap(void)
{
    int failed = 0;
    if (deadline_passed) /* before the last of them was noted */
        kill_processes();
    for (int left = process_count; left > 0;) {
        int status;
        pid_t pid = wait(&status);
        if (pid < 0 && errno == EINTR)
            continue;
        floor_expect(pid > 0, "wait");
        for (int i = 0; i < process_count; i++) {
            if (process[i] != pid)
                continue;
            process[i] = 0;
            left--;
            if (status != 0 && !failed) {
                failed = 1;
                fprintf(stderr, "%s: %s %s\n", program_invocation_short_name, process_name[i],
                        deadline_passed ? "had not finished at the deadline" : "failed");
                kill_processes();
            }
        }
    }
    if (failed)
        exit(1);
}

static void on_deadline(int signal_number)
{
    (void)signal_number;
    deadline_passed = 1;
    if (process_count == 0) {
        ssize_t written = write(STDERR_FILENO, deadline_message, strlen(deadline_message));
        (void)written;
        _exit(1);
    }
    kill_processes(); /* floor_reap() then sees them end */
}

void floor_deadline(unsigned seconds)
{
    struct sigaction action = {.sa_handler = on_deadline};
    snprintf(deadline_message, sizeof deadline_message, "%s: %s: the deadline passed\n", program_invocation_short_name, own_name);
    /* No SA_RESTART is needed: the handler makes the awaited processes end. */
    floor_expect(sigaction(SIGALRM, &action, NULL) == 0, "sigaction");
    alarm(seconds);
}

static int prepare(int socket_fd)
{
    int one = 1;
    floor_expect(setsockopt(socket_fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) == 0, "TCP_NODELAY");
    return socket_fd;
}

static int create_socket(const char *congestion_control)
{
    int socket_fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    floor_expect(socket_fd >= 0, "socket");
    if (strcmp(congestion_control, "system") != 0)
        floor_expect(setsockopt(socket_fd, IPPROTO_TCP, TCP_CONGESTION, congestion_control,
                                (socklen_t)strlen(congestion_control)) == 0, "TCP_CONGESTION");
    return socket_fd;
}

int floor_listen(const char *congestion_control)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int listener = create_socket(congestion_control); /* what is accepted inherits it */
    floor_expect(bind(listener, (struct sockaddr *)&address, sizeof address) == 0 && listen(listener, 4) == 0, "listen");
    return listener;
}

int floor_accept(int listener)
{
    int socket_fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    floor_expect(socket_fd >= 0, "accept");
    return prepare(socket_fd);
}

int floor_connect(const struct floor_world *world)
{
    struct sockaddr_in address;
    socklen_t size = sizeof address;
    int socket_fd = create_socket(world->options.congestion_control);
    floor_expect(getsockname(world->listener, (struct sockaddr *)&address, &size) == 0 &&
                     connect(socket_fd, (struct sockaddr *)&address, size) == 0, "connect");
    return prepare(socket_fd);
}

void floor_send(int socket_fd, const void *bytes, size_t size_bytes, int flags)
{
    for (size_t done = 0; done < size_bytes;) {
        ssize_t sent = send(socket_fd, (const char *)bytes + done, size_bytes - done, MSG_NOSIGNAL | flags);
        floor_expect(sent > 0, "send");
        done += (size_t)sent;
    }
}

size_t floor_receive(int socket_fd, void *bytes, size_t size_bytes)
{
    for (size_t done = 0; done < size_bytes;) {
        errno = 0; /* so that an end in the middle of a message is not blamed on something older */
        ssize_t received = recv(socket_fd, (char *)bytes + done, size_bytes - done, MSG_WAITALL);
        if (received == 0 && done == 0)
            return 0;
        floor_expect(received > 0, "receive");
        done += (size_t)received;
    }
    return size_bytes;
}

double floor_cpu_seconds(void)
{
    struct rusage usage;
    floor_expect(getrusage(RUSAGE_SELF, &usage) == 0, "getrusage");
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}
