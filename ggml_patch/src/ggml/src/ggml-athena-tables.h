// Made by tools/make_tables_header.py from athena_gguf/format/tables.py: do not edit.

#pragma once

#include <stdint.h>

typedef struct {
    uint8_t t1[16];
    uint8_t t2[16];
} athena_tables;

static const athena_tables athena_tables_a2 = {
    .t1 = {  3, 11, 17,  8, 29, 29, 36, 30, 39, 49, 49, 44, 61, 69, 73, 67 },
    .t2 = { 28,  0, 44, 19, 45, 17, 20, 39,  6, 30, 53,  6, 27,  2, 42, 22 },
};

static const athena_tables athena_tables_a3 = {
    .t1 = { 93, 76, 73, 64, 62, 56, 53, 47, 46, 41, 38, 32, 29, 20, 18,  0 },
    .t2 = { 10, 21, 14,  0,  9, 34, 24,  7, 24, 15, 17, 29,  7, 24, 11, 25 },
};

static const athena_tables athena_tables_a4 = {
    .t1 = { 44,  0, 12, 19, 28, 32, 37, 41, 50, 47, 53, 57, 61, 71, 78, 91 },
    .t2 = { 19,  5, 32, 23,  9, 17, 13, 27, 36,  4, 23, 10, 30,  0, 16, 24 },
};
