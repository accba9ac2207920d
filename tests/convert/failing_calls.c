/* Lets one system call on files below some path fail, for every library of a process that is loaded after this one.

   cc -shared -fPIC -O1 -o failing_calls.so failing_calls.c -ldl;  LD_PRELOAD=failing_calls.so python ...

Python's own calls could be replaced in Python, but TensorStore and the Rust libraries make theirs themselves. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum call { OPEN, WRITE, FSYNC, RENAME, UNLINK, RMDIR, MKDIR, TRUNCATE, CALLS };
enum mode { FAIL, TORN, KILL, TORN_AND_KILL };

static char prefix[4096];
static atomic_int armed_call = -1, armed_mode, armed_error;
static atomic_long armed_number, seen[CALLS], all_seen;

/* Begins to count calls on paths that begin with `below`; the `number`-th of kind `call` fails, or of any kind with -1. */
void arm(const char *below, int call, long number, int error, int mode) {
    snprintf(prefix, sizeof prefix, "%s", below);
    for (int i = 0; i < CALLS; i++) seen[i] = 0;
    all_seen = 0;
    armed_number = number;
    armed_error = error;
    armed_mode = mode;
    armed_call = call;
}

/* How many calls of a kind there have been, or of all with -1. */
long counted(int call) { return call < 0 ? all_seen : seen[call]; }

static int is_below(int directory, const char *path) {
    char whole[8192];
    if (!prefix[0] || !path) return 0;
    if (path[0] == '/' || directory == AT_FDCWD) return !strncmp(path, prefix, strlen(prefix));
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, whole, 4096);
    if (length < 0) return 0;
    snprintf(whole + length, sizeof whole - length, path[0] ? "/%s" : "%s", path);
    return !strncmp(whole, prefix, strlen(prefix));
}

/* Whether this call is the one; if so, a process that is to be killed is not there any more unless the call is torn. */
static int is_due(enum call call, int directory, const char *path) {
    int before = errno;
    if (!is_below(directory, path)) { errno = before; return 0; }
    errno = before;
    long of_kind = ++seen[call], of_all = ++all_seen;
    if (armed_call >= 0 ? call != (enum call)armed_call || of_kind != armed_number : of_all != armed_number) return 0;
    if (armed_mode == KILL || (armed_mode == TORN_AND_KILL && call != WRITE)) kill(getpid(), SIGKILL);
    errno = armed_error;
    return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list l; va_start(l, flags); mode = va_arg(l, mode_t); va_end(l); }

int open(const char *p, int f, ...) { MODE(f) return is_due(OPEN, AT_FDCWD, p) ? -1 : NEXT(open)(p, f, mode); }
int open64(const char *p, int f, ...) { MODE(f) return is_due(OPEN, AT_FDCWD, p) ? -1 : NEXT(open64)(p, f, mode); }
int openat(int d, const char *p, int f, ...) { MODE(f) return is_due(OPEN, d, p) ? -1 : NEXT(openat)(d, p, f, mode); }
int openat64(int d, const char *p, int f, ...) { MODE(f) return is_due(OPEN, d, p) ? -1 : NEXT(openat64)(d, p, f, mode); }

/* A torn write leaves the first half of its bytes. */
static ssize_t torn(int fd, const void *bytes, size_t count) {
    int error = errno;
    if (armed_mode == TORN || armed_mode == TORN_AND_KILL) syscall(SYS_write, fd, bytes, count / 2);
    if (armed_mode == TORN_AND_KILL) kill(getpid(), SIGKILL);
    errno = error;
    return -1;
}
ssize_t write(int fd, const void *b, size_t n) {
    return fd > 2 && is_due(WRITE, fd, "") ? torn(fd, b, n) : NEXT(write)(fd, b, n);
}
ssize_t writev(int fd, const struct iovec *v, int n) {
    return fd > 2 && is_due(WRITE, fd, "") ? torn(fd, v->iov_base, v->iov_len) : NEXT(writev)(fd, v, n);
}
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) {
    return is_due(WRITE, fd, "") ? torn(fd, b, n) : NEXT(pwrite)(fd, b, n, o);
}
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) {
    return is_due(WRITE, fd, "") ? torn(fd, b, n) : NEXT(pwrite64)(fd, b, n, o);
}
int fsync(int fd) { return is_due(FSYNC, fd, "") ? -1 : NEXT(fsync)(fd); }
int fdatasync(int fd) { return is_due(FSYNC, fd, "") ? -1 : NEXT(fdatasync)(fd); }
int ftruncate(int fd, off_t n) { return is_due(TRUNCATE, fd, "") ? -1 : NEXT(ftruncate)(fd, n); }
int ftruncate64(int fd, off64_t n) { return is_due(TRUNCATE, fd, "") ? -1 : NEXT(ftruncate64)(fd, n); }
int rename(const char *a, const char *b) { return is_due(RENAME, AT_FDCWD, a) ? -1 : NEXT(rename)(a, b); }
int renameat(int d, const char *a, int e, const char *b) { return is_due(RENAME, d, a) ? -1 : NEXT(renameat)(d, a, e, b); }
int renameat2(int d, const char *a, int e, const char *b, unsigned f) {
    return is_due(RENAME, d, a) ? -1 : NEXT(renameat2)(d, a, e, b, f);
}
int unlink(const char *p) { return is_due(UNLINK, AT_FDCWD, p) ? -1 : NEXT(unlink)(p); }
int rmdir(const char *p) { return is_due(RMDIR, AT_FDCWD, p) ? -1 : NEXT(rmdir)(p); }
int unlinkat(int d, const char *p, int f) {
    return is_due(f & AT_REMOVEDIR ? RMDIR : UNLINK, d, p) ? -1 : NEXT(unlinkat)(d, p, f);
}
int mkdir(const char *p, mode_t m) { return is_due(MKDIR, AT_FDCWD, p) ? -1 : NEXT(mkdir)(p, m); }
int mkdirat(int d, const char *p, mode_t m) { return is_due(MKDIR, d, p) ? -1 : NEXT(mkdirat)(d, p, m); }
