# The public functions that have a straight path: forward.

def layer_norm(x, normalized_shape=None, weight=None, bias=None, eps=1e-5, *, axis=None, out=None,
               dtype=None, return_stats=False, activation=None, lengths=None, mask=None):
    """layer_norm(x, normalized_shape=None, weight=None, bias=None, eps=1e-5, *, axis=None, \
out=None, dtype=None, return_stats=False, activation=None, lengths=None, mask=None)

    Layer normalization: ``y = (x - mean) / sqrt(var + eps) * weight + bias``.

    Mean and (population) variance are taken over the normalized axes, of each sample by itself and
    in training and inference alike: layer norm has no running statistics.

    Parameters
    ----------
    x : array_like
        float16, bfloat16, float32 or float64 of any shape and layout; integers and booleans become
        float64. The half types are worked on in float32 and rounded once, at the end. Tensors of
        torch, and what offers DLPack or Arrow's interface, are read in place; torch tensors in
        give torch tensors out.
    normalized_shape : int or sequence of int, optional
        Trailing shape to normalize over, as in ``torch.nn.functional.layer_norm``. Default: the
        last axis.
    weight, bias : array_like, optional
        Gain and offset of shape `normalized_shape` (with `axis`: the lengths of the axes in
        ascending order), of any real type. Either may be left out. With more dimensions before
        these, which broadcast against x's leading ones, rows have parameters of their own: (H, D)
        for x of shape (..., H, D) is a pair for each head.
    eps : float
        Added to the variance; not negative.
    axis : int or tuple of int, optional
        Axes to normalize over, in place of `normalized_shape`, as in Keras: any, in any number.
        (None is not all axes, as in NumPy, but those of `normalized_shape`.) Where they are not
        last the array is read in place (``axis=1`` of an (N, C, H, W) array is ConvNeXt's
        LayerNorm2d).
    out : ndarray, optional
        Array for the result, of x's shape and the result's type. It may be x itself, but not
        overlap an input in another way.
    dtype : dtype, optional
        Type of the result; default: x's. ``numpy.int8`` asks for dynamic quantisation, symmetric
        and with a scale a row: ``scale = max(max|y| / 127, tiny)``, ``q = rint(y / scale)``.
        ``"bfloat16"`` gives ml_dtypes' type, or uint16 where ml_dtypes is not installed; where x is
        uint16, it says that x and all that goes with it in uint16 (parameters, outputs) hold the
        bits of bfloat16, and the result is uint16.
    return_stats : bool
        Also return mean and ``rstd = 1 / sqrt(var + eps)``.
    activation : str, optional
        Applied to the result before it is rounded: "relu", "silu", "gelu" (by erf) or "gelu_tanh".
    lengths : array_like of int, optional
        Of the leading shape, or what broadcasts to it: how many elements of each row count, from
        its first on. The others have no influence and their results are 0.
    mask : array_like of bool, optional
        What broadcasts to x's shape: the elements that count. The others' results are 0. Arrow's
        booleans, which are packed into bits, are copied.

    Returns
    -------
    y : ndarray
        Of x's shape and type, or `dtype` (`out` where given).
    scale : ndarray
        After y where `dtype` is int8: float32 of the leading shape.
    mean, rstd : ndarray
        With `return_stats`, of the leading shape, float32 (float64 for float64 input). They are
        what ``layer_norm_backward`` takes.

    Raises
    ------
    TypeError
        For a type that is not supported (complex, object, masked arrays, tensors that require a
        gradient), or `normalized_shape` and `axis`, or `lengths` and `mask`, together.
    ValueError
        For shapes that do not fit, an axis out of range or repeated (``numpy.exceptions.AxisError``
        where it is out of range), an eps that is negative or NaN, and an `out` that is read-only
        or overlaps an input. Nothing is written then.

    Notes
    -----
    A row's result depends on that row, the parameters and eps alone: not on the batch, the number
    of threads, alignment, strides, `out` or the CPU's instruction set. A row that holds a NaN or
    an infinity becomes NaN; a constant row gives exactly `bias`, for eps = 0 too. Rows of length 0
    have mean 0 and rstd NaN.

    Arrays that start at a multiple of 64 bytes (``fastnorm.empty``) are 15 to 50 percent faster
    in the L1 cache than others.

    References
    ----------
    Ba, Kiros, Hinton: Layer Normalization, arXiv 1607.06450 (2016).

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> fastnorm.layer_norm(np.float32([[1, 2, 3], [4, 4, 4]]), eps=0.0)
    array([[-1.2247449,  0.       ,  1.2247449],
           [ 0.       ,  0.       ,  0.       ]], dtype=float32)
    """
    cdef options opt
    if is_bool(return_stats):
        result = None
        if asks_no_more(axis, normalized_shape, dtype, activation, lengths, mask):
            result = direct_layer_norm(x, normalized_shape, weight, bias, eps, out,
                                       return_stats is True)
        if result is None and PyFloat_CheckExact(eps):
            memset(&opt, 0, sizeof(opt))
            opt.return_stats = return_stats is True
            result = plain_norm(&opt, x, normalized_shape, axis, weight, bias, eps, out, dtype,
                                activation, lengths, mask)
        if result is not None:
            return result
    return handlers["layer_norm"](x, normalized_shape, weight, bias, eps, axis, out, dtype,
                                  return_stats, activation, lengths, mask)


