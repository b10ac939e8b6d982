#pragma once

#include <stdio.h>
#include <stdlib.h>

// Memory at a multiple of 64 bytes; ends the program where there is none.
static void * allocate(size_t size) {
    void * p = aligned_alloc(64, (size + 63)/64*64);
    if (p == NULL) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    return p;
}
