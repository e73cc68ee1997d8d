# The public functions that have a straight path: gradients.

def layer_norm_backward(dy, x, normalized_shape, mean, rstd, weight=None, bias=None, *, axis=None,
                        output_mask=(True, True, True), from_output=False, lengths=None,
                        mask=None):
    """layer_norm_backward(dy, x, normalized_shape, mean, rstd, weight=None, bias=None, *, \
axis=None, output_mask=(True, True, True), from_output=False, lengths=None, mask=None)

    Gradients of :func:`layer_norm`: dx, dweight and dbias.

    With ``xh = (x - mean) * rstd`` and ``g = dy * weight``::

        dx = rstd * (g - mean(g) - xh * mean(g * xh))
        dweight = sum over rows of dy * xh
        dbias = sum over rows of dy

    Parameters
    ----------
    dy, x : array_like
        Gradient of the output, and the input, of one shape, of any type and layout.
    normalized_shape, axis, lengths, mask
        The forward call's (`normalized_shape` None: the last axis, or what `axis` names).
    mean, rstd : array_like
        What ``layer_norm(x, ..., return_stats=True)`` returned for this x, with or without torch's
        trailing axes of length 1. `mean` is a pivot only: what rounding it lost is formed again.
    weight : array_like, optional
        The forward call's; None counts as ones.
    bias : array_like, optional
        Checked for its shape, otherwise unused (as torch's `native_layer_norm_backward`).
    output_mask : three bools
        Which of dx, dweight, dbias to compute; the others come back as None.
    from_output : bool
        `x` is what the forward call returned (without an activation), so that its input need not
        be kept: ``xh = (x - bias) / weight``, so one 0 in the weight makes all of dx NaN. `mean` is
        not read, and may be None.

    Returns
    -------
    dx : ndarray or None
        Of x's shape and type.
    dweight, dbias : ndarray or None
        Of the weight's shape, or the normalized one, in float32 (float64 for float64 input); zeros
        where there are no rows. Rows are summed in an order that depends on their number alone, so
        the result is the same for every number of threads.

    Raises
    ------
    TypeError, ValueError
        As :func:`layer_norm`.
    MemoryError
        Where there is no room for the partial sums: log2(rows / 16) times 16 bytes a column and
        thread, about. Nothing has been computed then.

    References
    ----------
    Ba, Kiros, Hinton: Layer Normalization, arXiv 1607.06450 (2016).

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> x, dy = np.float32([[[1, 3, 5], [2, 2, 8]], [[1, 0, 0], [0, 1, 0]]])
    >>> y, mean, rstd = fastnorm.layer_norm(x, return_stats=True)
    >>> dx, dweight, dbias = fastnorm.layer_norm_backward(dy, x, 3, mean, rstd)
    >>> dbias
    array([1., 1., 0.], dtype=float32)
    """
    if from_output is False and lengths is None and mask is None:
        result = plain_backward(dy, x, normalized_shape, axis, mean, rstd, weight, bias, 0,
                                wanted(output_mask, 3), False)
        if result is not None:
            return result
    return handlers["layer_norm_backward"](dy, x, normalized_shape, mean, rstd, weight, bias, axis,
                                           output_mask, from_output, lengths, mask)


def rms_norm_backward(dy, x, normalized_shape, rstd, weight=None, *, axis=None, offset=0.0,
                      output_mask=(True, True), from_output=False, lengths=None, mask=None):
    """rms_norm_backward(dy, x, normalized_shape, rstd, weight=None, *, axis=None, offset=0.0, \
output_mask=(True, True), from_output=False, lengths=None, mask=None)

    Gradients of :func:`rms_norm`: dx and dweight.

    With ``xh = x * rstd`` and ``g = dy * (weight + offset)``::

        dx = rstd * (g - xh * mean(g * xh))
        dweight = sum over rows of dy * xh

    Parameters
    ----------
    dy, x, normalized_shape, weight, axis, from_output, lengths, mask
        As for :func:`layer_norm_backward`.
    rstd : array_like
        What ``rms_norm(x, ..., return_stats=True)`` returned.
    offset : float
        The forward call's.
    output_mask : two bools
        Which of dx and dweight to compute; the other comes back as None.

    Returns
    -------
    dx, dweight
        As :func:`layer_norm_backward`.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As :func:`layer_norm_backward`.

    References
    ----------
    Zhang, Sennrich: Root Mean Square Layer Normalization, arXiv 1910.07467 (2019).

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> x, dy = np.float32([[1, 7]]), np.float32([[5, 0]])
    >>> y, rstd = fastnorm.rms_norm(x, return_stats=True)
    >>> fastnorm.rms_norm_backward(dy, x, 2, rstd)
    (array([[ 0.98, -0.14]], dtype=float32), array([1., 0.], dtype=float32))
    """
    cdef double added = plain_offset(offset)
    if from_output is False and lengths is None and mask is None and added - added == 0:
        result = plain_backward(dy, x, normalized_shape, axis, None, rstd, weight, None, added,
                                wanted(output_mask, 2), True)
        if result is not None:
            return result[:2]
    return handlers["rms_norm_backward"](dy, x, normalized_shape, rstd, weight, axis, offset,
                                         output_mask, from_output, lengths, mask)
