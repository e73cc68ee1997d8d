# Group, instance and batch norm: the structs of channels.c, filled from arrays that channels.py has
# checked; and the calls that are plain enough to go straight down.

cdef enum:
    #: Rows of a block where statistics run down the rows (channels last).
    BLOCK_ROWS = 64

#: Padded variances below these may have lost digits, as op_stats.h has them.
cdef double LEAST_F32 = 2.0**-80, LEAST_F64 = 2.0**-600


cdef inline bint moves_much(Py_ssize_t elements, fn_dtype dtype, int arrays) noexcept:
    return arrays * elements * (8 if dtype == FN_F64 else 4) >= GIL_BYTES


cdef int raise_no_room(int status) except -1:
    if status != FN_OK:
        raise MemoryError("no memory for a thread's row of elements; nothing was written")
    return 0


cdef fn_channels layout_of(object layout):
    """units, stride, rows, row_stride, planes, plane, kinds."""
    cdef fn_channels l
    l.units, l.stride, l.rows, l.row_stride, l.planes, l.plane, l.kinds = layout
    return l


cdef inline Py_ssize_t elements_of(const fn_channels *l) noexcept:
    return l.units * l.rows * l.planes * l.plane


cdef int call_channel_norm(fn_channel_norm_args *args, fn_dtype dtype) except -1:
    cdef int status
    if moves_much(elements_of(&args.layout), dtype, 2):
        with nogil:
            status = fn_channel_norm(args, dtype, 0)
    else:
        status = fn_channel_norm(args, dtype, 0)
    return raise_no_room(status)


cdef int call_channel_backward(fn_channel_norm_backward_args *args, fn_dtype dtype) except -1:
    cdef int status
    if moves_much(elements_of(&args.layout), dtype, 3):
        with nogil:
            status = fn_channel_norm_backward(args, dtype, 0)
    else:
        status = fn_channel_norm_backward(args, dtype, 0)
    return raise_no_room(status)


def channel_norm(layout, compute, ndarray x, ndarray y, weight, bias, ndarray mean,
                 variance, ndarray rstd, refused, double eps, int activation, bint warm, *,
                 bint plan=False):
    """Units of x into y (contiguous, of one shape). refused None: mean and rstd are given, of each
    kind; else they, the variance and `refused` are written, of each unit."""
    cdef fn_channel_norm_args args
    cdef fn_dtype dtype = dtype_of(compute.num)
    memset(&args, 0, sizeof(args))
    args.layout = layout_of(layout)
    args.x = parameter_data(x)
    args.y = cnp.PyArray_DATA(y)
    args.x_type, args.y_type = storage_of(x), storage_of(y)
    args.weight, args.bias = parameter_data(weight), parameter_data(bias)
    args.mean = <double *>cnp.PyArray_DATA(mean)
    args.rstd = <double *>cnp.PyArray_DATA(rstd)
    args.variance = <double *>parameter_data(variance)
    args.refused = <unsigned char *>parameter_data(refused)
    args.given = refused is None
    args.eps = eps
    args.activation = <fn_activation>activation
    args.y_is_warm = warm
    if plan:
        return plan_dict(fn_plan_channel_norm(&args, dtype, 0), args.layout.units,
                         args.layout.rows * args.layout.planes * args.layout.plane)
    call_channel_norm(&args, dtype)


def channel_norm_backward(layout, compute, ndarray dy, ndarray x, dx, weight, ndarray mean,
                          ndarray rstd, ndarray sums, ndarray refused, bint given, bint warm, *,
                          bint plan=False):
    """dx (or None), and of each plane of each unit dweight and dbias in `sums`."""
    cdef fn_channel_norm_backward_args args
    cdef fn_dtype dtype = dtype_of(compute.num)
    memset(&args, 0, sizeof(args))
    args.layout = layout_of(layout)
    args.dy, args.x, args.dx = parameter_data(dy), parameter_data(x), <void *>parameter_data(dx)
    args.dy_type, args.x_type = storage_of(dy), storage_of(x)
    args.weight = parameter_data(weight)
    args.mean = <const double *>cnp.PyArray_DATA(mean)
    args.rstd = <const double *>cnp.PyArray_DATA(rstd)
    args.sums = <double *>cnp.PyArray_DATA(sums)
    args.refused = <unsigned char *>cnp.PyArray_DATA(refused)
    args.given = given
    args.dx_is_warm = warm
    if plan:
        return plan_dict(fn_plan_channel_norm_backward(&args, dtype, 0), args.layout.units,
                         args.layout.rows * args.layout.planes * args.layout.plane)
    call_channel_backward(&args, dtype)


# ---- channels last -------------------------------------------------------------------------------

