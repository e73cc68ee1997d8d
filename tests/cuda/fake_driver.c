/* A CUDA driver for tests of the host's side: it runs nothing, checks what it is given as the real
 * one would, and remembers it. Device memory is host memory, so a launch may be acted out by a
 * callback. A symbol is missing where the file is compiled with -D<name>=<another name>. */

#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void *Handle;
typedef int Result;

enum {
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NOT_FOUND = 500,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_IMPLICIT = 906
};

enum {
    MAX_DEVICES = 8,
    MAX_PARAMS = 512,
    MAX_FAILURES = 16,
    MAX_LAUNCHES = 256,
    LOG_BYTES = 1 << 20
};

typedef struct {
    char *code;
    Handle context;
} Module;

typedef struct {
    char entry[1024];
    Module *module;
    int sizes[MAX_PARAMS], count, shared;
} Function;

typedef struct {
    char entry[1024];
    unsigned grid, block, shared;
    Handle stream, context;
    unsigned char bytes[MAX_PARAMS * 8];
    int size;
} Launch;

typedef void (*Callback)(const char *, unsigned, unsigned, unsigned, Handle, const void *, int);

static struct {
    int devices, initialised, tracing;
    struct {
        char name[64];
        int code, after;
    } failures[MAX_FAILURES];
    int failure_count;
    char log[LOG_BYTES];
    size_t log_size;
    Launch launches[MAX_LAUNCHES];
    long launch_count;
    Callback callback;
    int retained[MAX_DEVICES], modules, events, pools, allocations;
    uintptr_t placed[64];
    int places[64], place_count;
    Handle capturing[16];
    int capture_count;
    pthread_mutex_t mutex;
} fake = {.devices = 1, .tracing = 1, .mutex = PTHREAD_MUTEX_INITIALIZER};

static __thread Handle stack[16];
static __thread int depth;
static __thread int capture_mode;

/* ---- what tests ask ---- */

void fake_fail(const char *name, int code, int after)
{
    snprintf(fake.failures[fake.failure_count].name, 64, "%s", name);
    fake.failures[fake.failure_count].code = code;
    fake.failures[fake.failure_count++].after = after;
}

void fake_reset(void)
{
    fake.failure_count = fake.place_count = fake.capture_count = 0;
    fake.log_size = 0;
    fake.log[0] = 0;
    fake.launch_count = 0;
    fake.callback = NULL;
    fake.tracing = 1;
}

void fake_trace(int on) { fake.tracing = on; }

const char *fake_log(void) { return fake.log; }

long fake_launches(void) { return fake.launch_count; }

const Launch *fake_launch(long i) { return &fake.launches[i % MAX_LAUNCHES]; }

void fake_on_launch(Callback callback) { fake.callback = callback; }

/* Where memory lies: on device 0, if nothing else was said; -1 is nowhere. */
void fake_place(uintptr_t address, int device)
{
    fake.placed[fake.place_count] = address;
    fake.places[fake.place_count++] = device;
}

void fake_capture(Handle stream) { fake.capturing[fake.capture_count++] = stream; }

int fake_live(const char *what)
{
    int contexts = 0;
    for (int i = 0; i < MAX_DEVICES; i++) contexts += fake.retained[i];
    if (strcmp(what, "contexts") == 0) return contexts;
    if (strcmp(what, "modules") == 0) return fake.modules;
    if (strcmp(what, "events") == 0) return fake.events;
    if (strcmp(what, "pools") == 0) return fake.pools;
    return strcmp(what, "allocations") == 0 ? fake.allocations : -1;
}

int fake_depth(void) { return depth; }

int fake_capture_mode(void) { return capture_mode; }

Handle fake_context(int device) { return (Handle)(uintptr_t)(0x1000 + device); }

/* ---- inside ---- */

static Result note(const char *name, const char *format, ...)
{
    Result result = 0;
    pthread_mutex_lock(&fake.mutex);
    if (fake.tracing && fake.log_size < LOG_BYTES - 2048) {
        va_list args;
        va_start(args, format);
        fake.log_size += (size_t)snprintf(fake.log + fake.log_size, 128, "%s", name);
        vsnprintf(fake.log + fake.log_size, 1500, format, args);
        fake.log_size += strlen(fake.log + fake.log_size);
        fake.log_size += (size_t)snprintf(fake.log + fake.log_size, 8, "\n");
        va_end(args);
    }
    for (int i = 0; i < fake.failure_count; i++)
        if (strcmp(fake.failures[i].name, name) == 0 && fake.failures[i].after-- <= 0)
            result = fake.failures[i].code;
    pthread_mutex_unlock(&fake.mutex);
    return result;
}

static int counted(int *count, int by) { return __atomic_add_fetch(count, by, __ATOMIC_SEQ_CST); }

static Handle current(void) { return depth ? stack[depth - 1] : NULL; }

static int is_capturing(Handle stream)
{
    for (int i = 0; i < fake.capture_count; i++)
        if (fake.capturing[i] == stream) return 1;
    return 0;
}

