/* cpu_x86.h: what an x86-64 CPU can run, as a function of what CPUID and XCR0 say, so that tests can
 * ask it about CPUs that are not at hand. */
#ifndef FN_CPU_X86_H
#define FN_CPU_X86_H

#include <stdint.h>

typedef struct {
    uint32_t leaf1_ecx, leaf7_ebx, leaf7_1_eax;
    uint64_t xcr0; /* register sets that the operating system saves */
} fn_x86_cpu;

#define FN_X86_FMA (1u << 12)
#define FN_X86_OSXSAVE (1u << 27)
#define FN_X86_AVX (1u << 28)
#define FN_X86_F16C (1u << 29)
#define FN_X86_BMI2 (1u << 8)
#define FN_X86_AVX2 (1u << 5)
#define FN_X86_AVX512 (1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) /* F, DQ, BW, VL */
#define FN_X86_AVX512_BF16 (1u << 5)                              /* leaf 7, 1 */
#define FN_X86_YMM 0x6u                                           /* XCR0: SSE and AVX */
#define FN_X86_ZMM 0xe6u                                          /* and the AVX-512 registers */

static inline int fn_x86_has_avx2(fn_x86_cpu cpu)
{
    const uint32_t leaf1 = FN_X86_FMA | FN_X86_OSXSAVE | FN_X86_AVX | FN_X86_F16C;
    return (cpu.leaf1_ecx & leaf1) == leaf1 && (cpu.leaf7_ebx & FN_X86_AVX2) &&
           (cpu.xcr0 & FN_X86_YMM) == FN_X86_YMM;
}

static inline int fn_x86_has_avx512(fn_x86_cpu cpu)
{
    const uint32_t leaf7 = FN_X86_AVX512 | FN_X86_BMI2;
    return fn_x86_has_avx2(cpu) && (cpu.leaf7_ebx & leaf7) == leaf7 &&
           (cpu.xcr0 & FN_X86_ZMM) == FN_X86_ZMM;
}

static inline int fn_x86_has_avx512_bf16(fn_x86_cpu cpu)
{
    return fn_x86_has_avx512(cpu) && (cpu.leaf7_1_eax & FN_X86_AVX512_BF16);
}

#endif
