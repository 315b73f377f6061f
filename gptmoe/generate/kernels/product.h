/* What a product with a packed weight is told. B blocks of 64 outputs, P pairs of inputs. */

#pragma once

#include "common.h"

typedef struct {
    const words *weight;  /* [B, P, WIDE]: for each pair of inputs, two numbers of each output, 64
                             outputs together: as oneDNN packs */
    const uint32_t *x;    /* [R, P] */
    const uint16_t *bias; /* [O] or null */
    uint16_t *out;        /* [R, O] */
    int64_t next, blocks, pairs, chunk, outputs, rows;
} Product;
