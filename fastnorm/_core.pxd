# What _core takes from C: the kernels of src_c, and what NumPy's own .pxd lacks.

cdef extern from "fastnorm.h" nogil:
    ctypedef enum fn_dtype:
        FN_F32
        FN_F64
        FN_F16
        FN_BF16
        FN_I8

    ctypedef enum fn_activation:
        FN_NO_ACTIVATION
        FN_RELU
        FN_SILU
        FN_GELU
        FN_GELU_TANH

    enum: FN_OK, FN_NO_MEMORY, FN_UNKNOWN_ISA, FN_UNSUPPORTED_ISA

    ctypedef struct fn_shape:
        Py_ssize_t rows, cols, inner, outer_ndim
        const Py_ssize_t *outer_shape
        Py_ssize_t col_ndim
        const Py_ssize_t *col_shape

    ctypedef struct fn_rows:
        void *data
        Py_ssize_t stride
        const Py_ssize_t *outer_strides
        const Py_ssize_t *col_strides
        fn_dtype dtype

    ctypedef struct fn_output:
        fn_rows weight, bias, y
        float *scales

    ctypedef struct fn_steps:
        fn_rows x, gate, linear_bias, residual, sum
        int round_sum
        const fn_output *outputs
        Py_ssize_t output_count, param_cols
        double offset
        int round_before_weight, from_output
        fn_activation activation
        const Py_ssize_t *lengths
        const Py_ssize_t *starts
        fn_rows mask

    ctypedef struct fn_layer_norm_args:
        fn_shape shape
        fn_rows x, y
        const void *weight
        const void *bias
        void *mean
        void *rstd
        double eps
        int rms, y_is_warm
        const fn_steps *steps

    ctypedef struct fn_layer_norm_backward_args:
        fn_shape shape
        fn_rows dy, x, dx
        const void *weight
        const void *mean
        const void *rstd
        void *dweight
        void *dbias
        int rms, dx_is_warm
        const fn_steps *steps

    ctypedef struct fn_moments_args:
        fn_shape shape
        fn_rows x
        void *mean
        void *variance
        const fn_steps *steps

    ctypedef struct fn_channels:
        Py_ssize_t units, stride, rows, row_stride, planes, plane, kinds, step

    ctypedef struct fn_channel_norm_args:
        fn_channels layout
        const void *x
        void *y
        fn_dtype x_type, y_type
        const void *weight
        const void *bias
        double *mean
        double *variance
        double *rstd
        unsigned char *refused
        double eps
        int given
        fn_activation activation
        int y_is_warm

    ctypedef struct fn_channel_norm_backward_args:
        fn_channels layout
        const void *dy
        const void *x
        void *dx
        fn_dtype dy_type, x_type
        const void *weight
        const double *mean
        const double *rstd
        double *sums
        unsigned char *refused
        int given, dx_is_warm

    ctypedef struct fn_channels_last_moments_args:
        Py_ssize_t samples, rows, cols
        const void *x
        fn_dtype x_type
        double *sums

    ctypedef struct fn_plane_moments_args:
        Py_ssize_t rows, cols
        const void *x
        fn_dtype x_type
        double *sums

    ctypedef struct fn_weight_norm_args:
        Py_ssize_t samples, outer, kinds, inner
        const void *v
        const void *dw
        void *w
        fn_dtype v_type, dw_type, w_type
        const void *g
        fn_dtype g_type
        double eps
        double *norm
        double *along
        unsigned char *refused
        int given, w_is_warm

    ctypedef struct fn_plan:
        int threads, stream
        const char *regime
        Py_ssize_t bytes

    int fn_layer_norm(fn_layer_norm_args *, fn_dtype, int)
    int fn_layer_norm_backward(fn_layer_norm_backward_args *, fn_dtype, int)
    int fn_moments(fn_moments_args *, fn_dtype, int)
    int fn_channel_norm(fn_channel_norm_args *, fn_dtype, int)
    int fn_channel_norm_backward(fn_channel_norm_backward_args *, fn_dtype, int)
    int fn_channels_last_moments(const fn_channels_last_moments_args *, fn_dtype, int)
    void fn_rstds(double *, double, Py_ssize_t)
    int fn_plane_moments(fn_plane_moments_args *, fn_dtype, int)
    int fn_weight_norm(fn_weight_norm_args *, fn_dtype, int)
    fn_plan fn_plan_layer_norm(const fn_layer_norm_args *, fn_dtype, int)
    fn_plan fn_plan_layer_norm_backward(const fn_layer_norm_backward_args *, fn_dtype, int)
    fn_plan fn_plan_moments(const fn_moments_args *, fn_dtype, int)
    fn_plan fn_plan_channel_norm(const fn_channel_norm_args *, fn_dtype, int)
    fn_plan fn_plan_channel_norm_backward(const fn_channel_norm_backward_args *, fn_dtype, int)
    fn_plan fn_plan_weight_norm(const fn_weight_norm_args *, fn_dtype, int)

    const size_t FN_POOL_LEAST
    void *fn_pool_alloc(size_t)
    void *fn_pool_realloc(void *, size_t)
    void fn_pool_free(void *)
    int fn_pool_last_was_warm()
    void fn_pool_set_next_offset(size_t)
    int fn_pool_has(size_t)
    void fn_pool_set_limit(size_t)
    size_t fn_pool_limit()
    size_t fn_pool_kept()

    int fn_isa_count()
    const char *fn_isa_name(int)
    int fn_isa_supported(int)
    const char *fn_isa_active()
    int fn_isa_select(const char *)

    int fn_openmp()
    void fn_set_cpu_quota(int)
    int fn_cpu_quota()
    int fn_cpu_affinity()
    int fn_openmp_limit()
    void fn_set_num_threads(int)
    int fn_requested_threads()
    int fn_max_threads()
    void fn_force_partition(int)
    int fn_use_bf16_instructions(int)


cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyDataMemAllocator:
        void *ctx
        void *(*malloc)(void *, size_t) noexcept
        void *(*calloc)(void *, size_t, size_t) noexcept
        void *(*realloc)(void *, void *, size_t) noexcept
        void (*free)(void *, void *, size_t) noexcept

    ctypedef struct PyDataMem_Handler:
        char name[127]
        unsigned char version
        PyDataMemAllocator allocator

    object PyDataMem_SetHandler(object)
