# Group, instance and batch norm: the structs of channels.c, filled from arrays that channels.py has
# checked; and the calls that are plain enough to go straight down.


cdef inline bint moves_much(Py_ssize_t elements, fn_dtype dtype, int arrays) noexcept:
    return arrays * elements * (8 if dtype == FN_F64 else 4) >= GIL_BYTES


cdef int raise_no_room(int status) except -1:
    if status != FN_OK:
        raise MemoryError("no memory for a thread's row of elements; nothing was written")
    return 0


cdef fn_channels layout_of(object layout):
    """units, stride, rows, row_stride, planes, plane, kinds, step."""
    cdef fn_channels l
    l.units, l.stride, l.rows, l.row_stride, l.planes, l.plane, l.kinds, l.step = layout
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


def channels_last_moments(ndarray x, Py_ssize_t rows, compute):
    """Of each channel of each sample of so many rows of x, (samples * rows, C) and contiguous: the
    same three, float64 (3, samples, C)."""
    cdef fn_channels_last_moments_args args
    cdef npy_intp[3] dims
    cdef int status
    cdef fn_dtype dtype = dtype_of(compute.num)
    args.rows, args.cols = rows, cnp.PyArray_DIM(x, 1)
    args.samples = cnp.PyArray_DIM(x, 0) // rows
    dims[0], dims[1], dims[2] = 3, args.samples, args.cols
    array = cnp.PyArray_EMPTY(3, dims, cnp.NPY_FLOAT64, 0)
    args.x = cnp.PyArray_DATA(x)
    args.x_type = storage_of(x)
    args.sums = <double *>cnp.PyArray_DATA(array)
    with nogil:
        status = fn_channels_last_moments(&args, dtype, 0)
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


cdef inline Py_ssize_t channels_of(ndarray x, bint last) noexcept:
    return cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1 if last else 1)


cdef inline void plain_layout(ndarray x, Py_ssize_t groups, bint batch, bint given, bint last,
                              fn_channels *l) noexcept:
    """Of a contiguous array. `batch`: statistics over the samples too; `given`: they are of each
    channel, and planes may go one by one; `last`: its last axis is the channels', as it might as
    well be where planes have one element."""
    cdef Py_ssize_t samples = cnp.PyArray_DIM(x, 0), channels = channels_of(x, last)
    cdef Py_ssize_t size = cnp.PyArray_SIZE(x) // (samples * channels)
    last = last or size == 1
    if batch and last:
        samples, size = 1, samples * size
    l.units, l.kinds, l.planes, l.plane = samples * groups, groups, channels // groups, size
    # A unit of planes of one element is a row.
    l.rows, l.row_stride, l.step = 1, 0, channels if last and (size > 1 or l.planes == 1) else 1
    l.stride = l.planes * size
    if batch and not given and not last:
        l.units = channels
        l.rows, l.row_stride = samples, channels * size


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
    if array is not None:
        fn_rstds(<double *>cnp.PyArray_DATA(array) + channels, eps, channels)
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


cdef inline bint is_channels(object x) noexcept:
    """Whether x is a plain array of what is computed in, not empty, of two axes or more."""
    cdef int typenum
    if not cnp.PyArray_CheckExact(x) or cnp.PyArray_NDIM(<ndarray>x) < 2:
        return False
    typenum = cnp.PyArray_TYPE(<ndarray>x)
    return (
        (typenum == cnp.NPY_FLOAT32 or typenum == cnp.NPY_FLOAT64)
        and is_plain(x, typenum, C_ALIGNED) and cnp.PyArray_SIZE(<ndarray>x) != 0
    )


cdef inline bint is_channels_call(object x, object eps) noexcept:
    """Whether x is such an array and eps a plain one."""
    return is_channels(x) and PyFloat_CheckExact(eps) and <double>eps >= 0


