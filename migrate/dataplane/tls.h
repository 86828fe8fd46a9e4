/* TLS on data connections: OpenSSL's sessions, the handshake, and the bytes behind channel.h.
 *
 * A context is what a daemon has: its certificate, its key, whom it trusts. A session is one connection. It goes with its socket, as
 * the kernel's own state of the connection does: the loops are given a descriptor, and channel_of finds the session that is on it.
 * So a session is destroyed before its descriptor is closed, when no loop uses it any more.
 *
 * TLS 1.3 alone, both sides with a certificate, no tickets, no early data, no renegotiation. Which names are allowed is not decided
 * here: Python has the list, for these connections and for its own. */
#ifndef POSTCOPY_TLS_H
#define POSTCOPY_TLS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "dataplane.h"

#define TLS_WHY_BYTES 256
#define TLS_REKEY_BYTES (UINT64_C(1) << 36) /* 2^22 records; RFC 8446 5.5 allows AES-GCM 2^24.5 with one key */

struct tls_context;
struct tls_session;

enum tls_outcome {
    TLS_DONE = 0,
    TLS_DEADLINE = 1,
    TLS_CLOSED = 2, /* by the peer */
    TLS_FAILED = 3, /* why says how */
};

/* From PEM files, which are not needed any more then. NULL: why says which one is wrong. A key with a passphrase is. */
struct tls_context *tls_context_create(const char *certificate_path, const char *key_path, const char *authority_path,
                                       char why[TLS_WHY_BYTES]);
/* Its sessions may live on. */
void tls_context_destroy(struct tls_context *context);
/* So many bytes go out with one key. */
void tls_context_rekey(struct tls_context *context, uint64_t bytes);
/* Of our own certificate: its names, as tls_peer_names tells a peer's, and from when until when it is valid, in seconds of Unix time. */
size_t tls_context_names(const struct tls_context *context, char *names, size_t capacity_bytes);
int64_t tls_context_valid_from(const struct tls_context *context);
int64_t tls_context_valid_until(const struct tls_context *context);

/* On a connected socket, which stays the caller's. NULL: no memory. */
struct tls_session *tls_session_create(struct tls_context *context, int socket, bool accepts);
/* Says that nothing more comes, if the socket takes it at once. */
void tls_session_destroy(struct tls_session *session);

/* Before a loop has the connection, each blocking at most so long; shutdown(2) on the socket ends them at once. */
enum tls_outcome tls_handshake(struct tls_session *session, uint32_t deadline_ms, char why[TLS_WHY_BYTES]);
/* Of the peer's certificate, its DNS names, a line each. Bytes, 0 for none; what is no name or does not fit is left out. */
size_t tls_peer_names(struct tls_session *session, char *names, size_t capacity_bytes);
enum tls_outcome tls_write(struct tls_session *session, const void *bytes, size_t size_bytes, uint32_t deadline_ms, char why[TLS_WHY_BYTES]);
/* Until all of it has come; *received_bytes says how much did in any case. */
enum tls_outcome tls_read(struct tls_session *session, void *buffer, size_t size_bytes, uint32_t deadline_ms, size_t *received_bytes,
                          char why[TLS_WHY_BYTES]);

/* The rest is channel.c's: as the calls of that name there. */
#define TLS_RECORD_BYTES ((size_t)16 << 10) /* the most that one record carries */
#define TLS_HELD_BYTES ((size_t)17 << 10)   /* of a record that is not whole, received and not shown yet: less than this */

struct tls_session *tls_on(int socket);
/* Something is here already for which no poll(2) of the socket would wake us. */
bool tls_has_input(const struct tls_session *session);
ssize_t tls_receive(struct tls_session *session, void *buffer, size_t capacity_bytes, struct loop_result *result);
ssize_t tls_send(struct tls_session *session, const void *bytes, size_t size_bytes, struct loop_result *result);
bool tls_send_all(struct tls_session *session, struct iovec *pieces, int piece_count, int send_flags, uint64_t *blocked_ns, int stop_fd,
                  struct loop_result *result);

#endif
