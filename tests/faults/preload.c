/* Intercepts a process's file system calls (LD_PRELOAD): logs them with their data, lets the n-th fail, or kills the
 * process at it. It does nothing until preload.py arms it. Calls outside of `root` are not touched, and neither are those
 * on LMDB's reader table, which is memory shared by processes rather than a file.
 *
 * An entry of the log is a struct record, then path, second path and data. Offsets and sizes are in bytes. A sync's
 * offset is the size of the file (-1 for a folder): a write that was not seen shows there. A rename by a raw system call
 * shows when the file is next used under its new name. Calls that the log cannot describe end the process.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITES = 1, SYNCS = 2, NAMES = 4 };
enum { SYNCHRONOUS = 1, FAILED = 2 };

struct record {
    uint32_t call; /* w(rite) t(runcate) s(ync) c(reate) m(kdir) r(ename) x: exchange of names, u(nlink) */
    uint32_t flags;
    int64_t offset;
    uint64_t path_length, other_length, data_length;
};

static char root[PATH_MAX];
static int log_descriptor = -1;
static unsigned armed_kinds;
static long countdown, num_failing;
static int armed_error;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

/* error > 0: errno of the number-th call (from 1) of these kinds and the `times - 1` after it; < 0: a signal before it. */
void faults_arm(unsigned kinds, long number, int error, long times) {
    armed_kinds = kinds, countdown = number, armed_error = error, num_failing = times;
}

/* Last known paths of the files that were created. */
static struct known {
    ino_t inode;
    char *path;
} *files;
static size_t num_files;

/* Watch `watched`; write the log to `path` unless it is empty. */
void faults_watch(const char *watched, const char *path) {
    snprintf(root, sizeof root, "%s", watched);
    num_files = 0;
    if (*path)
        log_descriptor = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND, 0600);
}

/* Calls of the armed kinds so far. */
long faults_count(long number) { return number - countdown; }

/* End the process at a call that the log cannot describe. */
static void refuse(const char *call, const char *path) {
    fprintf(stderr, "tests/faults/preload.c: %s of %s cannot be logged\n", call, path);
    abort();
}

#define REAL(name) ({ static typeof(&name) real; if (!real) real = (typeof(&name))dlsym(RTLD_NEXT, #name); real; })

static int inside(const char *path) {
    size_t length = strlen(root);
    return length && !strncmp(path, root, length) && !strstr(path, "lock.mdb");
}

static int path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = root[0] ? readlink(link, path, PATH_MAX - 1) : -1;
    path[length > 0 ? length : 0] = 0;
    return length > 0 && inside(path);
}

static int path_at(int folder, const char *name, char *path) {
    path[0] = 0;
    if (!root[0])
        return 0;
    if (name[0] == '/')
        snprintf(path, PATH_MAX, "%s", name);
    else if (folder == AT_FDCWD) {
        char here[PATH_MAX];
        if (!getcwd(here, sizeof here))
            return 0;
        snprintf(path, PATH_MAX, "%.2000s/%.2000s", here, name);
    } else {
        char above[PATH_MAX];
        path_of(folder, above);
        snprintf(path, PATH_MAX, "%.2000s/%.2000s", above, name);
    }
    return inside(path);
}

/* Count a call; returns the errno with which it must fail, or 0. */
static int strike(unsigned kinds) {
    int error = 0;
    pthread_mutex_lock(&mutex);
    if ((kinds & armed_kinds) && --countdown <= 0 && countdown > -num_failing)
        error = armed_error;
    pthread_mutex_unlock(&mutex);
    if (error < 0)
        kill(getpid(), -error), pause();
    return error;
}

