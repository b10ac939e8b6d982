// main() for a fuzz target without libFuzzer: runs it on every input of the files named. A file is a sequence of inputs,
// each after its length (32 bits, little-endian). Prints the number of inputs.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);

int main(int argc, char ** argv) {
    long runs = 0;
    for (int i = 1; i < argc; i++) {
        FILE * file = fopen(argv[i], "rb");
        uint8_t length[4];
        if (file == NULL) {
            perror(argv[i]);
            return 2;
        }
        while (fread(length, 1, sizeof(length), file) == sizeof(length)) {
            const size_t size = length[0] | (size_t) length[1] << 8 | (size_t) length[2] << 16 | (size_t) length[3] << 24;
            uint8_t * data = malloc(size ? size : 1); // of exactly this size, so that a sanitizer sees reads past it
            if (data == NULL || fread(data, 1, size, file) != size) {
                fprintf(stderr, "%s ends inside an input\n", argv[i]);
                return 2;
            }
            LLVMFuzzerTestOneInput(data, size);
            free(data);
            runs++;
        }
        fclose(file);
    }
    printf("%ld inputs\n", runs);
    return 0;
}
