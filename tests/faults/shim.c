/* Makes the Nth system call that changes a file of one directory fail. Loaded with LD_PRELOAD, driven by ctypes:

     faults_watch(prefix)        files whose path begins with prefix are watched
     faults_arm(nth, kind, on)   the nth watched call from now on fails as `kind`; with `on` all after it, too; nth 0: none
     faults_calls()              watched calls since then
     faults_fired()              how many of them failed
     faults_cut()                undo everything that is not synced, in all files: a power cut that keeps nothing

   What one call may do: EIO and ENOSPC change nothing; SHORT writes half of the bytes and says so; LOST is an fsync or
   fdatasync that fails, and with it everything written to that file since the last one that did not: what a disk and a
   page cache do that gave up on dirty pages (Linux marks them clean after the error). With LOST a write through a
   descriptor opened O_DSYNC fails and changes nothing.

   One lock around everything: the tests have few threads and want one order of calls. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { EIO_ = 1, ENOSPC_ = 2, SHORT_ = 3, LOST_ = 4 };
enum call { WRITE, SYNC, SPACE, MAP };

struct before { /* bytes as they were before a write that nobody has synced */
    struct before *older;
    ino_t inode;
    char *path;
    off_t offset;
    size_t length;
    off_t size; /* of the file, as it was before it was made longer or shorter; else -1 */
    char bytes[];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char watched[PATH_MAX];
static long nth, calls, fired;
static int kind, for_ever;
static struct before *unsynced;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

void faults_watch(const char *prefix) { snprintf(watched, sizeof watched, "%s", prefix); }

void faults_arm(long at, int how, int on)
{
    pthread_mutex_lock(&lock);
    nth = at, kind = how, for_ever = on, calls = 0, fired = 0;
    pthread_mutex_unlock(&lock);
}

long faults_calls(void) { return calls; }
long faults_fired(void) { return fired; }

/* The path of a watched file in `path`, of PATH_MAX bytes; else 0. */
static int find(int fd, char *path)
{
    char link[64];
    if (!*watched)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return !strncmp(path, watched, strlen(watched));
}

static int is_watched(int fd)
{
    char path[PATH_MAX];
    return find(fd, path);
}

/* 0: go on; else the kind of the fault that this call shows. A call that cannot show it is not counted. */
static int fault(int fd, enum call call)
{
    if (!is_watched(fd))
        return 0;
    int synchronous = call == WRITE && (fcntl(fd, F_GETFL) & O_DSYNC);
    if ((kind == SHORT_ && call != WRITE) || (kind == LOST_ && call != SYNC && !synchronous) || (kind == ENOSPC_ && call == MAP))
        return 0;
    calls++;
    if (!nth || (for_ever ? calls < nth : calls != nth))
        return 0;
    fired++;
    return kind;
}

static int error_of(int how) { return how == ENOSPC_ ? ENOSPC : EIO; }

static void remember(int fd, off_t offset, size_t length)
{
    struct stat about;
    char path[PATH_MAX];
    if (!find(fd, path) || fcntl(fd, F_GETFL) & O_DSYNC || fstat(fd, &about))
        return;
    struct before *saved = malloc(sizeof *saved + length);
    *saved = (struct before){unsynced, about.st_ino, strdup(path), offset, 0, -1};
    int reader = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = reader < 0 ? -1 : pread(reader, saved->bytes, length, offset);
    if (reader >= 0)
        close(reader);
    saved->length = got < 0 ? 0 : (size_t)got; /* what lay beyond the end stays: zeros would be as good */
    unsynced = saved;
}

static void remember_size(int fd)
{
    struct stat about;
    char path[PATH_MAX];
    if (!find(fd, path) || fstat(fd, &about))
        return;
    struct before *saved = malloc(sizeof *saved);
    *saved = (struct before){unsynced, about.st_ino, strdup(path), 0, 0, about.st_size};
    unsynced = saved;
}

/* Of one inode, or of all (0): forget what was before the writes, or bring it back, the newest first. Dirty pages that
 * are given up (of one inode) leave the file as long as it is. */
static void settle(ino_t inode, int lost)
{
    for (struct before **at = &unsynced; *at;) {
        struct before *saved = *at;
        if (inode && saved->inode != inode) {
            at = &saved->older;
            continue;
        }
        if (inode && lost && saved->size >= 0) {
            at = &saved->older;
            continue;
        }
        if (lost && saved->size >= 0 && truncate(saved->path, saved->size) && errno != ENOENT) /* it has another name */
            abort();
        if (lost && saved->length) {
            int writer = open(saved->path, O_WRONLY | O_CLOEXEC);
            if (writer >= 0 && REAL(pwrite64)(writer, saved->bytes, saved->length, saved->offset) < 0)
                abort();
            if (writer >= 0)
                close(writer);
        }
        *at = saved->older;
        free(saved->path);
        free(saved);
    }
}

