/* Loaded with LD_PRELOAD: lets calls on files below a folder fail while a control file says so.
 *
 *     FAULTY_DISK_FOLDER    absolute path that ends in /; files below it are concerned
 *     FAULTY_DISK_CONTROL   holds "CALL ERRNO", e.g. "read 5" or "write 28"; no such file: nothing fails
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef ssize_t (*read_t)(int, void *, size_t);
typedef ssize_t (*write_t)(int, const void *, size_t);
typedef int (*fsync_t)(int);

static read_t real_read;
static write_t real_write;
static fsync_t real_fsync;

__attribute__((constructor)) static void find_real_calls(void) {
    real_read = (read_t)dlsym(RTLD_NEXT, "read");
    real_write = (write_t)dlsym(RTLD_NEXT, "write");
    real_fsync = (fsync_t)dlsym(RTLD_NEXT, "fsync");
}

/* The errno that `call` on this descriptor is to fail with; 0 for none. */
static int fault(const char *call, int descriptor) {
    const char *folder = getenv("FAULTY_DISK_FOLDER"), *control = getenv("FAULTY_DISK_CONTROL");
    char text[64] = "", link[64], path[4096], name[16];
    int number = 0, saved = errno;
    if (!folder || !control || access(control, R_OK) != 0) {
        errno = saved;
        return 0;
    }
    int file = open(control, O_RDONLY | O_CLOEXEC);
    ssize_t size = file < 0 ? -1 : real_read(file, text, sizeof text - 1);
    if (file >= 0) close(file);
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (size <= 0 || length <= 0 || sscanf(text, "%15s %d", name, &number) != 2) return 0;
    path[length] = 0;
    return strcmp(name, call) == 0 && strncmp(path, folder, strlen(folder)) == 0 ? number : 0;
}

ssize_t read(int descriptor, void *buffer, size_t size) {
    int number = fault("read", descriptor);
    if (number == 0) return real_read(descriptor, buffer, size);
    errno = number;
    return -1;
}

ssize_t write(int descriptor, const void *buffer, size_t size) {
    int number = fault("write", descriptor);
    if (number == 0) return real_write(descriptor, buffer, size);
    errno = number;
    return -1;
}

int fsync(int descriptor) {
    int number = fault("fsync", descriptor);
    if (number == 0) return real_fsync(descriptor);
    errno = number;
    return -1;
}