def rms_norm(x, normalized_shape=None, weight=None, eps=None, *, axis=None, out=None, dtype=None,
             offset=0.0, round_before_weight=False, return_stats=False, activation=None,
             lengths=None, mask=None):
    """rms_norm(x, normalized_shape=None, weight=None, eps=None, *, axis=None, out=None, \
dtype=None, offset=0.0, round_before_weight=False, return_stats=False, activation=None, \
lengths=None, mask=None)

    Root mean square normalization: ``y = x / sqrt(mean(x^2) + eps) * (weight + offset)``.

    Parameters
    ----------
    x, normalized_shape, axis, out, dtype, activation, lengths, mask
        As for :func:`layer_norm`.
    weight : array_like, optional
        Gain, as for :func:`layer_norm`; None counts as ones, whatever the offset.
    eps : float, optional
        Added to the mean square; not negative. None: the machine epsilon of the type that is
        computed in (float32's for the half types), as in torch.
    offset : float
        Added to the weight, in the type that is computed in: 1 for Gemma's ``1 + weight``.
    round_before_weight : bool
        For half types: round ``x * rstd`` to the result's type before it is multiplied by the
        weight, as Llama and ONNX do, instead of once at the end, as torch and Gemma do.
    return_stats : bool
        Also return ``rstd = 1 / sqrt(mean(x^2) + eps)``, which ``rms_norm_backward`` takes.

    Returns
    -------
    y, scale, rstd : ndarray
        As :func:`layer_norm`, which has a mean besides.

    Raises
    ------
    TypeError, ValueError
        As :func:`layer_norm`.

    References
    ----------
    Zhang, Sennrich: Root Mean Square Layer Normalization, arXiv 1910.07467 (2019).

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> fastnorm.rms_norm(np.float32([[1, 7], [0, 0]]))
    array([[0.2, 1.4],
           [0. , 0. ]], dtype=float32)
    """
    cdef options opt
    if is_bool(return_stats) and is_bool(round_before_weight):
        memset(&opt, 0, sizeof(opt))
        opt.rms = True
        opt.return_stats = return_stats is True
        opt.round_before_weight = round_before_weight is True
        opt.offset = plain_offset(offset)
        if opt.offset - opt.offset == 0:
            result = plain_norm(&opt, x, normalized_shape, axis, weight, None, eps, out, dtype,
                                activation, lengths, mask)
            if result is not None:
                return result
    return handlers["rms_norm"](x, normalized_shape, weight, eps, axis, out, dtype, offset,
                                round_before_weight, return_stats, activation, lengths, mask)


# ---- a residual added before the norm ------------------------------------------------------------