void faults_cut(void)
{
    pthread_mutex_lock(&lock);
    settle(0, 1);
    pthread_mutex_unlock(&lock);
}

static ssize_t written(int fd, const struct iovec *parts, int count, off_t offset, int at_end)
{
    pthread_mutex_lock(&lock);
    int how = fault(fd, WRITE), saved_errno = 0;
    size_t length = 0;
    ssize_t done;
    for (int part = 0; part < count; part++)
        length += parts[part].iov_len;
    if (how == EIO_ || how == ENOSPC_ || how == LOST_) {
        done = -1, saved_errno = error_of(how);
    } else {
        off_t place = at_end ? lseek(fd, 0, SEEK_CUR) : offset;
        struct iovec half = {parts[0].iov_base, parts[0].iov_len / 2};
        if (place >= 0)
            remember(fd, place, length);
        if (how == SHORT_ && length > 1) {
            if (count > 1 || !half.iov_len)
                half.iov_len = count > 1 ? parts[0].iov_len : 1;
            parts = &half, count = 1;
        }
        done = at_end ? REAL(writev)(fd, parts, count) : REAL(pwritev64)(fd, parts, count, offset);
        saved_errno = errno;
    }
    pthread_mutex_unlock(&lock);
    errno = saved_errno;
    return done;
}

static int synced(int fd, int (*call)(int))
{
    pthread_mutex_lock(&lock);
    int how = fault(fd, SYNC);
    int done = how ? -1 : call(fd);
    int saved_errno = how ? error_of(how) : errno;
    struct stat about;
    if ((how == LOST_ || !done) && is_watched(fd) && !fstat(fd, &about))
        settle(about.st_ino, how == LOST_);
    pthread_mutex_unlock(&lock);
    errno = saved_errno;
    return done;
}

static int may(int fd, enum call call)
{
    pthread_mutex_lock(&lock);
    int how = fault(fd, call);
    pthread_mutex_unlock(&lock);
    if (how)
        errno = error_of(how);
    return !how;
}

ssize_t write(int fd, const void *bytes, size_t length)
{
    struct iovec part = {(void *)bytes, length};
    return *watched && is_watched(fd) ? written(fd, &part, 1, 0, 1) : REAL(write)(fd, bytes, length);
}

ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t offset)
{
    struct iovec part = {(void *)bytes, length};
    return written(fd, &part, 1, offset, 0);
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset) { return pwrite64(fd, bytes, length, offset); }

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    return *watched && is_watched(fd) ? written(fd, parts, count, 0, 1) : REAL(writev)(fd, parts, count);
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset)
{
    return written(fd, parts, count, offset, 0);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset)
{
    return written(fd, parts, count, offset, 0);
}

ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags)
{
    return flags ? REAL(pwritev64v2)(fd, parts, count, offset, flags) : written(fd, parts, count, offset, 0);
}

int fsync(int fd) { return synced(fd, REAL(fsync)); }
int fdatasync(int fd) { return synced(fd, REAL(fdatasync)); }

int ftruncate64(int fd, off64_t length)
{
    if (!may(fd, SPACE))
        return -1;
    pthread_mutex_lock(&lock);
    remember_size(fd);
    pthread_mutex_unlock(&lock);
    return REAL(ftruncate64)(fd, length);
}

int ftruncate(int fd, off_t length) { return ftruncate64(fd, length); }

int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
    return may(fd, SPACE) ? REAL(fallocate64)(fd, mode, offset, length) : -1;
}

int fallocate(int fd, int mode, off_t offset, off_t length) { return fallocate64(fd, mode, offset, length); }

int posix_fallocate64(int fd, off64_t offset, off64_t length)
{
    return may(fd, SPACE) ? REAL(posix_fallocate64)(fd, offset, length) : errno;
}

int posix_fallocate(int fd, off_t offset, off_t length) { return posix_fallocate64(fd, offset, length); }

void *mmap64(void *address, size_t length, int protection, int flags, int fd, off64_t offset)
{
    return fd < 0 || may(fd, MAP) ? REAL(mmap64)(address, length, protection, flags, fd, offset) : MAP_FAILED;
}

void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    return mmap64(address, length, protection, flags, fd, offset);
}
