/* A copy that writes past the cache: what memory allows at best. nt_copy.py builds and calls it. */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

__attribute__((target("avx512f"))) static void lines_avx512(char *to, const char *from, size_t size)
{
    for (size_t i = 0; i < size; i += 64)
        _mm512_stream_si512((void *)(to + i), _mm512_loadu_si512((const void *)(from + i)));
}

__attribute__((target("avx2"))) static void lines_avx2(char *to, const char *from, size_t size)
{
    for (size_t i = 0; i < size; i += 32)
        _mm256_stream_si256((void *)(to + i), _mm256_loadu_si256((const void *)(from + i)));
}

/* The instruction set in use, or NULL where this CPU has none of the two. */
const char *nt_copy_isa(void)
{
    if (__builtin_cpu_supports("avx512f")) return "avx512";
    if (__builtin_cpu_supports("avx2")) return "avx2";
    return NULL;
}

void nt_copy(char *to, const char *from, size_t size)
{
    size_t head = -(uintptr_t)to % 64;
    if (head > size) head = size;
    const size_t lines = (size - head) / 64 * 64;
    memcpy(to, from, head);
    if (__builtin_cpu_supports("avx512f"))
        lines_avx512(to + head, from + head, lines);
    else
        lines_avx2(to + head, from + head, lines);
    memcpy(to + head + lines, from + head + lines, size - head - lines);
    _mm_sfence();
}