def straight_batch_inference(x, running_mean, running_var, weight, bias, eps, out, activation,
                             bint last):
    """y where all is plain, else None."""
    cdef Py_ssize_t channels
    cdef ndarray known
    if not is_channels_call(x, eps):
        return None
    channels = channels_of(<ndarray>x, last)
    known = running_doubles(running_mean, running_var, eps, channels)
    if known is None or not are_near(known, weight, cnp.PyArray_TYPE(<ndarray>x)):
        return None
    if out is not None and not (
            is_plain(out, cnp.PyArray_TYPE(<ndarray>x), C_ALIGNED_WRITEABLE)
            and apart(<ndarray>out, running_mean) and apart(<ndarray>out, running_var)):
        return None
    return straight_channels(x, channels, weight, bias, eps, out, activation, known, True, last)[0]


def straight_channel_norm(x, groups, weight, bias, eps, out, activation, bint last, return_stats):
    """Group norm (groups 0: instance norm): y where all is plain, else None; with statistics, mean
    and rstd too, of x's type."""
    cdef Py_ssize_t channels, count
    cdef npy_intp[2] dims
    if (not is_channels_call(x, eps) or not PyLong_CheckExact(groups)
            or not is_bool(return_stats)):
        return None
    channels = channels_of(<ndarray>x, last)
    if groups < 0 or groups > channels:
        return None
    count = groups
    if count == 0:
        count = channels
    if channels % count:
        return None
    y, found = straight_channels(x, count, weight, bias, eps, out, activation, None, False, last)
    if y is None or return_stats is False:
        return y
    dims[0], dims[1] = cnp.PyArray_DIM(<ndarray>x, 0), count
    return with_statistics(y, found, 2, dims, cnp.PyArray_TYPE(<ndarray>x))


