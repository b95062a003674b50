/* What silofs sees of the kernel's requests before libfuse does.
 *
 * pyfuse3 knows no fallocate, lseek, copy_file_range or locks, and hides a request's number and the flags of a write. This
 * library is loaded with RTLD_GLOBAL before pyfuse3, so that two symbols of libfuse which pyfuse3 calls are found here first:
 *
 *   fuse_session_process_buf  notes number and flags of every request; hands those that pyfuse3 does not know to `silofs_take`;
 *                             everything else goes on to libfuse.
 *   fuse_reply_open           adds an open flag that libfuse 3.14 cannot express.
 *
 * Requests and replies are the kernel's own structures (linux/fuse.h), whose layout is an interface that is kept for ever.
 * Nothing of libfuse's inside is touched, nothing is allocated, and there is no state but the three variables below, which
 * belong to the one thread that serves the session. The Python side is __init__.py beside this file.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 312
#include <dlfcn.h>
#include <fcntl.h>
#include <fuse3/fuse_lowlevel.h>
#include <linux/fuse.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

/* The request that is being dispatched. It stays as it is until the next one is, so that the handler which pyfuse3 starts
 * right after finds it. Two 64-bit words, which Python reads through a memoryview. */
EXPORT uint64_t silofs_request[2];
enum { UNIQUE, FLAGS };

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
