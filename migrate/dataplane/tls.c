/* See tls.h. Handshake, preamble and its answer run here, on a thread of their own, which may wait. */
#include "tls.h"

#include <errno.h>
#include <limits.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "histogram.h"
#include "tls_session.h"

#define INPUT_BYTES ((size_t)64 << 10) /* received with one call: four records; with 256 KiB they leave the cache, a fifth of user time */

struct tls_context {
    SSL_CTX *ssl;
    uint64_t rekey_bytes;
};

static pthread_mutex_t sessions_lock = PTHREAD_MUTEX_INITIALIZER;
static struct tls_session *sessions;

/* OpenSSL's reason, never its data: no path, no content of a file. */
static void tell(char why[TLS_WHY_BYTES], const char *what)
{
    unsigned long error = ERR_peek_error();
    const char *reason = error != 0 ? ERR_reason_error_string(error) : NULL;
    snprintf(why, TLS_WHY_BYTES, "%s%s%s", what, reason ? ": " : "", reason ? reason : "");
    ERR_clear_error();
}

static int no_passphrase(char *buffer, int size, int writes, void *context)
{
    (void)buffer, (void)size, (void)writes, (void)context;
    return -1; /* a daemon has nobody to ask */
}

static bool configure(SSL_CTX *ssl, const char *certificate_path, const char *key_path, const char *authority_path, const char **what)
{
    SSL_CTX_set_default_passwd_cb(ssl, no_passphrase);
    SSL_CTX_set_verify(ssl, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    SSL_CTX_set_session_cache_mode(ssl, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_read_ahead(ssl, 1);
    SSL_CTX_set_default_read_buffer_len(ssl, INPUT_BYTES);
    *what = "TLS 1.3"; /* the suites of Python's ssl too; here the one first that every TLS 1.3 has, which is the fastest by a fifth */
    if (!SSL_CTX_set_ciphersuites(ssl, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"))
        return false;
    if (!SSL_CTX_set_min_proto_version(ssl, TLS1_3_VERSION) || !SSL_CTX_set_max_proto_version(ssl, TLS1_3_VERSION) ||
        !SSL_CTX_set_num_tickets(ssl, 0))
        return false;
    *what = "certificate";
    if (SSL_CTX_use_certificate_chain_file(ssl, certificate_path) != 1)
        return false;
    *what = "key";
    if (SSL_CTX_use_PrivateKey_file(ssl, key_path, SSL_FILETYPE_PEM) != 1 || SSL_CTX_check_private_key(ssl) != 1)
        return false;
    *what = "authority";
    return SSL_CTX_load_verify_file(ssl, authority_path) == 1;
}

struct tls_context *tls_context_create(const char *certificate_path, const char *key_path, const char *authority_path,
                                       char why[TLS_WHY_BYTES])
{
    const char *what = "memory";
    struct tls_context *context = calloc(1, sizeof(*context));
    ERR_clear_error();
    if (context)
        context->ssl = SSL_CTX_new(TLS_method());
    if (!context || !context->ssl || !configure(context->ssl, certificate_path, key_path, authority_path, &what)) {
        tell(why, what);
        tls_context_destroy(context);
        return NULL;
    }
    context->rekey_bytes = TLS_REKEY_BYTES;
    return context;
}

void tls_context_destroy(struct tls_context *context)
{
    if (context)
        SSL_CTX_free(context->ssl); /* a session has its own reference */
    free(context);
}

void tls_context_rekey(struct tls_context *context, uint64_t bytes)
{
    context->rekey_bytes = bytes;
}

/* --- sessions ---------------------------------------------------------------------------------------------------- */

static void session_free(struct tls_session *session)
{
    SSL_free(session->ssl);
    free(session->out);
    free(session);
}

struct tls_session *tls_session_create(struct tls_context *context, int socket, bool accepts)
{
    struct tls_session *session = calloc(1, sizeof(*session));
    if (!session)
        return NULL;
    session->socket = socket;
    session->rekey_bytes = context->rekey_bytes;
    session->ssl = SSL_new(context->ssl);
    BIO *bio = session->ssl && tls_out_init(session) == 0 ? tls_bio_new(session) : NULL;
    if (!bio) {
        session_free(session);
        return NULL;
    }
    SSL_set_bio(session->ssl, bio, bio);
    if (accepts)
        SSL_set_accept_state(session->ssl);
    else
        SSL_set_connect_state(session->ssl);
    pthread_mutex_lock(&sessions_lock);
    session->next = sessions;
    sessions = session;
    pthread_mutex_unlock(&sessions_lock);
    return session;
}

void tls_session_destroy(struct tls_session *session)
{
    pthread_mutex_lock(&sessions_lock);
    struct tls_session **at = &sessions;
    while (*at != session)
        at = &(*at)->next;
    *at = session->next;
    pthread_mutex_unlock(&sessions_lock);
    if (SSL_is_init_finished(session->ssl) && !session->broken && !session->ended && tls_flush(session) == 1) {
        SSL_shutdown(session->ssl);
        tls_flush(session);
    }
    ERR_clear_error();
    session_free(session);
}

struct tls_session *tls_on(int socket)
{
    pthread_mutex_lock(&sessions_lock);
    struct tls_session *session = sessions;
    while (session && session->socket != socket)
        session = session->next;
    pthread_mutex_unlock(&sessions_lock);
    return session;
}

/* --- before a loop has it ---------------------------------------------------------------------------------------- */

/* TLS_DONE: try again. */
static enum tls_outcome wait_socket(struct tls_session *session, short events, uint64_t end_ns)
{
    for (;;) {
        uint64_t now_ns = clock_monotonic_ns();
        uint64_t left_ms = now_ns < end_ns ? (end_ns - now_ns + 999999) / 1000000 : 0;
        struct pollfd polled = {.fd = session->socket, .events = events};
        int ready = poll(&polled, 1, left_ms > INT_MAX ? INT_MAX : (int)left_ms);
        if (ready > 0)
            return TLS_DONE;
        if (ready == 0)
            return TLS_DEADLINE;
        if (errno != EINTR)
            return TLS_CLOSED;
    }
}

static enum tls_outcome flush_until(struct tls_session *session, uint64_t end_ns)
{
    for (;;) {
        int flushed = tls_flush(session);
        if (flushed != 0)
            return flushed > 0 ? TLS_DONE : TLS_CLOSED;
        enum tls_outcome outcome = wait_socket(session, POLLOUT, end_ns);
        if (outcome != TLS_DONE)
            return outcome;
    }
}

/* A call has not succeeded: TLS_DONE when it may the next time. An alert that is our word on it has been sent by then. */
static enum tls_outcome go_on(struct tls_session *session, int status, uint64_t end_ns, char why[TLS_WHY_BYTES])
{
    int error = SSL_get_error(session->ssl, status);
    bool again = error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE;
    long verified = SSL_get_verify_result(session->ssl);
    bool alone = ERR_peek_error() == 0 || session->ended;
    if (!again && verified != X509_V_OK) {
        snprintf(why, TLS_WHY_BYTES, "certificate verify failed: %s", X509_verify_cert_error_string(verified));
        ERR_clear_error();
        alone = false;
    } else if (!again && !alone) {
        const char *reason = ERR_reason_error_string(ERR_peek_error());
        snprintf(why, TLS_WHY_BYTES, "%s", reason ? reason : "TLS failed");
        ERR_clear_error();
    }
    enum tls_outcome flushed = flush_until(session, end_ns);
    if (again)
        return flushed != TLS_DONE ? flushed : wait_socket(session, POLLIN, end_ns);
    session->broken = true;
    return alone ? TLS_CLOSED : TLS_FAILED;
}

static uint64_t end_of(uint32_t deadline_ms)
{
    return clock_monotonic_ns() + deadline_ms * UINT64_C(1000000);
}

enum tls_outcome tls_handshake(struct tls_session *session, uint32_t deadline_ms, char why[TLS_WHY_BYTES])
{
    uint64_t end_ns = end_of(deadline_ms);
    why[0] = '\0';
    for (;;) {
        ERR_clear_error();
        int status = SSL_do_handshake(session->ssl);
        if (status == 1)
            return flush_until(session, end_ns);
        enum tls_outcome outcome = go_on(session, status, end_ns, why);
        if (outcome != TLS_DONE)
            return outcome;
    }
}

static size_t names_in(const X509 *certificate, char *names, size_t capacity_bytes)
{
    size_t used_bytes = 0;
    GENERAL_NAMES *found = certificate ? X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL) : NULL;
    for (int i = 0; i < sk_GENERAL_NAME_num(found); i++) {
        const GENERAL_NAME *name = sk_GENERAL_NAME_value(found, i);
        if (name->type != GEN_DNS)
            continue;
        const char *text = (const char *)ASN1_STRING_get0_data(name->d.dNSName);
        size_t text_bytes = (size_t)ASN1_STRING_length(name->d.dNSName);
        bool plain = text_bytes > 0 && text_bytes < capacity_bytes - used_bytes;
        for (size_t j = 0; plain && j < text_bytes; j++)
            plain = text[j] > ' ' && text[j] < 0x7f; /* no line of its own making, and no NUL */
        if (!plain)
            continue;
        memcpy(names + used_bytes, text, text_bytes);
        used_bytes += text_bytes;
        names[used_bytes++] = '\n';
    }
    GENERAL_NAMES_free(found);
    ERR_clear_error();
    return used_bytes;
}

size_t tls_peer_names(struct tls_session *session, char *names, size_t capacity_bytes)
{
    X509 *certificate = SSL_get1_peer_certificate(session->ssl);
    size_t used_bytes = names_in(certificate, names, capacity_bytes);
    X509_free(certificate);
    return used_bytes;
}

size_t tls_context_names(const struct tls_context *context, char *names, size_t capacity_bytes)
{
    return names_in(SSL_CTX_get0_certificate(context->ssl), names, capacity_bytes);
}

static int64_t unix_seconds(const ASN1_TIME *time)
{
    struct tm broken_down;
    return ASN1_TIME_to_tm(time, &broken_down) ? (int64_t)timegm(&broken_down) : 0;
}

int64_t tls_context_valid_from(const struct tls_context *context)
{
    return unix_seconds(X509_get0_notBefore(SSL_CTX_get0_certificate(context->ssl)));
}

int64_t tls_context_valid_until(const struct tls_context *context)
{
    return unix_seconds(X509_get0_notAfter(SSL_CTX_get0_certificate(context->ssl)));
}

enum tls_outcome tls_write(struct tls_session *session, const void *bytes, size_t size_bytes, uint32_t deadline_ms, char why[TLS_WHY_BYTES])
{
    uint64_t end_ns = end_of(deadline_ms);
    size_t written_bytes;
    why[0] = '\0';
    ERR_clear_error();
    int status = SSL_write_ex(session->ssl, bytes, size_bytes, &written_bytes); /* less than a record, into an empty out */
    return status == 1 ? flush_until(session, end_ns) : go_on(session, status, end_ns, why);
}

enum tls_outcome tls_read(struct tls_session *session, void *buffer, size_t size_bytes, uint32_t deadline_ms, size_t *received_bytes,
                          char why[TLS_WHY_BYTES])
{
    uint64_t end_ns = end_of(deadline_ms);
    why[0] = '\0';
    for (*received_bytes = 0; *received_bytes < size_bytes;) {
        size_t read_bytes;
        ERR_clear_error();
        int status = SSL_read_ex(session->ssl, (char *)buffer + *received_bytes, size_bytes - *received_bytes, &read_bytes);
        if (status == 1) {
            *received_bytes += read_bytes;
            continue;
        }
        enum tls_outcome outcome = go_on(session, status, end_ns, why);
        if (outcome != TLS_DONE)
            return outcome;
    }
    session->more = SSL_has_pending(session->ssl);
    return TLS_DONE;
}
