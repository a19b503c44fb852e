/*
 * PID 1 of the benchmark's guest. Reads a workload's name from the console, runs it once, answers
 * "TOOK name seconds result", until end of file. With `workload=NAME` (and `runs=N`) on the kernel's
 * command line it runs that one and powers off: for profilers.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define KEEP(x) __asm__ volatile("" : "+r"(x))
#define PLAIN __attribute__((noinline, optimize("O2", "no-tree-vectorize", "no-inline")))

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/* Eight dependent instructions a turn, and the loop's two. */
PLAIN static uint64_t intloop(void)
{
	uint64_t a = 1, b = 2;
	for (uint64_t n = 100000000; n; n--)
		__asm__ volatile("add %1,%0\n\txor %0,%1\n\tlea 3(%0,%1),%0\n\tsub $7,%1\n\t"
				 "shl $1,%0\n\tor $1,%1\n\tand $-5,%0\n\tadd %0,%1"
				 : "+r"(a), "+r"(b));
	return a ^ b;
}

__attribute__((noinline, optimize("O1"))) static uint64_t fib(uint64_t n)
{
	return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

static uint64_t recursion(void)
{
	return fib(35);
}

__attribute__((noinline)) static uint64_t f0(uint64_t x) { return x + 1; }
__attribute__((noinline)) static uint64_t f1(uint64_t x) { return x ^ 5; }
__attribute__((noinline)) static uint64_t f2(uint64_t x) { return x * 3; }
__attribute__((noinline)) static uint64_t f3(uint64_t x) { return x - 9; }

PLAIN static uint64_t indirect(void)
{
	uint64_t (*volatile table[])(uint64_t) = { f0, f1, f2, f3 };
	uint64_t x = 1;
	for (int i = 0; i < 8000000; i++)
		x = table[(i ^ i >> 3) & 3](x);
	return x;
}

PLAIN static uint64_t sieve(void)
{
	enum { N = 2000000 };
	char *composite = calloc(N, 1);
	uint64_t primes = 0;
	for (int turn = 0; turn < 4; turn++) {
		memset(composite, 0, N);
		primes = 0;
		for (uint64_t i = 2; i < N; i++) {
			if (composite[i])
				continue;
			primes++;
			for (uint64_t j = i * i; j < N; j += i)
				composite[j] = 1;
		}
	}
	free(composite);
	return primes;
}

static uint64_t copy(void)
{
	enum { N = 1 << 20 };
	char *from = malloc(N), *to = malloc(N);
	memset(from, 7, N);
	memset(to, 1, N);
	for (int i = 0; i < 300; i++) {
		memcpy(to, from, N);
		KEEP(to);
	}
	uint64_t sum = to[0] + to[N - 1];
	free(from);
	free(to);
	return sum;
}

PLAIN static uint64_t chase(void)
{
	enum { N = 1 << 17 };
	uint32_t *next = malloc(N * 4), at = 0;
	/* A full cycle: x -> 5x + 3 modulo a power of two. */
	for (uint32_t i = 0; i < N; i++)
		next[i] = (i * 5 + 3) % N;
	for (int i = 0; i < 40000000; i++)
		at = next[at];
	free(next);
	return at;
}

__attribute__((noinline, optimize("O3"))) static void axpy_once(double *y, const double *x, double a, int n)
{
	for (int i = 0; i < n; i++)
		y[i] += a * x[i];
}

static uint64_t axpy(void)
{
	enum { N = 4096 };
	static double x[N], y[N];
	for (int i = 0; i < N; i++) {
		x[i] = i * 0.5;
		y[i] = 1;
	}
	for (int turn = 0; turn < 1500; turn++)
		axpy_once(y, x, 1e-3, N);
	return (uint64_t)y[N - 1];
}

__attribute__((noinline, optimize("O3"))) static void blend(uint32_t *y, const uint32_t *x, int n)
{
	for (int i = 0; i < n; i++)
		y[i] = (y[i] + x[i]) ^ (x[i] << 3);
}

static uint64_t sseint(void)
{
	enum { N = 8192 };
	static uint32_t x[N], y[N];
	for (int i = 0; i < N; i++)
		x[i] = i * 2654435761u;
	for (int turn = 0; turn < 8000; turn++)
		blend(y, x, N);
	return y[17];
}

PLAIN static uint64_t libm(void)
{
	double sum = 0;
	for (int i = 1; i < 250000; i++)
		sum += sin(i * 0.001) * cos(i * 0.002) + exp(-i * 1e-5);
	return (uint64_t)(sum * 1e6);
}

PLAIN static uint64_t x87(void)
{
	long double sum = 0, x = 1;
	for (int i = 1; i < 2000000; i++) {
		x = x * 1.0000001L + 1.0L / i;
		sum += x;
	}
	return (uint64_t)sum;
}

PLAIN static uint64_t getppid_loop(void)
{
	uint64_t sum = 0;
	for (int i = 0; i < 500000; i++)
		sum += syscall(SYS_getppid);
	return sum;
}

PLAIN static uint64_t faults(void)
{
	enum { N = 16 << 20 };
	uint64_t pages = 0;
	for (int turn = 0; turn < 5; turn++) {
		char *p = mmap(NULL, N, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (p == MAP_FAILED)
			return 0;
		madvise(p, N, MADV_NOHUGEPAGE);
		for (long i = 0; i < N; i += 4096, pages++)
			p[i] = 1;
		munmap(p, N);
	}
	return pages;
}

static uint64_t fork_exit(void)
{
	uint64_t done = 0;
	for (int i = 0; i < 150; i++) {
		pid_t child = fork();
		if (child == 0)
			_exit(0);
		int status;
		done += waitpid(child, &status, 0) == child;
	}
	return done;
}

static uint64_t run(char *const argv[], const char *in, const char *out)
{
	pid_t child = fork();
	if (child == 0) {
		int fd = open(in, O_RDONLY);
		dup2(fd, 0);
		fd = open(out, O_WRONLY | O_CREAT | O_TRUNC, 0600);
		dup2(fd, 1);
		execv("/bin/busybox", argv);
		_exit(127);
	}
	int status = -1;
	waitpid(child, &status, 0);
	return status;
}

static uint64_t fork_exec(void)
{
	uint64_t failed = 0;
	for (int i = 0; i < 60; i++)
		failed += run((char *[]){ "busybox", "true", NULL }, "/dev/null", "/dev/null") != 0;
	return failed;
}

static uint64_t pingpong(void)
{
	int to[2], from[2];
	char byte = 1;
	uint64_t turns = 0;
	if (pipe(to) || pipe(from))
		return 0;
	pid_t child = fork();
	if (child == 0) {
		close(to[1]);
		while (read(to[0], &byte, 1) == 1)
			if (write(from[1], &byte, 1) != 1)
				break;
		_exit(0);
	}
	for (int i = 0; i < 5000; i++)
		turns += write(to[1], &byte, 1) == 1 && read(from[0], &byte, 1) == 1;
	close(to[0]);
	close(to[1]);
	close(from[0]);
	close(from[1]);
	waitpid(child, NULL, 0);
	return turns;
}

/* A file of `mib` MiB that compresses a little, in the initramfs' own memory. */
static const char *data_file(int mib)
{
	static char path[32];
	struct stat st;
	snprintf(path, sizeof path, "/data%d", mib);
	if (stat(path, &st) == 0)
		return path;
	static unsigned char block[1 << 16];
	uint32_t seed = 12345;
	FILE *f = fopen(path, "w");
	for (int i = 0; f && i < mib * 16; i++) {
		for (size_t k = 0; k < sizeof block; k++) {
			seed = seed * 1664525 + 1013904223;
			block[k] = "etaoin shrdlu\n.,"[seed >> 28];
		}
		fwrite(block, sizeof block, 1, f);
	}
	if (f)
		fclose(f);
	return path;
}

static uint64_t first_word(const char *path)
{
	char text[17] = "";
	FILE *f = fopen(path, "r");
	if (f) {
		if (!fgets(text, sizeof text, f))
			text[0] = 0;
		fclose(f);
	}
	return strtoull(text, NULL, 16);
}

static uint64_t sha256sum(void)
{
	run((char *[]){ "busybox", "sha256sum", NULL }, data_file(16), "/out");
	return first_word("/out");
}

static uint64_t gzip(void)
{
	struct stat st = { 0 };
	run((char *[]){ "busybox", "gzip", "-c", NULL }, data_file(2), "/out");
	stat("/out", &st);
	return st.st_size;
}

static uint64_t shell(void)
{
	run((char *[]){ "busybox", "sh", "-c", "i=0; while [ $i -lt 15000 ]; do i=$((i+1)); done; echo $i", NULL },
	    "/dev/null", "/out");
	return first_word("/out");
}

static uint64_t awk(void)
{
	run((char *[]){ "busybox", "awk", "BEGIN { for (i = 0; i < 60000; i++) s += i % 7 * 1.5; print s }", NULL },
	    "/dev/null", "/out");
	return first_word("/out");
}

static const struct {
	const char *name;
	uint64_t (*work)(void);
} workloads[] = {
	{ "intloop", intloop },	  { "fib", recursion },	    { "indirect", indirect },	{ "sieve", sieve },
	{ "memcpy", copy },	  { "chase", chase },	    { "axpy", axpy },		{ "sseint", sseint },
	{ "libm", libm },	  { "x87", x87 },	    { "getppid", getppid_loop }, { "faults", faults },
	{ "forkexit", fork_exit }, { "forkexec", fork_exec }, { "pingpong", pingpong },	{ "sha256sum", sha256sum },
	{ "gzip", gzip },	  { "shell", shell },	    { "awk", awk },
};

static void answer(const char *name)
{
	for (size_t i = 0; i < sizeof workloads / sizeof *workloads; i++) {
		if (strcmp(workloads[i].name, name))
			continue;
		data_file(16);
		data_file(2);
		double start = now();
		uint64_t result = workloads[i].work();
		printf("TOOK %s %.6f %llx\n", name, now() - start, (unsigned long long)result);
		return;
	}
	printf("UNKNOWN %s\n", name);
}

/* While it is on: pages in turn, 100 MB of them a second however fast the processor is. */
static void write_at_rate(volatile char *on, uint64_t *memory, uint64_t pages)
{
	enum { RATE = 100000000 / 4096, AT_ONCE = 500 };
	double began = 0;
	uint64_t done = 0;
	for (;; usleep(*on ? 1000 : 20000)) {
		if (!*on) {
			began = 0;
			continue;
		}
		if (!began) {
			began = now();
			done = 0;
		}
		uint64_t due = (now() - began) * RATE;
		/* What was missed while it stood still is not made up for. */
		if (due > done + AT_ONCE)
			done = due - AT_ONCE;
		for (; done < due; done++)
			memory[done % pages * 512]++;
	}
}

/* A guest to be moved: 512 MiB in use, a tick every millisecond; "d" has 32 MiB written at a rate, "s" ends that.
   Without dots it measures the longest time between two ticks itself; "g" has it told, and begins anew. */
static void ticks(int dots)
{
	enum { IN_USE = 512 << 20, WRITTEN = 32 << 20 };
	uint64_t *memory = mmap(NULL, IN_USE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (uint64_t i = 0; i < IN_USE / 8; i += 8)
		memory[i] = i * 0x9e3779b97f4a7c15 | 1;
	volatile char *writing = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (!fork())
		write_at_rate(writing, memory, WRITTEN / 4096);
	if (!fork()) {
		char key;
		while (read(0, &key, 1) == 1) {
			*writing = key == 'd' ? 1 : key == 's' ? 0 : *writing;
			if (key == 'g')
				writing[1] = 1;
		}
		_exit(0);
	}
	struct termios term;
	if (tcgetattr(0, &term) == 0) {
		term.c_lflag &= ~(ECHO | ICANON);
		tcsetattr(0, TCSANOW, &term);
	}
	printf("TICKS\n");
	double last = now(), longest = 0;
	for (;;) {
		if (dots && write(1, ".", 1) != 1)
			return;
		usleep(1000);
		double tick = now();
		longest = tick - last > longest ? tick - last : longest;
		last = tick;
		if (writing[1]) {
			printf("LONGEST %.0f us\n", longest * 1e6);
			writing[1] = 0;
			longest = 0;
			last = now();
		}
	}
}

int main(void)
{
	mkdir("/dev", 0755);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	int console = open("/dev/console", O_RDWR);
	dup2(console, 0);
	dup2(console, 1);
	dup2(console, 2);
	setvbuf(stdout, NULL, _IOLBF, 0);
	struct termios term;
	if (tcgetattr(0, &term) == 0) {
		term.c_lflag &= ~ECHO;
		tcsetattr(0, TCSANOW, &term);
	}
	const char *one = getenv("workload"), *runs = getenv("runs");
	if (one && (!strcmp(one, "ticks") || !strcmp(one, "pauses"))) {
		ticks(!strcmp(one, "ticks"));
	} else if (one) {
		for (int i = runs ? atoi(runs) : 1; i > 0; i--)
			answer(one);
	} else {
		char line[64];
		printf("READY\n");
		while (fgets(line, sizeof line, stdin)) {
			line[strcspn(line, "\r\n")] = 0;
			answer(line);
		}
	}
	fflush(stdout);
	tcdrain(1);
	reboot(RB_POWER_OFF);
	return 0;
}
