/* See tls.h. The bytes of a session while a loop has it, never waiting but where it is asked to.
 *
 * Records are gathered in a buffer and go out with one call when it is full, or when what was to be sent is at its end: a call for each
 * record of 16 KiB takes longer than its encryption. So OpenSSL never finds the socket full, and nothing is ever to be written twice.
 * What comes is received into OpenSSL's own buffer, many records with one call, and decrypted from there into the caller's: an inbox,
 * from where it is brought into place. Nothing is decrypted into guest memory; a file that was cut short is an errno here too. */
#include <errno.h>
#include <openssl/err.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "channel.h"
#include "result.h"
#include "tls_session.h"

#define OUT_BYTES ((size_t)256 << 10)
#define SPARE_BYTES ((size_t)32 << 10) /* a record with all that is around it, and an answer to a change of keys */

static pthread_once_t method_once = PTHREAD_ONCE_INIT;
static BIO_METHOD *method;

static int bio_read(BIO *bio, char *into, int size_bytes)
{
    struct tls_session *session = BIO_get_data(bio);
    ssize_t received_bytes = recv(session->socket, into, (size_t)size_bytes, MSG_DONTWAIT);
    BIO_clear_retry_flags(bio);
    session->drained = received_bytes < size_bytes;
    if (received_bytes > 0)
        return (int)received_bytes;
    if (received_bytes < 0 && (errno == EAGAIN || errno == EINTR)) {
        BIO_set_retry_read(bio);
        return -1;
    }
    session->ended = true;
    session->error_number = received_bytes < 0 ? errno : 0;
    return 0;
}

static int bio_write(BIO *bio, const char *from, int size_bytes)
{
    struct tls_session *session = BIO_get_data(bio);
    BIO_clear_retry_flags(bio);
    if ((size_t)size_bytes > OUT_BYTES + SPARE_BYTES - session->out_end) { /* a peer that has keys changed and reads nothing */
        BIO_set_retry_write(bio);
        return -1;
    }
    memcpy(session->out + session->out_end, from, (size_t)size_bytes);
    session->out_end += (size_t)size_bytes;
    return size_bytes;
}

static long bio_control(BIO *bio, int command, long number, void *pointer)
{
    (void)number, (void)pointer;
    struct tls_session *session = BIO_get_data(bio);
    return command == BIO_CTRL_FLUSH ? 1 : command == BIO_CTRL_EOF ? session->ended : 0;
}

static void method_make(void)
{
    method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "postcopy");
    if (method && !(BIO_meth_set_read(method, bio_read) && BIO_meth_set_write(method, bio_write) && BIO_meth_set_ctrl(method, bio_control))) {
        BIO_meth_free(method);
        method = NULL;
    }
}

BIO *tls_bio_new(struct tls_session *session)
{
    pthread_once(&method_once, method_make);
    BIO *bio = method ? BIO_new(method) : NULL;
    if (bio) {
        BIO_set_data(bio, session);
        BIO_set_init(bio, 1);
    }
    return bio;
}

int tls_out_init(struct tls_session *session)
{
    session->out = malloc(OUT_BYTES + SPARE_BYTES);
    return session->out ? 0 : ENOMEM;
}

int tls_flush(struct tls_session *session)
{
    while (session->out_start < session->out_end) {
        ssize_t sent_bytes = send(session->socket, session->out + session->out_start, session->out_end - session->out_start,
                                  MSG_DONTWAIT | MSG_NOSIGNAL | session->send_flags);
        if (sent_bytes < 0 && errno == EINTR)
            continue;
        if (sent_bytes < 0 && errno == EAGAIN)
            return 0;
        if (sent_bytes < 0) {
            session->error_number = errno;
            return -1;
        }
        session->out_start += (size_t)sent_bytes;
    }
    session->out_start = session->out_end = 0;
    return 1;
}

static bool failed(struct tls_session *session, const char *where, struct loop_result *result)
{
    int error_number = session->error_number;
    bool alert = SSL_get_shutdown(session->ssl) & SSL_RECEIVED_SHUTDOWN;
    session->broken = true;
    ERR_clear_error();
    if (session->ended || alert)
        return result_fail(result, error_number == 0 || error_number == ECONNRESET ? LOOP_PEER_CLOSED : LOOP_CONNECTION_FAILED, error_number,
                           where);
    return result_fail(result, error_number == EPIPE || error_number == ECONNRESET ? LOOP_PEER_CLOSED : LOOP_CONNECTION_FAILED,
                       error_number != 0 ? error_number : EBADMSG, where);
}

bool tls_has_input(const struct tls_session *session)
{
    return session->more;
}

