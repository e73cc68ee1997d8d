// Times oneDNN's layer normalization, float32, on one thread, into memory that exists already.
//
//     OMP_NUM_THREADS=1 ./onednn_layer_norm 32x768 4096x768
//
// prints one line for each shape: "32x768 <seconds a call, median of the rounds>". Build it against
// any oneDNN from 3.0 on (its CPU runtime with OpenMP):
//
//     g++ -O2 -std=c++17 onednn_layer_norm.cpp -I<onednn>/include -L<onednn>/lib
//         -Wl,-rpath,<onednn>/lib -ldnnl -o onednn_layer_norm
//
// and give its path to must_show.py and readme.py in FASTNORM_ONEDNN.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include <oneapi/dnnl/dnnl.hpp>

namespace
{

constexpr int rounds = 9;
constexpr double seconds_a_round = 0.02;

double now()
{
    const auto since = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double>(since).count();
}

template <class Call> double seconds_of(int calls, Call &call)
{
    const double start = now();
    for (int i = 0; i < calls; i++) call();
    return now() - start;
}

template <class Call> double median_seconds(Call call)
{
    call();
    int calls = 1;
    double taken;
    while ((taken = seconds_of(calls, call)) < seconds_a_round / 4) calls *= 2;
    calls = std::max(1, int(calls * seconds_a_round / taken));
    std::vector<double> times;
    for (int i = 0; i < rounds; i++) times.push_back(seconds_of(calls, call) / calls);
    std::nth_element(times.begin(), times.begin() + rounds / 2, times.end());
    return times[rounds / 2];
}

dnnl::memory filled(const dnnl::memory::desc &desc, const dnnl::engine &cpu, unsigned seed)
{
    dnnl::memory memory(desc, cpu);
    auto *values = static_cast<float *>(memory.get_data_handle());
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::generate_n(values, desc.get_size() / sizeof(float), [&] { return normal(random); });
    return memory;
}

double time_layer_norm(long rows, long cols)
{
    using namespace dnnl;
    engine cpu(engine::kind::cpu, 0);
    stream queue(cpu);
    const memory::desc data({rows, cols}, memory::data_type::f32, memory::format_tag::ab);
    const memory::desc parameter({cols}, memory::data_type::f32, memory::format_tag::a);
    const layer_normalization_forward norm(
        layer_normalization_forward::primitive_desc(cpu, prop_kind::forward_inference, data, data,
                                                    1e-5f,
                                                    normalization_flags::use_scale |
                                                        normalization_flags::use_shift));
    const std::unordered_map<int, memory> arguments{
        {DNNL_ARG_SRC, filled(data, cpu, 1)},
        {DNNL_ARG_DST, filled(data, cpu, 2)},
        {DNNL_ARG_SCALE, filled(parameter, cpu, 3)},
        {DNNL_ARG_SHIFT, filled(parameter, cpu, 4)},
    };
    return median_seconds([&] {
        norm.execute(queue, arguments);
        queue.wait();
    });
}

} // namespace

int main(int count, char **shapes)
{
    for (int i = 1; i < count; i++) {
        long rows, cols;
        if (std::sscanf(shapes[i], "%ldx%ld", &rows, &cols) != 2 || rows < 1 || cols < 1) {
            std::fprintf(stderr, "got %s, wanted ROWSxCOLS, for example 32x768\n", shapes[i]);
            return 2;
        }
        std::printf("%s %.9g\n", shapes[i], time_layer_norm(rows, cols));
    }
}