static void note(char call, unsigned flags, int64_t offset, const char *path, const char *other, const void *data,
                 size_t size) {
    if (log_descriptor < 0)
        return;
    int saved = errno;
    struct record record = {call, flags, offset, strlen(path), strlen(other), size};
    size_t total = sizeof record + record.path_length + record.other_length + size;
    char *line = malloc(total), *place = line;
    place = mempcpy(place, &record, sizeof record);
    place = mempcpy(place, path, record.path_length);
    place = mempcpy(place, other, record.other_length);
    if (size)
        memcpy(place, data, size);
    pthread_mutex_lock(&mutex);
    for (size_t done = 0; done < total;) {
        long written = syscall(SYS_write, log_descriptor, line + done, total - done);
        if (written <= 0)
            abort();
        done += written;
    }
    pthread_mutex_unlock(&mutex);
    free(line);
    errno = saved;
}

static void remember(ino_t inode, const char *path) {
    pthread_mutex_lock(&mutex);
    size_t place = 0;
    while (place < num_files && files[place].inode != inode)
        place++;
    if (place == num_files) {
        files = realloc(files, ++num_files * sizeof *files);
        files[place].path = NULL;
    }
    free(files[place].path);
    files[place] = (struct known){inode, strdup(path)};
    pthread_mutex_unlock(&mutex);
}

/* A file or folder has another name: correct the paths of what was known under the old one. */
static void move(const char *path, const char *other) {
    size_t length = strlen(path);
    pthread_mutex_lock(&mutex);
    for (size_t place = 0; place < num_files; place++) {
        char *old = files[place].path, moved[2 * PATH_MAX];
        if (strncmp(old, path, length) || (old[length] && old[length] != '/'))
            continue;
        snprintf(moved, sizeof moved, "%s%s", other, old + length);
        free(old);
        files[place].path = strdup(moved);
    }
    pthread_mutex_unlock(&mutex);
}

/* Log the rename of a file by a call that was not seen. Returns the file's size, or -1 for a folder. */
static int64_t catch_up(int descriptor, const char *path) {
    struct stat status;
    if (fstat(descriptor, &status) || !S_ISREG(status.st_mode))
        return -1;
    char before[PATH_MAX] = "";
    pthread_mutex_lock(&mutex);
    for (size_t place = 0; place < num_files; place++)
        if (files[place].inode == status.st_ino)
            snprintf(before, sizeof before, "%s", files[place].path);
    pthread_mutex_unlock(&mutex);
    if (*before && strcmp(before, path) && status.st_nlink) {
        move(before, path);
        note('r', 0, 0, before, path, 0, 0);
    }
    return status.st_size;
}

static unsigned how(int descriptor) { return fcntl(descriptor, F_GETFL) & O_DSYNC ? SYNCHRONOUS : 0; }

/* Body of a call on a descriptor: `done` is its result if it is made, `line` logs it. */
#define ON_DESCRIPTOR(kinds, call, line, failure)                                                                      \
    char path[PATH_MAX];                                                                                               \
    if (!path_of(descriptor, path))                                                                                    \
        return call;                                                                                                   \
    int64_t file_size = catch_up(descriptor, path);                                                                    \
    (void)file_size;                                                                                                   \
    int error = strike(kinds);                                                                                         \
    if (error) {                                                                                                       \
        failure;                                                                                                       \
        errno = error;                                                                                                 \
        return -1;                                                                                                     \
    }                                                                                                                  \
    __auto_type done = call;                                                                                           \
    if (done >= 0) {                                                                                                   \
        line;                                                                                                          \
    }                                                                                                                  \
    return done;

#define WRITE_KINDS (WRITES | (how(descriptor) ? SYNCS : 0))

ssize_t write(int descriptor, const void *data, size_t size) {
    ON_DESCRIPTOR(WRITE_KINDS, REAL(write)(descriptor, data, size),
                  note('w', how(descriptor), lseek(descriptor, 0, SEEK_CUR) - done, path, "", data, done), )
}

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset) {
    ON_DESCRIPTOR(WRITE_KINDS, REAL(pwrite)(descriptor, data, size, offset),
                  note('w', how(descriptor), offset, path, "", data, done), )
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset) {
    return pwrite(descriptor, data, size, offset);
}

