/* What Numba's own launcher asks of a driver beyond what fastnorm does. Linking gives the PTX back. */

#include "fake_driver.c"

typedef struct {
    char *code;
    size_t size;
} Link;

Result cuIpcOpenMemHandle(void) { return INVALID_VALUE; }

Result cuDeviceGetUuid(char *uuid, int device)
{
    memset(uuid, device, 16);
    return note(__func__, " %d", device);
}

Result cuDeviceComputeCapability(int *major, int *minor, int device)
{
    *major = 9, *minor = 0;
    return note(__func__, " %d", device);
}

Result cuCtxGetDevice(int *device)
{
    NEEDS_CONTEXT();
    *device = (int)((uintptr_t)current() - (uintptr_t)fake_context(0));
    return note(__func__, "");
}

Result cuCtxPushCurrent(Handle context) { return cuCtxPushCurrent_v2(context); }

Result cuCtxPopCurrent(Handle *context) { return cuCtxPopCurrent_v2(context); }

Result cuMemGetInfo_v2(size_t *left, size_t *all)
{
    *left = *all = (size_t)1 << 30;
    return note(__func__, "");
}

Result cuMemAlloc_v2(uintptr_t *address, size_t size)
{
    *address = (uintptr_t)aligned_alloc(256, (size + 255) / 256 * 256);
    counted(&fake.allocations, 1);
    return note(__func__, " %zu", size);
}

Result cuMemFree_v2(uintptr_t address)
{
    free((void *)address);
    counted(&fake.allocations, -1);
    return note(__func__, "");
}

Result cuMemGetAddressRange_v2(uintptr_t *base, size_t *size, uintptr_t address)
{
    *base = address, *size = 1 << 20;
    return note(__func__, "");
}

Result cuLinkCreate_v2(unsigned count, int *options, void **values, Handle *link)
{
    (void)options, (void)values;
    *link = calloc(1, sizeof(Link));
    return note(__func__, " %u", count);
}

Result cuLinkAddData_v2(Link *link, int type, void *data, size_t size, const char *name,
                        unsigned count, int *options, void **values)
{
    (void)name, (void)options, (void)values;
    link->code = calloc(1, size + 1);
    link->size = size + 1;
    memcpy(link->code, data, size);
    return note(__func__, " %d %u", type, count);
}

Result cuLinkComplete(Link *link, void **image, size_t *size)
{
    *image = link->code;
    *size = link->size;
    return note(__func__, "");
}

Result cuLinkDestroy(Link *link)
{
    free(link->code);
    free(link);
    return note(__func__, "");
}

Result cuEventDestroy(Handle event) { return cuEventDestroy_v2(event); }