def add_layer_norm(x, residual, normalized_shape=None, weight=None, bias=None, eps=1e-5, *,
                   axis=None, out=None, sum_out=None, dtype=None, linear_bias=None, round_sum=True,
                   return_stats=False, activation=None):
    """add_layer_norm(x, residual, normalized_shape=None, weight=None, bias=None, eps=1e-5, *, \
axis=None, out=None, sum_out=None, dtype=None, linear_bias=None, round_sum=True, \
return_stats=False, activation=None)

    Layer normalization of a sum, which is returned too: ``s = (x + linear_bias) + residual``,
    ``y = layer_norm(s)``.

    Parameters
    ----------
    x, residual : array_like
        Of one shape, of any types.
    normalized_shape, weight, bias, eps, axis, dtype, return_stats, activation
        As for :func:`layer_norm`; `dtype` is y's, int8 included.
    out, sum_out : ndarray, optional
        Arrays for y and for the sum, of x's shape. `out` may be x, and `sum_out` x or residual
        itself; they may not overlap each other or an input in another way.
    linear_bias : array_like, optional
        Of the normalized shape: the bias of the linear layer that x comes from.
    round_sum : bool
        Where the sum is of a half type, whether the statistics see it as it is returned (Hugging
        Face, Liger: y is then what ``layer_norm(sum)`` gives, to the bit) or before it was rounded
        (ONNX Runtime, flash-attn).

    Returns
    -------
    y, scale, mean, rstd : ndarray
        As :func:`layer_norm`, with the sum after y and its scale.
    sum : ndarray
        Of x's shape and the wider of x's and residual's types. Each addition is rounded in
        float32 (float64 where either is float64), and the sum once more.

    Raises
    ------
    TypeError, ValueError
        As :func:`layer_norm`.

    References
    ----------
    ONNX Runtime's SkipLayerNormalization (whose eps is 1e-12).

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> x, residual = np.float32([[1, 3]]), np.float32([[0, 5]])
    >>> fastnorm.add_layer_norm(x, residual, eps=0.0)
    (array([[-1.,  1.]], dtype=float32), array([[1., 8.]], dtype=float32))
    """
    cdef options opt
    if (is_last(axis, normalized_shape) and dtype is None and activation is None
            and is_bool(return_stats) and is_bool(round_sum) and PyFloat_CheckExact(eps)):
        memset(&opt, 0, sizeof(opt))
        opt.adds = True
        opt.return_stats = return_stats is True
        opt.round_sum = round_sum is True
        result = direct_norm(&opt, x, normalized_shape, weight, bias, eps, out, residual,
                             linear_bias, sum_out)
        if result is not None:
            return result
    return handlers["add_layer_norm"](x, residual, normalized_shape, weight, bias, eps, axis, out,
                                      sum_out, dtype, linear_bias, round_sum, return_stats,
                                      activation)


def add_rms_norm(x, residual, normalized_shape=None, weight=None, eps=None, *, axis=None, out=None,
                 sum_out=None, dtype=None, linear_bias=None, offset=0.0, round_before_weight=False,
                 round_sum=True, return_stats=False, activation=None):
    """add_rms_norm(x, residual, normalized_shape=None, weight=None, eps=None, *, axis=None, \
out=None, sum_out=None, dtype=None, linear_bias=None, offset=0.0, round_before_weight=False, \
round_sum=True, return_stats=False, activation=None)

    Root mean square normalization of a sum, which is returned too.

    Parameters
    ----------
    x, residual, out, sum_out, dtype, linear_bias, round_sum
        As for :func:`add_layer_norm`.
    normalized_shape, weight, eps, axis, offset, round_before_weight, return_stats, activation
        As for :func:`rms_norm`.

    Returns
    -------
    y, scale, sum, rstd : ndarray
        As :func:`add_layer_norm`, which has a mean besides.

    Raises
    ------
    TypeError, ValueError
        As :func:`layer_norm`.

    References
    ----------
    ONNX Runtime's SkipSimplifiedLayerNormalization.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> fastnorm.add_rms_norm(np.float32([[1, 3]]), np.float32([[0, 4]]))
    (array([[0.2, 1.4]], dtype=float32), array([[1., 7.]], dtype=float32))
    """
    cdef options opt
    if (is_last(axis, normalized_shape) and dtype is None and activation is None
            and is_bool(return_stats) and is_bool(round_sum) and is_bool(round_before_weight)):
        memset(&opt, 0, sizeof(opt))
        opt.rms = opt.adds = True
        opt.return_stats = return_stats is True
        opt.round_sum = round_sum is True
        opt.round_before_weight = round_before_weight is True
        opt.offset = plain_offset(offset)
        if opt.offset - opt.offset == 0:
            result = direct_norm(&opt, x, normalized_shape, weight, None, eps, out, residual,
                                 linear_bias, sum_out)
            if result is not None:
                return result
    return handlers["add_rms_norm"](x, residual, normalized_shape, weight, eps, axis, out, sum_out,
                                    dtype, linear_bias, offset, round_before_weight, round_sum,
                                    return_stats, activation)


def moments(x, axis=None):
    """moments(x, axis=None)

    Mean and population variance (ddof 0), by layer_norm's own arithmetic.

    Parameters
    ----------
    x : array_like
        Of any real type and layout; integers and booleans become float64.
    axis : int or tuple of int, optional
        Axes to reduce. None: the last (not all, as in NumPy).

    Returns
    -------
    mean, variance : ndarray
        Of x's shape without those axes, float32 (float64 for float64 input). Over no elements:
        mean 0, variance NaN.

    Raises
    ------
    TypeError, ValueError
        As :func:`layer_norm`.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> fastnorm.moments(np.float32([[1, 3], [2, 8]]))
    (array([2., 5.], dtype=float32), array([1., 9.], dtype=float32))
    """
    result = framed_moments(x, axis)
    return handlers["moments"](x, axis) if result is None else result