static void note_vector(int descriptor, const struct iovec *parts, off_t offset, const char *path, ssize_t size) {
    char *data = malloc(size + 1), *place = data;
    for (ssize_t left = size; left > 0; parts++) {
        ssize_t length = (ssize_t)parts->iov_len < left ? (ssize_t)parts->iov_len : left;
        place = mempcpy(place, parts->iov_base, length);
        left -= length;
    }
    note('w', how(descriptor), offset, path, "", data, size);
    free(data);
}

ssize_t pwritev(int descriptor, const struct iovec *parts, int num_parts, off_t offset) {
    ON_DESCRIPTOR(WRITE_KINDS, REAL(pwritev)(descriptor, parts, num_parts, offset),
                  note_vector(descriptor, parts, offset, path, done), )
}

ssize_t pwritev64(int descriptor, const struct iovec *parts, int num_parts, off64_t offset) {
    return pwritev(descriptor, parts, num_parts, offset);
}

ssize_t writev(int descriptor, const struct iovec *parts, int num_parts) {
    ON_DESCRIPTOR(WRITE_KINDS, REAL(writev)(descriptor, parts, num_parts),
                  note_vector(descriptor, parts, lseek(descriptor, 0, SEEK_CUR) - done, path, done), )
}

/* C's buffered files, by which NumPy writes arrays. Their own calls of write are not seen. */
size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
    char path[PATH_MAX];
    int descriptor = fileno(file);
    if (!path_of(descriptor, path))
        return REAL(fwrite)(data, size, count, file);
    errno = strike(WRITES);
    size_t done = errno ? 0 : REAL(fwrite)(data, size, count, file) * size;
    if (done)
        note('w', how(descriptor), ftello(file) - done, path, "", data, done);
    return size ? done / size : 0;
}

int ftruncate(int descriptor, off_t size) {
    ON_DESCRIPTOR(WRITES, REAL(ftruncate)(descriptor, size), note('t', 0, size, path, "", 0, 0), )
}

int ftruncate64(int descriptor, off64_t size) { return ftruncate(descriptor, size); }

int fsync(int descriptor) {
    ON_DESCRIPTOR(SYNCS, REAL(fsync)(descriptor), note('s', 0, file_size, path, "", 0, 0),
                  note('s', FAILED, file_size, path, "", 0, 0))
}

int fdatasync(int descriptor) {
    ON_DESCRIPTOR(SYNCS, REAL(fdatasync)(descriptor), note('s', 0, file_size, path, "", 0, 0),
                  note('s', FAILED, file_size, path, "", 0, 0))
}

int openat(int folder, const char *name, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    char path[PATH_MAX];
    if (!(flags & (O_CREAT | O_TRUNC | __O_TMPFILE)) || !path_at(folder, name, path))
        return REAL(openat)(folder, name, flags, mode);
    if ((flags & O_TMPFILE) == O_TMPFILE)
        refuse("open with O_TMPFILE", path);
    int is_new = faccessat(folder, name, F_OK, 0) != 0;
    int error = strike(NAMES);
    if (error) {
        errno = error;
        return -1;
    }
    int descriptor = REAL(openat)(folder, name, flags, mode);
    struct stat status;
    if (descriptor >= 0 && is_new && !fstat(descriptor, &status)) {
        remember(status.st_ino, path);
        note('c', 0, 0, path, "", 0, 0);
    }
    else if (descriptor >= 0 && flags & O_TRUNC)
        note('t', 0, 0, path, "", 0, 0);
    return descriptor;
}

#define OPEN(symbol, folder)                                                                                           \
    va_list rest;                                                                                                      \
    va_start(rest, flags);                                                                                             \
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                          \
    va_end(rest);                                                                                                      \
    return openat(folder, name, flags, mode);

int openat64(int folder, const char *name, int flags, ...) { OPEN(openat64, folder) }
int open(const char *name, int flags, ...) { OPEN(open, AT_FDCWD) }
int open64(const char *name, int flags, ...) { OPEN(open64, AT_FDCWD) }

