/* kernels_of_type.h: every op for the type T. */
#include "row.h"

#include "activation.h"
#include "convert.h"

#include "op_stats.h"

#include "affine.h"

#include "steps.h"

#include "op_half.h"
#include "op_layer_norm.h"

#include "op_columns.h"
#include "op_layer_norm_backward.h"
#include "op_moments.h"
#include "op_channels.h"