ssize_t tls_receive(struct tls_session *session, void *buffer, size_t capacity_bytes, struct loop_result *result)
{
    size_t done_bytes = 0;
    session->more = false;
    while (done_bytes < capacity_bytes) {
        size_t read_bytes;
        ERR_clear_error();
        int status = session->broken ? 0 : SSL_read_ex(session->ssl, (char *)buffer + done_bytes, capacity_bytes - done_bytes, &read_bytes);
        if (status == 1) {
            done_bytes += read_bytes;
            if (session->drained && !SSL_has_pending(session->ssl)) /* no call in vain behind an urgent page, but a run as a whole */
                break;
            continue;
        }
        int error = session->broken ? SSL_ERROR_SSL : SSL_get_error(session->ssl, status);
        if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE)
            break;
        if (done_bytes == 0) {
            failed(session, "SSL_read", result);
            return -1;
        }
        session->broken = session->more = true; /* what came before it first */
        break;
    }
    if (done_bytes == capacity_bytes)
        session->more = SSL_has_pending(session->ssl);
    tls_flush(session); /* the answer to a change of keys, if any: what fails here fails again in who sends */
    return (ssize_t)done_bytes;
}

/* At most a record, for which there is room. */
static bool encrypt(struct tls_session *session, const void *bytes, size_t size_bytes, struct loop_result *result)
{
    size_t written_bytes;
    ERR_clear_error();
    if (session->broken)
        return failed(session, "SSL_write", result);
    if (session->sent_bytes >= session->rekey_bytes) {
        session->sent_bytes = 0;
        if (SSL_key_update(session->ssl, SSL_KEY_UPDATE_NOT_REQUESTED) != 1)
            return failed(session, "SSL_key_update", result);
    }
    session->sent_bytes += size_bytes;
    if (SSL_write_ex(session->ssl, bytes, size_bytes, &written_bytes) != 1)
        return failed(session, "SSL_write", result);
    return true;
}

ssize_t tls_send(struct tls_session *session, const void *bytes, size_t size_bytes, struct loop_result *result)
{
    if (session->promised_bytes == 0) { /* else they are the same bytes: who was told 0 comes again with them */
        size_t record_bytes = size_bytes < TLS_RECORD_BYTES ? size_bytes : TLS_RECORD_BYTES;
        if (session->out_end + TLS_RECORD_BYTES > OUT_BYTES)
            return 0;
        if (!encrypt(session, bytes, record_bytes, result))
            return -1;
        session->promised_bytes = record_bytes;
    }
    int flushed = tls_flush(session);
    if (flushed < 0)
        failed(session, "send", result);
    if (flushed <= 0)
        return flushed;
    ssize_t taken_bytes = (ssize_t)session->promised_bytes;
    session->promised_bytes = 0;
    return taken_bytes;
}

static bool flush_all(struct tls_session *session, uint64_t *blocked_ns, int stop_fd, struct loop_result *result)
{
    for (;;) {
        int flushed = tls_flush(session);
        if (flushed < 0)
            return failed(session, "send", result);
        if (flushed > 0)
            return true;
        if (!channel_wait_room(session->socket, blocked_ns, stop_fd, result))
            return false;
    }
}

/* The next record's bytes: where they lie if there are enough of them in a piece, else gathered, as a header and its page are. */
static const char *next_record(struct iovec **pieces, int *piece_count, char *gathered, size_t *record_bytes)
{
    const char *from = gathered;
    *record_bytes = 0;
    while (*piece_count > 0 && *record_bytes < TLS_RECORD_BYTES) {
        struct iovec *piece = *pieces;
        size_t room_bytes = TLS_RECORD_BYTES - *record_bytes, part_bytes = piece->iov_len < room_bytes ? piece->iov_len : room_bytes;
        if (part_bytes == TLS_RECORD_BYTES)
            from = piece->iov_base;
        else
            memcpy(gathered + *record_bytes, piece->iov_base, part_bytes);
        *record_bytes += part_bytes;
        piece->iov_base = (char *)piece->iov_base + part_bytes;
        piece->iov_len -= part_bytes;
        if (piece->iov_len == 0) {
            ++*pieces;
            --*piece_count;
        }
    }
    return from;
}

bool tls_send_all(struct tls_session *session, struct iovec *pieces, int piece_count, int send_flags, uint64_t *blocked_ns, int stop_fd,
                  struct loop_result *result)
{
    char gathered[TLS_RECORD_BYTES];
    session->send_flags = send_flags;
    while (piece_count > 0) {
        size_t record_bytes;
        const char *from = next_record(&pieces, &piece_count, gathered, &record_bytes);
        if (session->out_end + TLS_RECORD_BYTES > OUT_BYTES && !flush_all(session, blocked_ns, stop_fd, result))
            return false;
        if (record_bytes > 0 && !encrypt(session, from, record_bytes, result))
            return false;
    }
    return flush_all(session, blocked_ns, stop_fd, result);
}