#define ON_NAME(folder, name, call, line)                                                                              \
    char path[PATH_MAX];                                                                                               \
    if (!path_at(folder, name, path))                                                                                  \
        return call;                                                                                                   \
    int error = strike(NAMES);                                                                                         \
    if (error) {                                                                                                       \
        errno = error;                                                                                                 \
        return -1;                                                                                                     \
    }                                                                                                                  \
    int done = call;                                                                                                   \
    if (done == 0)                                                                                                     \
        line;                                                                                                          \
    return done;

int mkdirat(int folder, const char *name, mode_t mode) {
    ON_NAME(folder, name, REAL(mkdirat)(folder, name, mode), note('m', 0, 0, path, "", 0, 0))
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int unlinkat(int folder, const char *name, int flags) {
    ON_NAME(folder, name, REAL(unlinkat)(folder, name, flags), note('u', 0, 0, path, "", 0, 0))
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

static void note_rename(const char *path, int folder, const char *name) {
    char other[PATH_MAX];
    path_at(folder, name, other);
    move(path, other);
    note('r', 0, 0, path, other, 0, 0);
}

int renameat(int from, const char *name, int to, const char *other) {
    ON_NAME(from, name, REAL(renameat)(from, name, to, other), note_rename(path, to, other))
}

static void note_renameat2(const char *path, int folder, const char *name, unsigned flags) {
    if (!(flags & RENAME_EXCHANGE)) {
        note_rename(path, folder, name);
        return;
    }
    char other[PATH_MAX];
    path_at(folder, name, other);
    move(path, "\n"); /* no such path */
    move(other, path);
    move("\n", other);
    note('x', 0, 0, path, other, 0, 0);
}

int renameat2(int from, const char *name, int to, const char *other, unsigned flags) {
    ON_NAME(from, name, REAL(renameat2)(from, name, to, other, flags), note_renameat2(path, to, other, flags))
}
int rename(const char *name, const char *other) { return renameat(AT_FDCWD, name, AT_FDCWD, other); }

#define REFUSE(call, folder, name)                                                                                     \
    char path[PATH_MAX];                                                                                               \
    if (path_at(folder, name, path))                                                                                   \
        refuse(call, path);

#define REFUSE_DESCRIPTOR(call, descriptor)                                                                            \
    char path[PATH_MAX];                                                                                               \
    if (path_of(descriptor, path))                                                                                     \
        refuse(call, path);

int linkat(int from, const char *name, int to, const char *other, int flags) {
    REFUSE("link", to, other)
    return REAL(linkat)(from, name, to, other, flags);
}
int link(const char *name, const char *other) { return linkat(AT_FDCWD, name, AT_FDCWD, other, 0); }

int truncate(const char *name, off_t size) {
    REFUSE("truncate", AT_FDCWD, name)
    return REAL(truncate)(name, size);
}
int truncate64(const char *name, off64_t size) { return truncate(name, size); }

ssize_t copy_file_range(int from, off64_t *from_offset, int to, off64_t *offset, size_t size, unsigned flags) {
    REFUSE_DESCRIPTOR("copy_file_range", to)
    return REAL(copy_file_range)(from, from_offset, to, offset, size, flags);
}

ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
    REFUSE_DESCRIPTOR("sendfile", to)
    return REAL(sendfile)(to, from, offset, size);
}
ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) { return sendfile(to, from, offset, size); }

/* Not by REAL, whose dlsym may need memory. */
void *mmap(void *place, size_t size, int protection, int flags, int descriptor, off_t offset) {
    char path[PATH_MAX];
    if (descriptor >= 0 && (flags & MAP_TYPE) != MAP_PRIVATE && protection & PROT_WRITE && path_of(descriptor, path))
        refuse("a shared writable map", path);
    return (void *)syscall(SYS_mmap, place, size, protection, flags, descriptor, offset);
}
void *mmap64(void *place, size_t size, int protection, int flags, int descriptor, off64_t offset) {
    return mmap(place, size, protection, flags, descriptor, offset);
}