def straight_batch_training(x, running_mean, running_var, weight, bias, momentum, eps, out,
                            activation, bint last, rules, return_stats):
    """y where all is plain, else None; with statistics, mean and rstd too, both float64. rules: the
    dialect, by which the running statistics are moved."""
    cdef int typenum
    cdef Py_ssize_t channels
    cdef npy_intp dims
    if (
        not is_channels_call(x, eps) or not PyFloat_CheckExact(momentum)
        or not isfinite(momentum) or rules is None or not is_bool(return_stats)
    ):
        return None
    typenum, channels = cnp.PyArray_TYPE(<ndarray>x), channels_of(<ndarray>x, last)
    if (
        not (out is None or is_plain(out, typenum, C_ALIGNED_WRITEABLE))
        or not is_running(running_mean, channels, out)
        or not is_running(running_var, channels, out)
        or (running_mean is not None and not apart(<ndarray>running_mean, running_var))
    ):
        return None
    y, found = straight_channels(x, channels, weight, bias, eps, out, activation, None, True, last)
    if y is None:
        return None
    if running_mean is not None or running_var is not None:
        move_running(running_mean, running_var, found, momentum, rules,
                     cnp.PyArray_SIZE(<ndarray>x) // channels)
    if return_stats is False:
        return y
    dims = channels
    return with_statistics(y, found, 1, &dims, cnp.NPY_FLOAT64)


cdef inline bint is_plain_running(object a) noexcept:
    """Whether move_plain can update it."""
    return (
        is_plain(a, cnp.NPY_FLOAT32, C_ALIGNED_WRITEABLE)
        or is_plain(a, cnp.NPY_FLOAT64, C_ALIGNED_WRITEABLE)
    )


cdef inline bint is_running(object a, Py_ssize_t channels, object out) noexcept:
    """Absent, or a plain array of the channels to be updated, which is no part of the result."""
    return a is None or (
        is_plain_running(a)
        and cnp.PyArray_NDIM(<ndarray>a) == 1 and cnp.PyArray_DIM(<ndarray>a, 0) == channels
        and (out is None or apart(<ndarray>out, a))
    )


cdef int move_running(object mean, object variance, ndarray found, double share, rules,
                      Py_ssize_t count) except -1:
    """The running statistics towards those found, of `count` elements a channel, whose variance is
    scaled as the dialect has it. As Running.update of channel_calls.py does."""
    cdef double *batch = <double *>cnp.PyArray_DATA(found)
    cdef Py_ssize_t i, n = cnp.PyArray_DIM(found, 1)
    cdef double kept, taken, factor = rules.variance_factor(count)
    kept, taken = rules.shares(share)
    for i in range(n, 2 * n):
        batch[i] *= factor
    if mean is not None:
        move_plain(<ndarray>mean, batch, n, kept, taken)
    if variance is not None:
        move_plain(<ndarray>variance, batch + n, n, kept, taken)
    return 0


cdef tuple with_statistics(object y, ndarray found, int ndim, npy_intp *dims, int typenum):
    """y, and copies of the mean and the rstd of what was found: mean, variance, rstd."""
    cdef const double *at = <const double *>cnp.PyArray_DATA(found)
    cdef Py_ssize_t n = cnp.PyArray_DIM(found, 1)
    return y, numbers_as(at, n, ndim, dims, typenum), numbers_as(at + 2 * n, n, ndim, dims, typenum)


cdef ndarray numbers_as(const double *numbers, Py_ssize_t n, int ndim, npy_intp *dims,
                        int typenum):
    """A new array of so many numbers, of float32 or float64."""
    cdef ndarray array = cnp.PyArray_EMPTY(ndim, dims, typenum, 0)
    cdef float *f = <float *>cnp.PyArray_DATA(array)
    cdef Py_ssize_t i
    if typenum == cnp.NPY_FLOAT64:
        memcpy(f, numbers, n * sizeof(double))
        return array
    for i in range(n):
        f[i] = <float>numbers[i]
    return array


cdef tuple straight_channels(ndarray x, Py_ssize_t groups, object weight, object bias, double eps,
                             object out, object activation, ndarray known, bint batch, bint last):
    """y, None where not all is plain, and the statistics that were found, (4, units). `known`: mean
    and rstd of each channel, where they are given.

    An activation after units that are put right is not this path's, and x must be there still."""
    cdef fn_channel_norm_args args
    cdef int typenum = cnp.PyArray_TYPE(x), warm = 0
    cdef Py_ssize_t channels = channels_of(x, last)
    cdef ndarray y, found
    cdef npy_intp[2] dims
    if (
        not is_channel_vector(weight, typenum, channels)
        or not is_channel_vector(bias, typenum, channels)
        or not (out is None or is_result(out, x, typenum, weight, bias))
        or (activation is not None and (type(activation) is not str or out is not None))
    ):
        return None, None
    kind = activations.get(activation)
    if kind is None:
        return None, None
    memset(&args, 0, sizeof(args))
    plain_layout(x, groups, batch, known is not None, last, &args.layout)
    if out is None:
        y = new_array(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), typenum, &warm)
    else:
        y, warm = out, 1
    args.x, args.y = cnp.PyArray_DATA(x), cnp.PyArray_DATA(y)
    args.x_type = args.y_type = dtype_of(typenum)
    args.weight, args.bias = parameter_data(weight), parameter_data(bias)
    args.eps = eps
    args.y_is_warm = warm
    args.activation = <fn_activation><int>kind
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
        if kind:
            return None, None
        refused = found[3].view(np.uint8)[: dims[1]]
        careful(as_tuple(&args.layout), x, y, weight, bias, found[:3], refused, eps)
    return y, found


def straight_channel_backward(dy, x, groups, mean, rstd, weight, bias, output_mask, bint last,
                              bint batch, running_var=None, double eps=0):
    """(dx, dweight, dbias) where all is plain and nothing is refused, else None. groups: 0 for one
    a channel. running_var: `mean` and it normalised, and not the batch's own statistics."""
    cdef fn_channel_norm_backward_args args
    cdef int typenum, warm = 0, mask = wanted(output_mask, 3)
    cdef bint given = running_var is not None
    cdef Py_ssize_t samples, channels, count, i
    cdef ndarray known, sums, dx = None
    cdef npy_intp[2] dims
    if not is_channels(x) or not PyLong_CheckExact(groups) or mask < 0:
        return None
    typenum = cnp.PyArray_TYPE(<ndarray>x)
    samples, channels = cnp.PyArray_DIM(<ndarray>x, 0), channels_of(<ndarray>x, last)
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
    memset(&args, 0, sizeof(args))
    plain_layout(<ndarray>x, count, batch, given, last, &args.layout)
    dims[0] = args.layout.units * args.layout.planes
    dims[1] = 2
    if mask & 1:
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
    i = (dims[0] - i) // channels
    dweight, dbias = parameter_gradients(args.sums, i, channels, typenum, mask & 2, mask & 4)
    return dx, dweight, dbias