cdef void fill_rows(fn_channels_last_args *args, ndarray x, Py_ssize_t sample) noexcept:
    """x: contiguous, not empty, its last axis the channels; sample: rows that share statistics."""
    memset(args, 0, sizeof(args[0]))
    args.cols = cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1)
    args.rows = cnp.PyArray_SIZE(x) // args.cols if args.cols else 0
    args.sample, args.block = sample, BLOCK_ROWS
    args.blocks = (
        args.rows // sample * ((sample + BLOCK_ROWS - 1) // BLOCK_ROWS) if sample else 0
    )
    args.x = cnp.PyArray_DATA(x)


cdef ndarray block_sums(fn_channels_last_args *args):
    cdef npy_intp[3] dims
    dims[0], dims[1], dims[2] = 3, args.blocks, args.cols
    array = cnp.PyArray_EMPTY(3, dims, cnp.NPY_FLOAT64, 0)
    args.sums = <double *>cnp.PyArray_DATA(array)
    return array


def channels_last_moments(ndarray x, Py_ssize_t sample, compute):
    """Mean (as pivot and shift) and sum of squared deviations of each channel of each sample,
    float64 (3, samples, cols); x: (rows, cols), contiguous."""
    cdef fn_channels_last_args args
    cdef fn_dtype dtype = dtype_of(compute.num)
    cdef int status
    fill_rows(&args, x, sample)
    args.x_type = storage_of(x)
    sums = block_sums(&args)
    with nogil:
        status = fn_channels_last_moments(&args, dtype, 0)
    raise_no_room(status)
    return merged_moments(sums, args.rows // sample, sample)


def channels_last_dots(ndarray dy, ndarray x, ndarray pivot, Py_ssize_t sample):
    """Sums over each sample of x - pivot, dy and their product, float64 (3, samples, cols)."""
    cdef fn_channels_last_args args
    cdef fn_dtype dtype = dtype_of(cnp.PyArray_TYPE(pivot))
    cdef int status
    fill_rows(&args, x, sample)
    args.dy = cnp.PyArray_DATA(dy)
    args.x_type, args.dy_type = storage_of(x), storage_of(dy)
    args.terms[0] = cnp.PyArray_DATA(pivot)
    sums = block_sums(&args)
    with nogil:
        status = fn_channels_last_dots(&args, dtype, 0)
    raise_no_room(status)
    return added_blocks(sums, args.rows // sample)


cdef ndarray merged_moments(ndarray sums, Py_ssize_t samples, Py_ssize_t rows):
    """Blocks of a sample merged one by one, in order (Chan), by their distance from the first's
    pivot."""
    cdef Py_ssize_t cols = cnp.PyArray_DIM(sums, 2), blocks = cnp.PyArray_DIM(sums, 1)
    cdef Py_ssize_t each = blocks // samples if samples else 0, s, b, j, done, n
    cdef double first, mean, squares, delta, part
    cdef npy_intp[3] dims
    cdef const double *at
    cdef double *into
    cdef ndarray result
    dims[0], dims[1], dims[2] = 3, samples, cols
    result = cnp.PyArray_EMPTY(3, dims, cnp.NPY_FLOAT64, 0)
    into = <double *>cnp.PyArray_DATA(result)
    with nogil:
        for s in range(samples):
            for j in range(cols):
                at = <const double *>cnp.PyArray_DATA(sums) + s * each * cols + j
                first = at[0]
                mean = at[blocks * cols]
                squares = at[2 * blocks * cols]
                done = min(rows, <Py_ssize_t>BLOCK_ROWS)
                for b in range(1, each):
                    at += cols
                    n = min(rows - done, <Py_ssize_t>BLOCK_ROWS)
                    delta = ((at[0] - first) + at[blocks * cols]) - mean
                    part = <double>n / <double>(done + n)
                    mean += delta * part
                    squares += at[2 * blocks * cols] + delta * delta * <double>done * part
                    done += n
                into[s * cols + j] = first
                into[(samples + s) * cols + j] = mean
                into[(2 * samples + s) * cols + j] = squares
    return result


cdef ndarray added_blocks(ndarray sums, Py_ssize_t samples):
    """Blocks of a sample added in order."""
    cdef Py_ssize_t cols = cnp.PyArray_DIM(sums, 2), blocks = cnp.PyArray_DIM(sums, 1)
    cdef Py_ssize_t each = blocks // samples if samples else 0, k, s, b, j
    cdef npy_intp[3] dims
    cdef const double *at
    cdef double *into
    cdef ndarray result
    dims[0], dims[1], dims[2] = 3, samples, cols
    result = cnp.PyArray_ZEROS(3, dims, cnp.NPY_FLOAT64, 0)
    at = <const double *>cnp.PyArray_DATA(sums)
    with nogil:
        for k in range(3):
            for s in range(samples):
                into = <double *>cnp.PyArray_DATA(result) + (k * samples + s) * cols
                for b in range(each):
                    for j in range(cols):
                        into[j] += at[j]
                    at += cols
    return result


def channels_last(dy, ndarray x, ndarray y, terms, Py_ssize_t sample, int activation=0, *,
                  bint plan=False):
    """y = (x - pivot)*factor + shift, or with a dy: dy*factor + ((x - pivot)*slope + shift); terms:
    these, (samples, cols) of the type that is computed in."""
    cdef fn_channels_last_args args
    cdef fn_dtype dtype = dtype_of(cnp.PyArray_TYPE(<ndarray>terms[0]))
    cdef int status, k
    fill_rows(&args, x, sample)
    args.dy = parameter_data(dy)
    args.y = cnp.PyArray_DATA(y)
    args.x_type, args.y_type = storage_of(x), storage_of(y)
    args.dy_type = args.x_type if dy is None else storage_of(dy)
    args.activation = <fn_activation>activation
    for k in range(len(terms)):
        args.terms[k] = cnp.PyArray_DATA(<ndarray>terms[k])
    if plan:
        return plan_dict(fn_plan_channels_last(&args, dtype, 0), args.rows // max(sample, 1),
                         args.cols)
    with nogil:
        status = fn_channels_last(&args, dtype, 0)
    raise_no_room(status)


# ---- moments of blocks, for BatchStatistics ------------------------------------------------------

def plane_moments(ndarray x):
    """Of each row of x, (rows, cols) and contiguous: pivot, shift and the sum of squared deviations
    from the mean, which is pivot + shift; float64 (3, rows)."""
    cdef fn_plane_moments_args args
    cdef npy_intp[2] dims
    cdef int status
    cdef fn_dtype dtype = FN_F64 if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64 else FN_F32
    dims[0], dims[1] = 3, cnp.PyArray_DIM(x, 0)
    array = cnp.PyArray_EMPTY(2, dims, cnp.NPY_FLOAT64, 0)
    args.rows, args.cols = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1)
    args.x = cnp.PyArray_DATA(x)
    args.x_type = storage_of(x)
    args.sums = <double *>cnp.PyArray_DATA(array)
    if args.cols == 0:
        array.fill(0)
        return array
    with nogil:
        status = fn_plane_moments(&args, dtype, 0)
    raise_no_room(status)
    return array


# ---- straight down -------------------------------------------------------------------------------

#: Who puts right what a straight call refused: (layout, x, y, weight, bias, statistics, refused,
#: eps).
cdef object careful = None


def register_careful(function):
    """Let `function` normalise the units that straight calls refuse."""
    global careful
    careful = function


cdef inline bint is_channel_vector(object w, int typenum, Py_ssize_t channels) noexcept:
    return w is None or (
        is_plain(w, typenum, C_ALIGNED) and cnp.PyArray_NDIM(<ndarray>w) == 1
        and cnp.PyArray_DIM(<ndarray>w, 0) == channels
    )


cdef inline void plain_layout(ndarray x, Py_ssize_t groups, bint batch, bint given,
                              fn_channels *l) noexcept:
    """Of a contiguous array, channels first; `batch`: statistics over the samples too; `given`:
    they are of each channel, and planes may go one by one."""
    cdef Py_ssize_t samples = cnp.PyArray_DIM(x, 0), channels = cnp.PyArray_DIM(x, 1)
    cdef Py_ssize_t size = cnp.PyArray_SIZE(x) // (samples * channels)
    l.plane = size
    l.rows, l.row_stride, l.planes = 1, 0, 1
    if batch and not given:
        l.units, l.kinds, l.stride = channels, channels, size
        l.rows, l.row_stride = samples, channels * size
    else:
        l.units, l.kinds, l.planes = samples * groups, groups, channels // groups
        l.stride = l.planes * size


cdef bint as_doubles(object a, Py_ssize_t n, double *into) noexcept:
    """Whether `a` is a plain array of so many floats or doubles, which are copied then."""
    cdef Py_ssize_t i
    if is_plain(a, cnp.NPY_FLOAT64, C_ALIGNED) and cnp.PyArray_SIZE(<ndarray>a) == n:
        for i in range(n):
            into[i] = (<const double *>cnp.PyArray_DATA(<ndarray>a))[i]
        return True
    if is_plain(a, cnp.NPY_FLOAT32, C_ALIGNED) and cnp.PyArray_SIZE(<ndarray>a) == n:
        for i in range(n):
            into[i] = (<const float *>cnp.PyArray_DATA(<ndarray>a))[i]
        return True
    return False


cdef inline bint has_shape(object a, int ndim, Py_ssize_t first, Py_ssize_t last) noexcept:
    """(last,), or (first, last)."""
    return (
        cnp.PyArray_CheckExact(a) and cnp.PyArray_NDIM(<ndarray>a) == ndim
        and cnp.PyArray_DIM(<ndarray>a, ndim - 1) == last
        and (ndim == 1 or cnp.PyArray_DIM(<ndarray>a, 0) == first)
    )


cdef ndarray doubles_of(object mean, object rstd, int ndim, Py_ssize_t first, Py_ssize_t last):
    """mean and rstd one after the other as doubles; None where they are not plain or not so
    many."""
    cdef npy_intp n = 2 * last if ndim == 1 else 2 * first * last
    cdef double *into
    if not has_shape(mean, ndim, first, last) or not has_shape(rstd, ndim, first, last):
        return None
    array = cnp.PyArray_EMPTY(1, &n, cnp.NPY_FLOAT64, 0)
    into = <double *>cnp.PyArray_DATA(array)
    if not as_doubles(mean, n // 2, into) or not as_doubles(rstd, n // 2, into + n // 2):
        return None
    return array


cdef ndarray running_doubles(object mean, object variance, double eps, Py_ssize_t channels):
    """Running statistics as mean and rstd; None where they are not plain."""
    cdef ndarray array = doubles_of(mean, variance, 1, 0, channels)
    cdef double *rstd
    cdef Py_ssize_t i
    if array is not None:
        rstd = <double *>cnp.PyArray_DATA(array) + channels
        for i in range(channels):
            rstd[i] = 1.0 / sqrt(rstd[i] + eps)
    return array


cdef inline double number_of(object w, bint double_, Py_ssize_t i, double otherwise) noexcept:
    if w is None:
        return otherwise
    if double_:
        return (<const double *>cnp.PyArray_DATA(<ndarray>w))[i]
    return (<const float *>cnp.PyArray_DATA(<ndarray>w))[i]


cdef inline bint is_lost(double factor, double w, bint wide) noexcept:
    """As channel_repairs.py has it."""
    return (
        fabs(factor) < (DBL_MIN if wide else FLT_MIN)
        and fabs(w) >= (2.0**-960 if wide else 2.0**-100)
    )


cdef bint are_near(ndarray known, object weight, int typenum) noexcept:
    """Whether nothing leaves the range of what is computed in by these means and rstds (where the
    weight is plain, as it must be anyway). As by_far_statistics of channel_forward.py has it."""
    cdef Py_ssize_t i, channels = cnp.PyArray_SIZE(known) // 2
    cdef const double *mean = <const double *>cnp.PyArray_DATA(known)
    cdef const double *rstd = mean + channels
    cdef bint wide = typenum == cnp.NPY_FLOAT64
    cdef double farthest = 2.0**960 if wide else 2.0**100, most = DBL_MAX if wide else FLT_MAX, w
    if not is_channel_vector(weight, typenum, channels):
        return False
    for i in range(channels):
        w = number_of(weight, wide, i, 1)
        if not (fabs(mean[i]) <= farthest and fabs(rstd[i]) <= DBL_MAX
                and fabs(rstd[i] * w) <= most and not is_lost(rstd[i] * w, w, wide)):
            return False
    return True


cdef inline bint is_rows(object x) noexcept:
    """Whether x is a plain array of what is computed in, not empty, of two axes or more."""
    cdef int typenum
    if not cnp.PyArray_CheckExact(x) or cnp.PyArray_NDIM(<ndarray>x) < 2:
        return False
    typenum = cnp.PyArray_TYPE(<ndarray>x)
    return (
        (typenum == cnp.NPY_FLOAT32 or typenum == cnp.NPY_FLOAT64)
        and is_plain(x, typenum, C_ALIGNED) and cnp.PyArray_SIZE(<ndarray>x) != 0
    )


cdef inline bint is_channels_first(object x) noexcept:
    """Whether it is one of planes of more than one element."""
    return (
        is_rows(x) and cnp.PyArray_SIZE(<ndarray>x)
        != cnp.PyArray_DIM(<ndarray>x, 0) * cnp.PyArray_DIM(<ndarray>x, 1)
    )


def straight_batch_inference(x, running_mean, running_var, weight, bias, eps, out):
    """y where all is plain, else None."""
    cdef Py_ssize_t channels
    cdef ndarray known
    if not is_channels_first(x) or not PyFloat_CheckExact(eps) or not eps >= 0:
        return None
    channels = cnp.PyArray_DIM(<ndarray>x, 1)
    known = running_doubles(running_mean, running_var, eps, channels)
    if known is None or not are_near(known, weight, cnp.PyArray_TYPE(<ndarray>x)):
        return None
    if out is not None and not (
            is_plain(out, cnp.PyArray_TYPE(<ndarray>x), C_ALIGNED_WRITEABLE)
            and apart(<ndarray>out, running_mean) and apart(<ndarray>out, running_var)):
        return None
    return straight_channels(x, channels, weight, bias, eps, out, known, True)[0]


def straight_channel_norm(x, groups, weight, bias, eps, out):
    """Group norm (groups 0: instance norm): y where all is plain, else None."""
    cdef Py_ssize_t channels, count
    if (not is_channels_first(x) or not PyFloat_CheckExact(eps) or not eps >= 0
            or not PyLong_CheckExact(groups)):
        return None
    channels = cnp.PyArray_DIM(<ndarray>x, 1)
    if groups < 0 or groups > channels:
        return None
    count = groups
    if count == 0:
        count = channels
    if channels % count:
        return None
    return straight_channels(x, count, weight, bias, eps, out, None, False)[0]


def straight_batch_training(x, weight, bias, eps, out):
    """(y, mean, variance) where all is plain, else None; both float64."""
    if not is_channels_first(x) or not PyFloat_CheckExact(eps) or not eps >= 0:
        return None
    y, found = straight_channels(x, cnp.PyArray_DIM(<ndarray>x, 1), weight, bias, eps, out, None,
                                 True)
    return None if y is None else (y, found[0], found[1])


cdef tuple straight_channels(ndarray x, Py_ssize_t groups, object weight, object bias, double eps,
                             object out, ndarray known, bint batch):
    """y, None where not all is plain, and the statistics that were found, (4, units). `known`: mean
    and rstd of each channel, where they are given."""
    cdef fn_channel_norm_args args
    cdef int typenum = cnp.PyArray_TYPE(x), warm = 0
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x, 1)
    cdef ndarray y, found
    cdef npy_intp[2] dims
    if (
        not is_channel_vector(weight, typenum, channels)
        or not is_channel_vector(bias, typenum, channels)
        or not (out is None or is_result(out, x, typenum, weight, bias))
    ):
        return None, None
    memset(&args, 0, sizeof(args))
    plain_layout(x, groups, batch, known is not None, &args.layout)
    if out is None:
        y = new_array(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), typenum, &warm)
    else:
        y, warm = out, 1
    args.x, args.y = cnp.PyArray_DATA(x), cnp.PyArray_DATA(y)
    args.x_type = args.y_type = dtype_of(typenum)
    args.weight, args.bias = parameter_data(weight), parameter_data(bias)
    args.eps = eps
    args.y_is_warm = warm
    if known is not None:
        args.given = 1
        args.mean = <double *>cnp.PyArray_DATA(known)
        args.rstd = args.mean + channels
        call_channel_norm(&args, args.x_type)
        return y, None
    dims[0], dims[1] = 4, args.layout.units
    found = cnp.PyArray_EMPTY(2, dims, cnp.NPY_FLOAT64, 0)
    args.mean = <double *>cnp.PyArray_DATA(found)
    args.variance = args.mean + dims[1]
    args.rstd = args.variance + dims[1]
    args.refused = <unsigned char *>(args.rstd + dims[1])
    call_channel_norm(&args, args.x_type)
    if memchr(args.refused, 1, dims[1]) is not NULL:
        refused = found[3].view(np.uint8)[: dims[1]]
        careful(as_tuple(&args.layout), x, y, weight, bias, found[:3], refused, eps)
    return y, found


