/* A file system that delays, fails or lies, for the processes that are started with this library in LD_PRELOAD.

   FAULTS names a file with one rule a line, read anew at every call, so that a test turns faults on and off:

       CALL SUBSTRING ACTION VALUE

   CALL is open, write, fsync, link, rename, unlink, touch or list; SUBSTRING occurs in the path (of each entry, for list). ACTION is delay (VALUE: one call of four waits up to so many milliseconds), fail (VALUE: errno, every time), once
   (VALUE: errno, the first time in this process) or hide (list only: such entries are left out).

       gcc -shared -fPIC -o disk.so disk.c -ldl */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MAX_RULES 64

static int used[MAX_RULES];
static __thread int inside; /* our own calls are not disturbed */

/* 0 to go on, an errno to fail with, -1 to hide an entry. */
static int fault(const char *call, const char *path) {
    const char *file = getenv("FAULTS");
    if (inside || !file || !path) return 0;
    inside = 1;
    int result = 0, kept = errno;
    FILE *rules = fopen(file, "r");
    char line[512], name[16], part[256], action[16];
    for (int i = 0, value; rules && i < MAX_RULES && fgets(line, sizeof line, rules); i++) {
        if (sscanf(line, "%15s %255s %15s %d", name, part, action, &value) != 4) continue;
        if (strcmp(name, call) || !strstr(path, part)) continue;
        if (!strcmp(action, "delay")) {
            static __thread unsigned seed;
            if (!seed) {
                struct timespec now;
                clock_gettime(CLOCK_MONOTONIC, &now);
                seed = (unsigned)(now.tv_nsec ^ syscall(SYS_gettid) * 2654435761u);
            }
            /* Three calls of four pass at once: what races is far apart, not late by the same. */
            long micros = rand_r(&seed) / 7 % 4 ? 0 : rand_r(&seed) % (value * 1000 + 1);
            struct timespec pause = {micros / 1000000, micros % 1000000 * 1000};
            nanosleep(&pause, NULL);
        } else if (!strcmp(action, "hide")) {
            result = -1;
        } else if (!strcmp(action, "fail") || !__sync_lock_test_and_set(&used[i], 1)) {
            result = value;
        }
    }
    if (rules) fclose(rules);
    errno = kept;
    inside = 0;
    return result;
}

static const char *path_of(int fd, char *path, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = inside ? -1 : readlink(link, path, size - 1);
    if (length < 0) return NULL;
    path[length] = 0;
    return path;
}

#define TRY(call, path) do { int e = fault(call, path); if (e > 0) { errno = e; return -1; } } while (0)

int open(const char *path, int flags, ...) {
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest);
    TRY("open", path);
    return NEXT(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest);
    TRY("open", path);
    return NEXT(open64)(path, flags, mode);
}
ssize_t write(int fd, const void *data, size_t size) {
    char path[4096];
    TRY("write", path_of(fd, path, sizeof path));
    return NEXT(write)(fd, data, size);
}
int fsync(int fd) {
    char path[4096];
    TRY("fsync", path_of(fd, path, sizeof path));
    return NEXT(fsync)(fd);
}
int link(const char *from, const char *to) { TRY("link", to); return NEXT(link)(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) {
    TRY("link", to);
    return NEXT(linkat)(a, from, b, to, flags);
}
int rename(const char *from, const char *to) { TRY("rename", to); return NEXT(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) {
    TRY("rename", to);
    return NEXT(renameat)(a, from, b, to);
}
int unlink(const char *path) { TRY("unlink", path); return NEXT(unlink)(path); }
int unlinkat(int fd, const char *path, int flags) { TRY("unlink", path); return NEXT(unlinkat)(fd, path, flags); }
int utimensat(int fd, const char *path, const struct timespec times[2], int flags) {
    TRY("touch", path);
    return NEXT(utimensat)(fd, path, times, flags);
}
static int hidden(DIR *folder, const char *name) {
    char path[8192];
    if (!path_of(dirfd(folder), path, 4096)) return 0;
    strcat(strcat(path, "/"), name);
    return fault("list", path) < 0;
}
struct dirent *readdir(DIR *folder) {
    struct dirent *entry;
    while ((entry = NEXT(readdir)(folder)) && hidden(folder, entry->d_name)) {}
    return entry;
}
struct dirent64 *readdir64(DIR *folder) {
    struct dirent64 *entry;
    while ((entry = NEXT(readdir64)(folder)) && hidden(folder, entry->d_name)) {}
    return entry;
}