cdef ndarray lots_total(const double *sums, Py_ssize_t lots, Py_ssize_t channels):
    """(2*C,), the pairs of each channel of each lot added in double, in order. Lot by lot: those of
    a channel may lie a power of two apart, where few of them fit in a cache together."""
    cdef npy_intp n = 2 * channels
    cdef ndarray array = cnp.PyArray_ZEROS(1, &n, cnp.NPY_FLOAT64, 0)
    cdef double *total = <double *>cnp.PyArray_DATA(array)
    cdef Py_ssize_t lot, i
    for lot in range(lots):
        for i in range(n):
            total[i] += sums[lot * n + i]
    return array


cdef ndarray each_second(const double *numbers, npy_intp n, int typenum):
    """(n,), of float32 or float64."""
    cdef ndarray result = cnp.PyArray_EMPTY(1, &n, typenum, 0)
    cdef void *into = cnp.PyArray_DATA(result)
    cdef Py_ssize_t i
    if typenum == cnp.NPY_FLOAT64:
        for i in range(n):
            (<double *>into)[i] = numbers[2 * i]
    else:
        for i in range(n):
            (<float *>into)[i] = <float>numbers[2 * i]
    return result


cdef tuple parameter_gradients(const double *sums, Py_ssize_t lots, npy_intp channels, int typenum,
                               bint weight, bint bias):
    """dweight and dbias, (C,) each, or None where they are not wanted, from the pairs of each
    channel of each lot."""
    cdef ndarray total
    cdef const double *at
    if not weight and not bias:
        return None, None
    total = lots_total(sums, lots, channels)
    at = <const double *>cnp.PyArray_DATA(total)
    return (
        each_second(at, channels, typenum) if weight else None,
        each_second(at + 1, channels, typenum) if bias else None,
    )


def total_over_samples(ndarray sums, compute):
    """dweight and dbias, (C,) each, from the pairs of each channel of each lot, (lots, C, 2)."""
    return parameter_gradients(
        <const double *>cnp.PyArray_DATA(sums), cnp.PyArray_DIM(sums, 0), cnp.PyArray_DIM(sums, 1),
        compute.num, True, True)


cdef tuple as_tuple(fn_channels *l):
    return l.units, l.stride, l.rows, l.row_stride, l.planes, l.plane, l.kinds, l.step


cdef void move_plain(ndarray running, const double *batch, Py_ssize_t n, double kept,
                     double taken) noexcept:
    """running = kept*running + taken*batch, n numbers, in place; running is float32 or float64, and
    may have been made smaller by another thread meanwhile."""
    cdef Py_ssize_t i
    cdef float *f = <float *>cnp.PyArray_DATA(running)
    cdef double *d = <double *>cnp.PyArray_DATA(running)
    n = min(n, cnp.PyArray_SIZE(running))
    if cnp.PyArray_TYPE(running) == cnp.NPY_FLOAT32:
        for i in range(n):
            f[i] = <float>(kept * f[i] + taken * batch[i])
    else:
        for i in range(n):
            d[i] = kept * d[i] + taken * batch[i]


def update_running(running, ndarray batch, double kept, double taken):
    """The same for a `running` of any kind; batch: float64, of running's length."""
    if is_plain_running(running):
        move_plain(<ndarray>running, <const double *>cnp.PyArray_DATA(batch),
                   cnp.PyArray_SIZE(batch), kept, taken)
        return
    with np.errstate(all="ignore"):
        running[...] = kept * running.astype(np.float64) + taken * batch
