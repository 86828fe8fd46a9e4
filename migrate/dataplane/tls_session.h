/* What tls.c (handshake, names) and tls_bytes.c (the bytes of loops) share of one session. */
#ifndef POSTCOPY_TLS_SESSION_H
#define POSTCOPY_TLS_SESSION_H

#include <openssl/ssl.h>

#include "tls.h"

struct tls_session {
    SSL *ssl;
    int socket; /* borrowed */
    int send_flags;
    int error_number; /* of the socket's last failure */
    bool ended;       /* the peer sends nothing more */
    bool broken;      /* what has come is no TLS of this session */
    bool more;        /* input that no poll(2) shows */
    bool drained;     /* the last recv(2) took all that the socket had */
    char *out;        /* records on their way to the socket */
    size_t out_start, out_end;
    size_t promised_bytes; /* tls_send has encrypted them, and their records are still in out */
    uint64_t rekey_bytes, sent_bytes; /* with this key */
    struct tls_session *next;
};

/* Records from the session and into it: memory on the one side, so that many go out with one call, the socket on the other. */
BIO *tls_bio_new(struct tls_session *session);
int tls_out_init(struct tls_session *session);
/* What waits in out: 1 when all of it has gone, 0 when the socket is full, -1 when it has failed (error_number). */
int tls_flush(struct tls_session *session);

#endif
