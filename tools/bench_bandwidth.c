// The read bandwidth of the machine: bench_bandwidth THREADS MIB REPEATS prints bytes per second, the best of the repeats.
// Every thread reads its share of MIB mebibytes once a repeat. tools/bench_runtime.py builds and runs this.

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
    const uint64_t * words;
    size_t count;
    uint64_t sum;
} share;

static void * fill(void * p) { // by the thread's own node, if the machine has several
    share * s = p;
    memset((void *) (uintptr_t) s->words, 1, s->count*sizeof(uint64_t));
    return NULL;
}

static void * add_up(void * p) {
    share * s = p;
    uint64_t sums[32] = { 0 };
    for (size_t i = 0; i + 32 <= s->count; i += 32) {
        for (size_t j = 0; j < 32; j++) {
            sums[j] += s->words[i + j];
        }
    }
    for (size_t j = 0; j < 32; j++) {
        s->sum += sums[j];
    }
    return NULL;
}

static void run(void * (*work)(void *), share * shares, int threads) {
    pthread_t * handles = calloc((size_t) threads, sizeof(pthread_t));
    for (int t = 1; t < threads; t++) {
        if (handles == NULL || pthread_create(&handles[t], NULL, work, &shares[t]) != 0) {
            fprintf(stderr, "no thread %d\n", t);
            exit(1);
        }
    }
    work(&shares[0]);
    for (int t = 1; t < threads; t++) {
        pthread_join(handles[t], NULL);
    }
    free(handles);
}

int main(int argc, char ** argv) {
    const int threads = argc == 4 ? atoi(argv[1]) : 0, repeats = argc == 4 ? atoi(argv[3]) : 0;
    const size_t words = argc == 4 ? (size_t) atoll(argv[2])*(1 << 20)/sizeof(uint64_t) : 0;
    if (threads < 1 || words < 1 || repeats < 1) {
        fprintf(stderr, "usage: %s THREADS MIB REPEATS\n", argv[0]);
        return 2;
    }
    uint64_t * data = aligned_alloc(4096, words*sizeof(uint64_t));
    share * shares = calloc((size_t) threads, sizeof(share));
    if (data == NULL || shares == NULL) {
        fprintf(stderr, "out of memory\n");
        return 1;
    }
    for (int t = 0; t < threads; t++) {
        const size_t first = words/(size_t) threads*(size_t) t;
        shares[t] = (share) { data + first, words/(size_t) threads, 0 };
    }
    run(fill, shares, threads);
    double best = 0;
    uint64_t sum = 0;
    for (int r = 0; r < repeats; r++) {
        struct timespec a, b;
        clock_gettime(CLOCK_MONOTONIC, &a);
        run(add_up, shares, threads);
        clock_gettime(CLOCK_MONOTONIC, &b);
        const double seconds = (double) (b.tv_sec - a.tv_sec) + 1e-9*(double) (b.tv_nsec - a.tv_nsec);
        const double speed = (double) (words/(size_t) threads*(size_t) threads*sizeof(uint64_t))/seconds;
        best = speed > best ? speed : best;
        sum += shares[threads - 1].sum; // so that nothing is left out
    }
    fprintf(stderr, "sum %llu\n", (unsigned long long) sum);
    printf("%.0f\n", best);
    return 0;
}
