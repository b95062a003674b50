/* What silofs sees of the kernel's requests before libfuse does.
 *
 * pyfuse3 knows no fallocate, lseek, copy_file_range or locks, and hides a request's number and the flags of a write. This
 * library is loaded with RTLD_GLOBAL before pyfuse3, so that three symbols of libfuse which pyfuse3 calls are found here first:
 *
 *   fuse_session_receive_buf  lets the kernel put the bytes of a write where the write log wants them, which spares two copies.
 *   fuse_session_process_buf  notes number and flags of every request; offers such a write to `silofs_write`, and those that
 *                             pyfuse3 does not know to `silofs_take`; everything else goes on to libfuse.
 *   fuse_reply_open           adds an open flag that libfuse 3.14 cannot express.
 *
 * Requests and replies are the kernel's own structures (linux/fuse.h), whose layout is an interface that is kept for ever.
 * Nothing of libfuse's inside is touched, nothing is allocated, and there is no state but the variables below, which belong
 * to the one thread that serves the session. The Python side is __init__.py beside this file.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 312
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse_lowlevel.h>
#include <linux/fuse.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

/* The request that is being dispatched. It stays as it is until the next one is, so that the handler which pyfuse3 starts
 * right after finds it. 64-bit words, which Python reads through a memoryview; the last four are those of a write whose
 * bytes are in the ring, at AT. */
EXPORT uint64_t silofs_request[6];
enum { UNIQUE, FLAGS, HANDLE, OFFSET, LENGTH, AT };

/* The write log's ring, and which bytes of it are free for the payload of its next record: [PLACE, LIMIT). */
EXPORT unsigned char *silofs_ring;
EXPORT uint64_t silofs_room[2];
enum { PLACE, LIMIT };

/* Takes the write that is in `silofs_request`; 0 = pyfuse3 does it, as if nothing had been. NULL until Python has set it. */
EXPORT int (*silofs_write)(void);

/* Takes a request that pyfuse3 does not know; 0 = let libfuse have it. NULL until Python has set it. */
EXPORT int (*silofs_take)(const void *request, size_t length);

/* The next definition of a symbol that is interposed here: libfuse's. */
static void *next(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (found == NULL)
        abort(); /* this library is linked with libfuse, so it is there */
    return found;
}

static int is_ours(uint32_t opcode) {
    switch (opcode) {
    case FUSE_GETLK:
    case FUSE_SETLK:
    case FUSE_SETLKW:
    case FUSE_INTERRUPT:
    case FUSE_FALLOCATE:
    case FUSE_LSEEK:
    case FUSE_COPY_FILE_RANGE:
        return 1;
    default:
        return 0;
    }
}

/* As much as the kernel may send at a time (it refuses to read into less), and the part that comes before a write's bytes. */
enum { MESSAGE = (1 << 20) + 4096, HEAD = sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in) };

/* Python's lock, which is held whenever pyfuse3 calls. To let go of it costs more than a small request is worth; while a
 * large one is copied, the thread that commits has a use for it. */
extern void *PyEval_SaveThread(void);
extern void PyEval_RestoreThread(void *);
enum { LARGE = 1 << 16 };

/* Whether the request that was read last is a write whose bytes are in the ring, and a large one. */
static int in_ring, was_large;

static ssize_t receive(int fd, const struct iovec *parts) {
    void *state = was_large ? PyEval_SaveThread() : NULL;
    ssize_t result;
    do
        result = readv(fd, parts, 2);
    while (result < 0 && errno == ENOENT); /* its process was killed while it was read */
    int error = errno;
    if (state != NULL)
        PyEval_RestoreThread(state);
    errno = error;
    return result;
}