#define CALLED(...)                                                                                \
    do {                                                                                           \
        Result failed_ = note(__func__, __VA_ARGS__);                                              \
        if (failed_) return failed_;                                                               \
    } while (0)

#define NEEDS_CONTEXT()                                                                            \
    do {                                                                                           \
        if (!current()) return INVALID_CONTEXT;                                                    \
    } while (0)

/* ---- the driver ---- */

Result cuInit(unsigned flags)
{
    const char *devices = getenv("FAKE_CUDA_DEVICES"), *fails = getenv("FAKE_CUDA_FAIL");
    char name[64];
    int code;
    if (devices) fake.devices = atoi(devices);
    if (fails && sscanf(fails, "%63[^:]:%d", name, &code) == 2) fake_fail(name, code, 0);
    CALLED(" %u", flags);
    fake.initialised = 1;
    return 0;
}

Result cuDriverGetVersion(int *version)
{
    *version = 13000;
    CALLED("");
    return 0;
}

Result cuDeviceGetCount(int *count)
{
    CALLED("");
    *count = fake.devices;
    return fake.initialised ? 0 : NOT_INITIALIZED;
}

Result cuDeviceGet(int *device, int ordinal)
{
    CALLED(" %d", ordinal);
    *device = ordinal;
    return ordinal < fake.devices ? 0 : INVALID_VALUE;
}

Result cuDeviceGetName(char *name, int size, int device)
{
    CALLED(" %d", device);
    snprintf(name, (size_t)size, "Fake %d", device);
    return 0;
}

Result cuDeviceGetAttribute(int *value, int attribute, int device)
{
    CALLED(" %d %d", attribute, device);
    *value = attribute == 16 ? 132 : attribute == 75 ? 9 : attribute == 76 ? 0 : 1;
    return 0;
}

Result cuDevicePrimaryCtxRetain(Handle *context, int device)
{
    CALLED(" %d", device);
    counted(&fake.retained[device], 1);
    *context = fake_context(device);
    return 0;
}

Result cuCtxGetCurrent(Handle *context)
{
    *context = current();
    return note(__func__, "");
}

Result cuCtxPushCurrent_v2(Handle context)
{
    CALLED(" %p", context);
    stack[depth++] = context;
    return 0;
}

Result cuCtxPopCurrent_v2(Handle *context)
{
    CALLED("");
    NEEDS_CONTEXT();
    *context = stack[--depth];
    return 0;
}

Result cuModuleLoadDataEx(Handle *handle, const void *image, unsigned count, int *options,
                          void **values)
{
    Module *module;
    CALLED(" mode=%d", capture_mode);
    NEEDS_CONTEXT();
    if (fake.capture_count && capture_mode != 2) return CAPTURE_UNSUPPORTED;
    if (!strstr(image, ".version")) {
        for (unsigned i = 0; i < count; i++)
            if (options[i] == 5) strcpy(values[i], "ptxas fatal: no .version");
        return INVALID_IMAGE;
    }
    module = calloc(1, sizeof *module);
    module->context = current();
    module->code = strdup(image);
    *handle = module;
    counted(&fake.modules, 1);
    return 0;
}

Result cuModuleUnload(Handle handle)
{
    Module *module = handle;
    CALLED("");
    if (module->context != current()) return INVALID_CONTEXT;
    counted(&fake.modules, -1);
    return 0; /* its memory stays: a launch after this is to be found, not to crash */
}

static int size_of(const char *type)
{
    const char *digits = strpbrk(type, "0123456789");
    return digits ? atoi(digits) / 8 : 8;
}

/* The entry's parameters, out of the PTX: a real driver has them from there too. */
static Result read_params(Function *function, const char *code)
{
    char wanted[1100];
    const char *at, *end;
    snprintf(wanted, sizeof wanted, ".entry %s(", function->entry);
    at = strstr(code, wanted);
    if (!at) return NOT_FOUND;
    end = strchr(at, ')');
    while ((at = strstr(at, ".param .")) && at < end) {
        at += strlen(".param .");
        if (strncmp(at, "align", 5) == 0) at = strchr(at, '.') + 1;
        function->sizes[function->count++] = size_of(at);
    }
    return 0;
}

Result cuModuleGetFunction(Handle *handle, Handle module, const char *name)
{
    Function *function = calloc(1, sizeof *function);
    Result result;
    CALLED(" %s", name);
    function->module = module;
    snprintf(function->entry, sizeof function->entry, "%s", name);
    result = read_params(function, function->module->code);
    *handle = function;
    return result;
}

Result cuFuncGetAttribute(int *value, int attribute, Handle function)
{
    (void)function;
    CALLED(" %d", attribute);
    *value = attribute == 0 ? 1024 : attribute == 1 ? 512 : attribute == 4 ? 64 : 0;
    return 0;
}

Result cuFuncSetAttribute(Handle function, int attribute, int value)
{
    CALLED(" %s %d %d", ((Function *)function)->entry, attribute, value);
    if (attribute != 8 || value > 232448 - 512) return INVALID_VALUE;
    ((Function *)function)->shared = value;
    return 0;
}