def straight_channel_backward(dy, x, groups, mean, rstd, weight, bias, output_mask, bint batch,
                              running_var=None, double eps=0):
    """(dx, dweight, dbias) where all is plain and nothing is refused, else None. groups: 0 for one
    a channel. running_var: `mean` and it normalised, and not the batch's own statistics."""
    cdef fn_channel_norm_backward_args args
    cdef int typenum, warm = 0
    cdef bint want_dx, want_dw, want_db, given = running_var is not None
    cdef Py_ssize_t samples, channels, count, i
    cdef ndarray known, sums, dx = None
    cdef npy_intp[2] dims
    if (not is_channels_first(x) or not PyLong_CheckExact(groups)
            or not PyTuple_CheckExact(output_mask) or PyTuple_GET_SIZE(output_mask) != 3):
        return None
    typenum = cnp.PyArray_TYPE(<ndarray>x)
    samples, channels = cnp.PyArray_DIM(<ndarray>x, 0), cnp.PyArray_DIM(<ndarray>x, 1)
    if groups < 0 or groups > channels or not eps >= 0:
        return None
    count = groups
    if count == 0:
        count = channels
    if (
        channels % count or not is_plain(dy, typenum, C_ALIGNED) or not same_shape(<ndarray>dy, x)
        or not is_channel_vector(weight, typenum, channels)
        or not is_channel_vector(bias, typenum, channels)
    ):
        return None
    if given:
        known = running_doubles(mean, running_var, eps, channels)
    else:
        known = doubles_of(mean, rstd, 1 if batch else 2, samples, count)
    if known is None:
        return None
    for flag in output_mask:
        if not is_bool(flag):
            return None
    want_dx, want_dw, want_db = output_mask
    memset(&args, 0, sizeof(args))
    plain_layout(<ndarray>x, count, batch, given, &args.layout)
    dims[0] = args.layout.units * args.layout.planes
    dims[1] = 2
    if want_dx:
        dx = new_array(cnp.PyArray_NDIM(<ndarray>x), cnp.PyArray_DIMS(<ndarray>x), typenum, &warm)
        args.dx = cnp.PyArray_DATA(dx)
    i = args.layout.units // 16 + 1  # room for a byte a unit
    dims[0] += i
    sums = cnp.PyArray_EMPTY(2, dims, cnp.NPY_FLOAT64, 0)
    args.dy, args.x = cnp.PyArray_DATA(<ndarray>dy), cnp.PyArray_DATA(<ndarray>x)
    args.dy_type = args.x_type = dtype_of(typenum)
    args.weight = parameter_data(weight)
    args.mean = <const double *>cnp.PyArray_DATA(known)
    args.rstd = args.mean + cnp.PyArray_SIZE(known) // 2
    args.sums = <double *>cnp.PyArray_DATA(sums)
    args.refused = <unsigned char *>(args.sums + 2 * (dims[0] - i))
    args.given = given
    args.dx_is_warm = warm
    call_channel_backward(&args, args.x_type)
    if memchr(args.refused, 1, args.layout.units) is not NULL:
        return None
    totals = sample_totals(sums, (dims[0] - i) // channels, channels, typenum)
    return dx, totals[1] if want_dw else None, totals[0] if want_db else None


cdef ndarray sample_totals(ndarray sums, Py_ssize_t lots, npy_intp channels, int typenum):
    """dbias and dweight, (2, C), from pairs of dweight and dbias of each channel of each lot: added
    in double, in order."""
    cdef npy_intp[2] dims
    cdef const double *at = <const double *>cnp.PyArray_DATA(sums)
    cdef double dweight, dbias
    cdef Py_ssize_t lot, j
    cdef void *into
    dims[0], dims[1] = 2, channels
    result = cnp.PyArray_EMPTY(2, dims, typenum, 0)
    into = cnp.PyArray_DATA(result)
    for j in range(channels):
        dweight = dbias = 0
        for lot in range(lots):
            dweight += at[2 * (lot * channels + j)]
            dbias += at[2 * (lot * channels + j) + 1]
        if typenum == cnp.NPY_FLOAT64:
            (<double *>into)[j] = dbias
            (<double *>into)[channels + j] = dweight
        else:
            (<float *>into)[j] = <float>dbias
            (<float *>into)[channels + j] = <float>dweight
    return result


def total_over_samples(ndarray sums, compute):
    """The same of (lots, C, 2): dbias and dweight, (2, C)."""
    return sample_totals(sums, cnp.PyArray_DIM(sums, 0), cnp.PyArray_DIM(sums, 1), compute.num)


# ---- straight down, channels last ----------------------------------------------------------------
#
# Batch norm of rows of channels, as channel_forward.py and channel_backward.py have it in NumPy;
# units out of range are theirs.

cdef struct row_terms:
    #: C numbers each, in double: mean and rstd, and what a row takes, in the order of the kernel's
    #: terms.
    double *mean
    double *rstd
    double *terms[4]


cdef void fill_plain_rows(fn_channels_last_args *args, ndarray x) noexcept:
    """All rows as one sample."""
    fill_rows(args, x, cnp.PyArray_SIZE(x) // cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1))
    args.x_type = args.y_type = args.dy_type = dtype_of(cnp.PyArray_TYPE(x))


cdef ndarray new_terms(Py_ssize_t channels, row_terms *t):
    cdef npy_intp n = 6 * channels
    cdef int k
    array = cnp.PyArray_EMPTY(1, &n, cnp.NPY_FLOAT64, 0)
    t.mean = <double *>cnp.PyArray_DATA(array)
    t.rstd = t.mean + channels
    for k in range(4):
        t.terms[k] = t.mean + (2 + k) * channels
    return array


cdef void round_terms(fn_channels_last_args *args, row_terms *t, int count) noexcept:
    """The terms as what is computed in, in their own place."""
    cdef Py_ssize_t i, k
    cdef float *narrow
    for k in range(count):
        args.terms[k] = t.terms[k]
        if args.x_type == FN_F32:
            narrow = <float *>t.terms[k]
            for i in range(args.cols):
                narrow[i] = <float>t.terms[k][i]


cdef int run_rows(fn_channels_last_args *args, int what) except -1:
    """0: moments, 1: dots, 2: y or dx."""
    cdef int status
    cdef fn_dtype dtype = args.x_type
    if moves_much(args.rows * args.cols, dtype, 2):
        with nogil:
            status = call_rows(args, dtype, what)
    else:
        status = call_rows(args, dtype, what)
    return raise_no_room(status)


cdef inline int call_rows(fn_channels_last_args *args, fn_dtype dtype, int what) noexcept nogil:
    if what == 0:
        return fn_channels_last_moments(args, dtype, 0)
    return fn_channels_last_dots(args, dtype, 0) if what == 1 else fn_channels_last(args, dtype, 0)


cdef bint find_row_moments(fn_channels_last_args *args, row_terms *t, double *variance,
                           double eps) except -1:
    """Statistics of the whole array; False where a channel is out of range. Of the terms, the pivot
    and, in the place of the shift, what the mean is beyond it."""
    cdef ndarray merged
    cdef const double *found
    cdef double exact, padded
    cdef Py_ssize_t i, n = args.cols
    cdef bint fits = True
    sums = block_sums(args)
    run_rows(args, 0)
    merged = merged_moments(sums, 1, args.rows)
    found = <const double *>cnp.PyArray_DATA(merged)
    for i in range(n):
        exact = found[i] + found[n + i]
        t.terms[0][i] = exact if args.x_type == FN_F64 else <double><float>exact
        t.terms[2][i] = (found[i] - t.terms[0][i]) + found[n + i]
        variance[i] = found[2 * n + i] / <double>args.rows
        padded = variance[i] + eps
        t.mean[i] = t.terms[0][i] + t.terms[2][i]
        t.rstd[i] = 1.0 / sqrt(padded)
        fits &= found[2 * n + i] <= (DBL_MAX if args.x_type == FN_F64 else 2.0**252)
        fits &= padded >= (LEAST_F64 if args.x_type == FN_F64 else LEAST_F32)
    return fits


cdef bint apply_rows(fn_channels_last_args *args, row_terms *t, weight, bias) except -1:
    """y from what find_row_moments leaves; False where a factor is out of range."""
    cdef Py_ssize_t i
    cdef bint double_ = args.x_type == FN_F64
    cdef double most = DBL_MAX if double_ else FLT_MAX
    for i in range(args.cols):
        t.terms[1][i] = t.rstd[i] * number_of(weight, double_, i, 1)
        t.terms[2][i] = number_of(bias, double_, i, 0) - t.terms[2][i] * t.terms[1][i]
        if not fabs(t.terms[1][i]) <= most:
            return False
        if is_lost(t.terms[1][i], number_of(weight, double_, i, 1), double_):
            return False
    round_terms(args, t, 3)
    run_rows(args, 2)
    return True


def straight_rows(x, weight, bias, eps, out, running_mean, running_var, bint training):
    """Batch norm, channels last: (y, mean, variance) in training, else y; None where not all is
    plain, or a channel is out of range."""
    cdef fn_channels_last_args args
    cdef row_terms t
    cdef int typenum, warm = 0
    cdef Py_ssize_t i
    cdef ndarray y, known, variance
    cdef npy_intp n
    if not is_rows(x) or not PyFloat_CheckExact(eps) or not eps >= 0:
        return None
    typenum = cnp.PyArray_TYPE(<ndarray>x)
    fill_plain_rows(&args, <ndarray>x)
    n = args.cols
    if (
        not is_channel_vector(weight, typenum, n) or not is_channel_vector(bias, typenum, n)
        or not (out is None or is_result(out, <ndarray>x, typenum, weight, bias))
    ):
        return None
    kept = new_terms(n, &t)
    variance = None
    if training:
        variance = cnp.PyArray_EMPTY(1, &n, cnp.NPY_FLOAT64, 0)
        if not find_row_moments(&args, &t, <double *>cnp.PyArray_DATA(variance), eps):
            return None
    else:
        known = running_doubles(running_mean, running_var, eps, n)
        if known is None or (out is not None and not (
                apart(<ndarray>out, running_mean) and apart(<ndarray>out, running_var))):
            return None
        if not are_near(known, weight, typenum):
            return None
        for i in range(n):
            t.mean[i] = (<const double *>cnp.PyArray_DATA(known))[i]
            t.rstd[i] = (<const double *>cnp.PyArray_DATA(known))[n + i]
            t.terms[0][i] = t.mean[i] if args.x_type == FN_F64 else <double><float>t.mean[i]
            t.terms[2][i] = t.mean[i] - t.terms[0][i]
    y = out
    if out is None:
        y = new_array(cnp.PyArray_NDIM(<ndarray>x), cnp.PyArray_DIMS(<ndarray>x), typenum, &warm)
    args.y = cnp.PyArray_DATA(y)
    if not apply_rows(&args, &t, weight, bias):
        return None
    if not training:
        return y
    return y, kept[:n].copy(), variance


def straight_rows_backward(dy, x, mean, rstd, weight, bias, output_mask, running_var=None,
                           double eps=0):
    """The same backward: (dx, dweight, dbias). running_var: `mean` and it normalised."""
    cdef fn_channels_last_args args
    cdef row_terms t
    cdef int typenum, warm = 0
    cdef Py_ssize_t i
    cdef npy_intp n
    cdef bint given = running_var is not None, double_, want_dx
    cdef const double *dots
    cdef ndarray known, totals, dx = None
    cdef npy_intp[2] dims
    cdef double most, w, c, dw, db, per, largest, bound, least, tiny, share
    if not is_rows(x) or not PyTuple_CheckExact(output_mask) or not eps >= 0:
        return None
    if PyTuple_GET_SIZE(output_mask) != 3:
        return None
    typenum = cnp.PyArray_TYPE(<ndarray>x)
    fill_plain_rows(&args, <ndarray>x)
    n = args.cols
    if (
        not is_plain(dy, typenum, C_ALIGNED) or not same_shape(<ndarray>dy, x)
        or not is_channel_vector(weight, typenum, n) or not is_channel_vector(bias, typenum, n)
    ):
        return None
    for flag in output_mask:
        if not is_bool(flag):
            return None
    known = running_doubles(mean, running_var, eps, n) if given else doubles_of(mean, rstd, 1, 0, n)
    if known is None:
        return None
    kept = new_terms(n, &t)
    double_ = args.x_type == FN_F64
    most = DBL_MAX if double_ else FLT_MAX
    bound = 2.0**301 if double_ else 2.0**41
    least = 2.0**-900 if double_ else 2.0**-90
    tiny = DBL_MIN if double_ else FLT_MIN
    for i in range(n):
        t.mean[i] = (<const double *>cnp.PyArray_DATA(known))[i]
        t.rstd[i] = (<const double *>cnp.PyArray_DATA(known))[n + i]
        t.terms[0][i] = t.mean[i] if double_ else <double><float>t.mean[i]
        t.terms[1][i] = t.mean[i] - t.terms[0][i]
    round_terms(&args, &t, 1)
    args.dy = cnp.PyArray_DATA(<ndarray>dy)
    sums = block_sums(&args)
    run_rows(&args, 1)
    totals = added_blocks(sums, 1)
    dots = <const double *>cnp.PyArray_DATA(totals)
    dims[0], dims[1] = 2, n
    result = cnp.PyArray_EMPTY(2, dims, cnp.NPY_FLOAT64, 0)
    per = <double>args.rows
    for i in range(n):
        w, db = number_of(weight, double_, i, 1), dots[n + i]
        c = t.terms[1][i] if given else dots[i] / per
        dw = (dots[2 * n + i] - c * db) * t.rstd[i]
        t.terms[1][i] = t.rstd[i] * w
        t.terms[2][i] = t.terms[3][i] = 0
        if not given:
            t.terms[3][i] = -t.rstd[i] * t.rstd[i] * (w * dw / per)
            t.terms[2][i] = -t.rstd[i] * (w * db / per) - c * t.terms[3][i]
        largest = fmax(fabs(db), fabs(dots[2 * n + i] * t.rstd[i]))
        share = fmin(t.rstd[i], t.rstd[i] * t.rstd[i]) * (largest / per)
        if (share < tiny * sqrt(per) and (t.terms[2][i] != 0 or t.terms[3][i] != 0)
                or is_lost(t.terms[1][i], w, double_)):
            return None
        if not (
            (largest == 0 or (fmax(least, 4 * tiny * t.rstd[i] * per) <= largest
                              and largest <= most))
            and db == db
            and 1 / bound <= t.rstd[i] and t.rstd[i] <= bound and fabs(t.terms[1][i]) <= most
            and fabs(t.terms[2][i]) <= most and fabs(t.terms[3][i]) <= most
            and dots[2 * n + i] == dots[2 * n + i]
        ):
            return None
        (<double *>cnp.PyArray_DATA(<ndarray>result))[i] = dw
        (<double *>cnp.PyArray_DATA(<ndarray>result))[n + i] = db
    want_dx = output_mask[0]
    if want_dx:
        dx = new_array(cnp.PyArray_NDIM(<ndarray>x), cnp.PyArray_DIMS(<ndarray>x), typenum, &warm)
        args.y = cnp.PyArray_DATA(dx)
        for i in range(n):  # the pivot again: it was rounded in its place
            t.terms[0][i] = t.mean[i]
        round_terms(&args, &t, 4)
        run_rows(&args, 2)
    if typenum == cnp.NPY_FLOAT32:
        result = result.astype(np.float32)
    return dx, result[0] if output_mask[1] else None, result[1] if output_mask[2] else None


cdef tuple as_tuple(fn_channels *l):
    return l.units, l.stride, l.rows, l.row_stride, l.planes, l.plane, l.kinds


def update_running(running, ndarray batch, double kept, double taken):
    """running = kept*running + taken*batch, in place; batch: float64, of running's length."""
    cdef Py_ssize_t i, n = cnp.PyArray_SIZE(batch)
    cdef const double *b = <const double *>cnp.PyArray_DATA(batch)
    cdef float *f
    cdef double *d
    if is_plain(running, cnp.NPY_FLOAT32, C_ALIGNED_WRITEABLE):
        f = <float *>cnp.PyArray_DATA(<ndarray>running)
        for i in range(n):
            f[i] = <float>(kept * f[i] + taken * b[i])
    elif is_plain(running, cnp.NPY_FLOAT64, C_ALIGNED_WRITEABLE):
        d = <double *>cnp.PyArray_DATA(<ndarray>running)
        for i in range(n):
            d[i] = kept * d[i] + taken * b[i]
    else:
        with np.errstate(all="ignore"):
            running[...] = kept * running.astype(np.float64) + taken * batch
