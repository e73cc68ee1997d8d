/* isa_scalar.c: the kernels in scalar. */
#include <stddef.h>

#include "vec_scalar.h"

#include "kernels.h"