EXPORT int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buf) {
    static int (*real)(struct fuse_session *, struct fuse_buf *);
    if (real == NULL)
        *(void **)&real = next("fuse_session_receive_buf");

    in_ring = 0;
    /* libfuse allocates `mem`, of MESSAGE bytes, at the first request of each of pyfuse3's tasks: that one is copied. */
    if (silofs_ring == NULL || buf->mem == NULL || silofs_room[LIMIT] < silofs_room[PLACE] + MESSAGE)
        return real(session, buf);

    unsigned char *place = silofs_ring + silofs_room[PLACE];
    struct iovec parts[2] = {{buf->mem, HEAD}, {place, MESSAGE - HEAD}};
    ssize_t result = receive(fuse_session_fd(session), parts);
    int error = errno;
    if (fuse_session_exited(session))
        return 0;
    if (result < 0 && error == ENODEV) { /* unmounted */
        fuse_session_exit(session);
        return 0;
    }
    if (result < 0)
        return -error;
    size_t count = (size_t)result;
    if (count < sizeof(struct fuse_in_header))
        return -EIO;
    was_large = count > LARGE;
    buf->size = count;
    buf->flags = 0;
    if (((struct fuse_in_header *)buf->mem)->opcode == FUSE_WRITE && count > HEAD)
        in_ring = 1;
    else if (count > HEAD)
        memcpy((char *)buf->mem + HEAD, place, count - HEAD);
    return (int)count;
}

/* Offers Python the write that was read into the ring; 1 = it is done and answered. */
static int written(struct fuse_session *session, const struct fuse_in_header *header, const struct fuse_write_in *write_in,
                   size_t size) {
    if (silofs_write == NULL || size != HEAD + write_in->size)
        return 0;
    silofs_request[HANDLE] = write_in->fh;
    silofs_request[OFFSET] = write_in->offset;
    silofs_request[LENGTH] = write_in->size;
    silofs_request[AT] = silofs_room[PLACE];
    if (!silofs_write())
        return 0;
    struct {
        struct fuse_out_header header;
        struct fuse_write_out body;
    } reply = {{sizeof reply, 0, header->unique}, {write_in->size, 0}};
    /* ENOENT: its process was killed; ENODEV: unmounted. Nobody waits for the answer then. */
    if (write(fuse_session_fd(session), &reply, sizeof reply) < 0 && errno != ENOENT && errno != ENODEV)
        perror("silofs: a write could not be answered");
    return 1;
}

EXPORT void fuse_session_process_buf(struct fuse_session *session, const struct fuse_buf *buf) {
    static void (*real)(struct fuse_session *, const struct fuse_buf *);
    if (real == NULL)
        *(void **)&real = next("fuse_session_process_buf");

    silofs_request[UNIQUE] = 0;
    silofs_request[FLAGS] = O_SYNC; /* of a write that cannot be looked into (spliced): then it is made durable */
    if (!(buf->flags & FUSE_BUF_IS_FD) && buf->size >= sizeof(struct fuse_in_header)) {
        struct fuse_in_header header;
        memcpy(&header, buf->mem, sizeof header);
        silofs_request[UNIQUE] = header.unique;
        silofs_request[FLAGS] = 0;
        if (header.opcode == FUSE_WRITE && buf->size >= sizeof header + sizeof(struct fuse_write_in)) {
            struct fuse_write_in write;
            memcpy(&write, (const char *)buf->mem + sizeof header, sizeof write);
            silofs_request[FLAGS] = write.flags;
            if (in_ring) {
                unsigned char *bytes = silofs_ring + silofs_room[PLACE];
                if (written(session, &header, &write, buf->size))
                    return;
                memcpy((char *)buf->mem + HEAD, bytes, buf->size - HEAD);
            }
        } else if (silofs_take != NULL && is_ours(header.opcode) && silofs_take(buf->mem, buf->size)) {
            return;
        }
    }
    real(session, buf);
}

/* pyfuse3's answer to OPEN, and FOPEN_PARALLEL_DIRECT_WRITES: direct writes that stay inside the file need not wait for each
 * other in the kernel. A file that was only now created lacks it until it is opened again. */
EXPORT int fuse_reply_open(fuse_req_t request, const struct fuse_file_info *file) {
    struct fuse_open_out out = {.fh = file->fh, .open_flags = FOPEN_PARALLEL_DIRECT_WRITES};
    if (!file->direct_io) {
        static int (*real)(fuse_req_t, const struct fuse_file_info *);
        if (real == NULL)
            *(void **)&real = next("fuse_reply_open");
        return real(request, file); /* a directory */
    }
    out.open_flags |= FOPEN_DIRECT_IO;
    if (file->keep_cache)
        out.open_flags |= FOPEN_KEEP_CACHE;
    if (file->nonseekable)
        out.open_flags |= FOPEN_NONSEEKABLE;
    return fuse_reply_buf(request, (const char *)&out, sizeof out);
}