Result cuLaunchKernel(Handle handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                      unsigned by, unsigned bz, unsigned shared, Handle stream, void **params,
                      void **extra)
{
    Function *function = handle;
    Launch *launch;
    CALLED(" %s grid=%u block=%u shared=%u stream=%p context=%p", function->entry, gx, bx, shared,
           stream, current());
    if (current() != function->module->context) return INVALID_CONTEXT;
    if (gx == 0 || gy != 1 || gz != 1 || bx == 0 || bx > 1024 || by != 1 || bz != 1 || extra)
        return INVALID_VALUE;
    if (shared + 512 > 49152 && (int)shared > function->shared) return INVALID_VALUE;
    pthread_mutex_lock(&fake.mutex);
    launch = &fake.launches[fake.launch_count++ % MAX_LAUNCHES];
    memcpy(launch->entry, function->entry, sizeof launch->entry);
    launch->grid = gx, launch->block = bx, launch->shared = shared;
    launch->stream = stream, launch->context = current();
    memset(launch->bytes, 0, (size_t)function->count * 8);
    for (int i = 0; i < function->count; i++) /* each in 8 bytes of its own */
        memcpy(launch->bytes + 8 * i, params[i], (size_t)function->sizes[i]);
    launch->size = function->count * 8;
    pthread_mutex_unlock(&fake.mutex);
    if (fake.callback)
        fake.callback(launch->entry, gx, bx, shared, stream, launch->bytes, launch->size);
    return 0;
}

Result cuEventCreate(Handle *event, unsigned flags)
{
    CALLED(" %u", flags);
    NEEDS_CONTEXT();
    *event = malloc(1);
    counted(&fake.events, 1);
    return 0;
}

Result cuEventDestroy_v2(Handle event)
{
    CALLED("");
    free(event);
    counted(&fake.events, -1);
    return 0;
}

Result cuEventRecord(Handle event, Handle stream)
{
    (void)event;
    CALLED(" %p", stream);
    return 0;
}

Result cuStreamWaitEvent(Handle stream, Handle event, unsigned flags)
{
    (void)event;
    CALLED(" %p", stream);
    return flags ? INVALID_VALUE : 0;
}

Result cuStreamIsCapturing(Handle stream, int *status)
{
    CALLED(" %p", stream);
    *status = is_capturing(stream);
    /* The legacy stream can not be asked while another captures. */
    return fake.capture_count && !stream ? CAPTURE_IMPLICIT : 0;
}

Result cuThreadExchangeStreamCaptureMode(int *mode)
{
    int before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return note(__func__, " %d", capture_mode);
}

Result cuMemPoolCreate(Handle *pool, const void *properties)
{
    const int *fields = properties;
    CALLED(" %d %d %d %d", fields[0], fields[1], fields[2], fields[3]);
    if (fields[0] != 1 || fields[2] != 1) return INVALID_VALUE;
    if (fake.capture_count && capture_mode != 2) return CAPTURE_UNSUPPORTED;
    *pool = (Handle)(uintptr_t)(0x2000 + fields[3]);
    counted(&fake.pools, 1);
    return 0;
}

Result cuMemPoolSetAttribute(Handle pool, int attribute, void *value)
{
    CALLED(" %p %d %llu", pool, attribute, (unsigned long long)*(uint64_t *)value);
    return 0;
}

Result cuMemAllocFromPoolAsync(uintptr_t *address, size_t size, Handle pool, Handle stream)
{
    CALLED(" %zu %p %p", size, pool, stream);
    *address = (uintptr_t)aligned_alloc(256, (size + 255) / 256 * 256);
    counted(&fake.allocations, 1);
    return *address ? 0 : OUT_OF_MEMORY;
}

Result cuMemFreeAsync(uintptr_t address, Handle stream)
{
    CALLED(" %p", stream);
    free((void *)address);
    counted(&fake.allocations, -1);
    return 0;
}

Result cuPointerGetAttribute(void *value, int attribute, uintptr_t address)
{
    int device = 0;
    CALLED(" %d", attribute);
    for (int i = 0; i < fake.place_count; i++)
        if (fake.placed[i] == address) device = fake.places[i];
    if (attribute == 3) /* the pointer itself */
        *(uintptr_t *)value = address;
    else
        *(int *)value = device;
    return device < 0 || (attribute != 9 && attribute != 3) ? INVALID_VALUE : 0;
}

Result cuGetErrorName(int code, const char **text)
{
    *text = code == 2     ? "CUDA_ERROR_OUT_OF_MEMORY"
            : code == 200 ? "CUDA_ERROR_INVALID_IMAGE"
            : code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS"
                          : NULL;
    return *text ? 0 : INVALID_VALUE;
}

Result cuGetErrorString(int code, const char **text)
{
    *text = code == 700 ? "an illegal memory access was encountered" : "it failed";
    return 0;
}
