# The modules' fastest call: parameters checked once.

cdef inline bint is_own_parameter(object w, int typenum, Py_ssize_t cols) noexcept:
    """Whether a module's parameter, which was laid out for it, is still as it was."""
    return w is None or (
        cnp.PyArray_TYPE(<ndarray>w) == typenum and cnp.PyArray_SIZE(<ndarray>w) == cols
    )


@cython.auto_pickle(False)
cdef class BoundNorm:
    """What the modules are made of: parameters, and the fastest call.

    Nothing of a call stays on the object, so any number of threads may call one."""

    cdef readonly tuple normalized_shape
    cdef readonly object dtype
    cdef object _eps, _weight, _bias
    cdef options opt
    # What every call would otherwise find out again. No array is of type -1.
    cdef double eps_value
    cdef int typenum
    cdef Py_ssize_t cols

    def __init__(self, tuple normalized_shape, eps, dtype, *, bint rms=False, double offset=0.0,
                 bint round_before_weight=False):
        memset(&self.opt, 0, sizeof(self.opt))
        self.normalized_shape = normalized_shape
        self.dtype = dtype
        self.opt.rms = rms
        self.opt.offset = offset
        self.opt.round_before_weight = round_before_weight
        self.typenum = dtype.num if compute_type(dtype.num) == dtype.num else -1
        self.cols = normalized_shape[0] if len(normalized_shape) == 1 else -1
        self._set("eps", eps)
        self._set("weight", None)
        self._set("bias", None)

    def _set(self, str name, value):
        """Store a checked eps, weight or bias."""
        if name == "eps":
            self._eps = value
            self.eps_value = eps_of(value, self.typenum)
        elif name == "weight":
            self._weight = value
        else:
            self._bias = value

    def _get(self, str name):
        # One at a time: a dict of all five takes longer than a small call.
        if name == "weight":
            return self._weight
        if name == "bias":
            return self._bias
        if name == "eps":
            return self._eps
        return {
            "offset": self.opt.offset,
            "round_before_weight": self.opt.round_before_weight,
        }[name]

    def __call__(self, x, out=None):
        """Normalize x over its trailing `normalized_shape`; see the function of this name."""
        cdef fn_layer_norm_args args
        cdef ndarray y
        # References of our own: another thread may assign to the parameters meanwhile.
        cdef object weight = self._weight, bias = self._bias
        if (
            is_plain(x, self.typenum, C_ALIGNED)
            and cnp.PyArray_NDIM(<ndarray>x) > 0
            and cnp.PyArray_DIM(<ndarray>x, cnp.PyArray_NDIM(<ndarray>x) - 1) == self.cols
            and is_own_parameter(weight, self.typenum, self.cols)
            and is_own_parameter(bias, self.typenum, self.cols)
            and cnp.PyArray_SIZE(<ndarray>x) > 0
            and (self.opt.offset == 0 or weight is None)
        ):
            if out is None:
                y = new_array(cnp.PyArray_NDIM(<ndarray>x), cnp.PyArray_DIMS(<ndarray>x),
                              self.typenum, &args.y_is_warm)
            elif is_result(out, <ndarray>x, self.typenum, weight, bias):
                y = <ndarray>out
                args.y_is_warm = 1
            else:
                return self._checked_call(x, out)
            args.x = rows_at(x, plain_rows(<ndarray>x, 1, &args.shape))
            args.y = rows_at(y, args.x.stride)
            args.weight = parameter_data(weight)
            args.bias = parameter_data(bias)
            args.mean = args.rstd = NULL
            args.rms = self.opt.rms
            args.steps = NULL
            args.eps = self.eps_value
            call_layer_norm(&args, dtype_of(self.typenum))
            return y
        y = direct_norm(&self.opt, x, self.normalized_shape, weight, bias, self._eps, out, None,
                        None, None)
        return self._checked_call(x, out) if y is None else y

    cdef object _checked_call(self, x, out):
        cdef object weight = self._weight, bias = self._bias
        if not cnp.PyArray_Check(x):
            weight, bias = self._beside("weight", x), self._beside("bias", x)
        if self.opt.rms:
            return rms_norm(x, self.normalized_shape, weight, self._eps, out=out,
                            offset=self.opt.offset,
                            round_before_weight=bool(self.opt.round_before_weight))
        return layer_norm(x, self.normalized_shape, weight, bias, self._eps, out=out)
