/* cpu_x86.c: what src_c/cpu_x86.h says of a CPU that is described by four hexadecimal numbers:
 *
 *     cpu_x86 <ECX of CPUID leaf 1> <EBX of leaf 7> <XCR0> <EAX of leaf 7, subleaf 1>
 *
 * prints the instruction sets that it can run. test_c_core.py knows the CPUs. */
#include <stdio.h>
#include <stdlib.h>

#include "cpu_x86.h"

int main(int argc, char **argv)
{
    if (argc != 5) return 2;
    const fn_x86_cpu cpu = {.leaf1_ecx = (uint32_t)strtoul(argv[1], NULL, 16),
                            .leaf7_ebx = (uint32_t)strtoul(argv[2], NULL, 16),
                            .xcr0 = strtoull(argv[3], NULL, 16),
                            .leaf7_1_eax = (uint32_t)strtoul(argv[4], NULL, 16)};
    if (fn_x86_has_avx512_bf16(cpu)) puts("avx512_bf16");
    if (fn_x86_has_avx512(cpu)) puts("avx512");
    if (fn_x86_has_avx2(cpu)) puts("avx2");
    return 0;
}
