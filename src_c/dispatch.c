/* dispatch.c: which instruction set runs. The only place that looks at the CPU.
 *
 * An instruction set is used where the CPU has it and the operating system saves its registers
 * (XCR0): CPUID alone is not enough, and the flags this file was compiled with say nothing. */
#include <stddef.h>
#include <string.h>

#include "isa.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#include <stdint.h>

#include "cpu_x86.h"

static uint64_t enabled_registers(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static fn_x86_cpu this_cpu(void)
{
    fn_x86_cpu cpu = {0};
    uint32_t a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d)) cpu.leaf1_ecx = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        cpu.leaf7_ebx = b;
        if (a && __get_cpuid_count(7, 1, &a, &b, &c, &d)) cpu.leaf7_1_eax = a;
    }
    /* XGETBV itself is illegal where the OS has not turned on XSAVE. */
    if (cpu.leaf1_ecx & FN_X86_OSXSAVE) cpu.xcr0 = enabled_registers();
    return cpu;
}

static int has_avx512(void) { return fn_x86_has_avx512(this_cpu()); }
static int has_avx2(void) { return fn_x86_has_avx2(this_cpu()); }
static int has_bf16_instructions(void) { return fn_x86_has_avx512_bf16(this_cpu()); }
#else
static int has_bf16_instructions(void) { return 0; }
#endif

static int always(void) { return 1; }

/* ---- the registry, best first ----------------------------------------------------------------- */

extern const fn_isa fn_isa_scalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const fn_isa fn_isa_avx512, fn_isa_avx2;
#elif defined(__aarch64__)
extern const fn_isa fn_isa_neon;
#endif

static const struct {
    const fn_isa *isa;
    int (*supported)(void);
} registry[] = {
#if defined(__x86_64__) || defined(_M_X64)
    {&fn_isa_avx512, has_avx512},
    {&fn_isa_avx2, has_avx2},
#elif defined(__aarch64__)
    {&fn_isa_neon, always},
#endif
    {&fn_isa_scalar, always},
};

enum { ISA_COUNT = sizeof registry / sizeof *registry };

const fn_isa *fn_active_isa = &fn_isa_scalar;
int fn_has_bf16_instructions;

int fn_isa_count(void) { return ISA_COUNT; }

const char *fn_isa_name(int index)
{
    return index >= 0 && index < ISA_COUNT ? registry[index].isa->name : NULL;
}

int fn_isa_supported(int index)
{
    return index >= 0 && index < ISA_COUNT && registry[index].supported();
}

const char *fn_isa_active(void) { return fn_active_isa->name; }

int fn_use_bf16_instructions(int use)
{
    fn_has_bf16_instructions = use && has_bf16_instructions();
    return fn_has_bf16_instructions;
}

int fn_isa_select(const char *name)
{
    for (int i = 0; i < ISA_COUNT; i++) {
        if (name && strcmp(name, registry[i].isa->name) != 0) continue;
        if (registry[i].supported()) {
            fn_active_isa = registry[i].isa;
            fn_use_bf16_instructions(1);
            return FN_OK;
        }
        if (name) return FN_UNSUPPORTED_ISA;
    }
    return FN_UNKNOWN_ISA;
}
