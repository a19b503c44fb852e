// A guest's checker: memory and disks are written and found again as they were, and a TCP connection tells of it.
//     guard ADDRESS PORT DISK...
// Each line says how many MiB of memory and blocks of all disks have been checked, and a number that the other side
// says back. A line that begins with BAD says what was not as it was.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define WORDS (4ul << 20 >> 3)
#define BLOCK 4096
#define BLOCKS 64

struct shared {
    volatile unsigned long memory, disk;
    char bad[200];
};
static struct shared *shared;

static unsigned long mix(unsigned long x) {
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdul;
    return x ^ x >> 29;
}

static void bad(const char *what, unsigned long where) {
    snprintf(shared->bad, sizeof shared->bad, "BAD %s %lu (%s)", what, where, strerror(errno));
    exit(1);
}

static void memory(void) {
    unsigned long *words = mmap(0, WORDS * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (unsigned long round = 1;; round++)
        for (unsigned long i = 0; i < WORDS; i++) {
            if (round > 1 && words[i] != mix(i + (round - 1) * WORDS)) bad("memory", i);
            words[i] = mix(i + round * WORDS);
            if (i % 131072 == 0) {
                shared->memory++;
                usleep(2000);
            }
        }
}

static void disk(const char *path) {
    int fd = open(path, O_RDWR | O_DIRECT);
    unsigned long *block;
    if (fd < 0 || posix_memalign((void **)&block, BLOCK, BLOCK)) bad(path, 0);
    for (unsigned long round = 1;; round++)
        for (unsigned long n = 0; n < BLOCKS; n++) {
            if (round > 1) {
                if (pread(fd, block, BLOCK, n * BLOCK) != BLOCK) bad(path, n);
                for (int i = 0; i < BLOCK / 8; i++)
                    if (block[i] != mix(i + n * BLOCK + (round - 1) * BLOCK * BLOCKS)) bad(path, n);
            }
            for (int i = 0; i < BLOCK / 8; i++) block[i] = mix(i + n * BLOCK + round * BLOCK * BLOCKS);
            if (pwrite(fd, block, BLOCK, n * BLOCK) != BLOCK) bad(path, n);
            if (n % 64 == 0 && fdatasync(fd)) bad(path, n);
            __sync_fetch_and_add(&shared->disk, 1);
            usleep(1000);
        }
}

int main(int argc, char **argv) {
    shared = mmap(0, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (!fork()) memory();
    for (int i = 3; i < argc; i++)
        if (!fork()) disk(argv[i]);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    inet_pton(AF_INET, argv[1], &to.sin_addr);
    int s = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(s, (struct sockaddr *)&to, sizeof to)) return 1;
    FILE *in = fdopen(dup(s), "r"), *out = fdopen(s, "w");
    for (unsigned long n = 1, back;; n++) {
        if (shared->bad[0]) fprintf(out, "%s\n", shared->bad);
        fprintf(out, "%lu %lu %lu\n", shared->memory, shared->disk, n);
        if (fflush(out) || fscanf(in, "%lu", &back) != 1 || back != n) return 1;
        usleep(20000);
    }
}
