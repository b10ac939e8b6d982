// Prints every id of the type table that no type uses, with its name and block size; then tries the files named as
// arguments, and prints whether gguf refuses them.

#include "ggml.h"
#include "gguf.h"

#include <stdio.h>

int main(int argc, char ** argv) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const struct ggml_type_traits * traits = ggml_get_type_traits((enum ggml_type) i);
        if (ggml_blck_size((enum ggml_type) i) == 0) {
            printf("unused %d %s %d %d\n", i, ggml_type_name((enum ggml_type) i), (int) ggml_type_size((enum ggml_type) i),
                   traits->to_float != NULL || traits->from_float_ref != NULL || ggml_is_quantized((enum ggml_type) i));
        }
    }
    for (int i = 1; i < argc; i++) {
        struct gguf_init_params params = { true, NULL };
        struct gguf_context * file = gguf_init_from_file(argv[i], params);
        printf("%s %s\n", file == NULL ? "refused" : "accepted", argv[i]);
        gguf_free(file);
    }
    return 0;
}
