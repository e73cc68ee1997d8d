// Times oneDNN's layer normalization on one thread, into memory that exists already.
//
//     OMP_NUM_THREADS=1 ./onednn_layer_norm layer_norm float32 32x768 4096x768
//
// The op is layer_norm or rms_norm, which oneDNN has as a flag of the same primitive (from 3.9 on);
// the type float32, float16 or bfloat16, with weight and bias in float32. Each result is checked
// before it is timed. Prints one line for each shape:
//
//     32x768 <seconds a call, median of the rounds> <version> <oneDNN's name of its implementation>
//
// Build it against any oneDNN from 3.0 on (its CPU runtime with OpenMP):
//
//     g++ -O2 -std=c++17 onednn_layer_norm.cpp -I<onednn>/include -L<onednn>/lib
//         -Wl,-rpath,<onednn>/lib -ldnnl -o onednn_layer_norm
//
// and give its path to must_show.py and readme.py in FASTNORM_ONEDNN.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include <oneapi/dnnl/dnnl.hpp>

namespace
{

using dnnl::engine;
using dnnl::memory;
using dnnl::stream;
using normalization = dnnl::layer_normalization_forward;
using data_type = memory::data_type;

constexpr int rounds = 9;
constexpr double seconds_a_round = 0.02;
constexpr float eps = 1e-5f;

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

// ---- what is asked for --------------------------------------------------------------------------

struct Asked {
    bool rms;
    data_type type;
    long rows, cols;
};

bool op_of(const std::string &name, Asked &asked)
{
    asked.rms = name == "rms_norm";
    return asked.rms || name == "layer_norm";
}

bool type_of(const std::string &name, Asked &asked)
{
    const std::unordered_map<std::string, data_type> types{{"float32", data_type::f32},
                                                           {"float16", data_type::f16},
                                                           {"bfloat16", data_type::bf16}};
    const auto found = types.find(name);
    if (found == types.end()) return false;
    asked.type = found->second;
    return true;
}

dnnl::normalization_flags flags(const Asked &asked)
{
    using dnnl::normalization_flags;
    if (!asked.rms) return normalization_flags::use_scale | normalization_flags::use_shift;
#if DNNL_VERSION_MAJOR > 3 || (DNNL_VERSION_MAJOR == 3 && DNNL_VERSION_MINOR >= 9)
    return normalization_flags::use_scale | normalization_flags::rms_norm;
#else
    throw std::runtime_error("rms_norm: this oneDNN has none, wanted 3.9 or newer");
#endif
}

// ---- memory, its values and the check -----------------------------------------------------------

memory filled(const memory::desc &desc, const engine &cpu, unsigned seed)
{
    memory made(desc, cpu);
    auto *values = static_cast<float *>(made.get_data_handle());
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::generate_n(values, desc.get_size() / sizeof(float), [&] { return normal(random); });
    return made;
}

memory converted(memory from, const memory::desc &desc, const engine &cpu, stream &queue)
{
    memory to(desc, cpu);
    dnnl::reorder(from, to).execute(queue, from, to);
    queue.wait();
    return to;
}

const float *values(const memory &of) { return static_cast<const float *>(of.get_data_handle()); }

// The largest difference from the definition in double, in units of max(1, |y|).
double row_error(bool rms, long cols, const float *x, const float *y, const float *weight,
                 const float *bias)
{
    double mean = 0, square = 0, worst = 0;
    for (long i = 0; i < cols && !rms; i++) mean += x[i] / double(cols);
    for (long i = 0; i < cols; i++) square += (x[i] - mean) * (x[i] - mean) / double(cols);
    for (long i = 0; i < cols; i++) {
        const double xh = (x[i] - mean) / std::sqrt(square + eps);
        const double exact = xh * weight[i] + (rms ? 0 : bias[i]);
        worst = std::max(worst, std::abs(y[i] - exact) / std::max(1.0, std::abs(exact)));
    }
    return worst;
}

struct Timed {
    double seconds;
    std::string implementation;
};

Timed time_normalization(const Asked &asked)
{
    engine cpu(engine::kind::cpu, 0);
    stream queue(cpu);
    const memory::dims shape{asked.rows, asked.cols};
    const memory::desc data(shape, asked.type, memory::format_tag::ab);
    const memory::desc wide(shape, data_type::f32, memory::format_tag::ab);
    const memory::desc parameter({asked.cols}, data_type::f32, memory::format_tag::a);
    const normalization::primitive_desc described(cpu, dnnl::prop_kind::forward_inference, data,
                                                  data, eps, flags(asked));
    const normalization norm(described);

    const memory x = converted(filled(wide, cpu, 1), data, cpu, queue);
    const memory y(data, cpu), weight = filled(parameter, cpu, 3), bias = filled(parameter, cpu, 4);
    std::unordered_map<int, memory> arguments{{DNNL_ARG_SRC, x},
                                              {DNNL_ARG_DST, y},
                                              {DNNL_ARG_SCALE, weight}};
    if (!asked.rms) arguments.insert({DNNL_ARG_SHIFT, bias});
    const auto call = [&] {
        norm.execute(queue, arguments);
        queue.wait();
    };

    call();
    const memory x_wide = converted(x, wide, cpu, queue), y_wide = converted(y, wide, cpu, queue);
    const double limit = asked.type == data_type::f32 ? 1e-4 : 1e-2;
    for (long row = 0; row < asked.rows; row++) {
        const long first = row * asked.cols;
        const double error = row_error(asked.rms, asked.cols, values(x_wide) + first,
                                       values(y_wide) + first, values(weight), values(bias));
        if (!(error < limit)) throw std::runtime_error("oneDNN's result is another function's");
    }
    return {median_seconds(call), described.impl_info_str()};
}

int usage()
{
    std::fprintf(stderr, "wanted layer_norm or rms_norm, float32, float16 or bfloat16, and shapes: "
                         "for example layer_norm float32 32x768\n");
    return 2;
}

} // namespace

int main(int count, char **words)
{
    Asked asked{};
    if (count < 4 || !op_of(words[1], asked) || !type_of(words[2], asked)) return usage();
    const dnnl_version_t *version = dnnl_version();
    for (int i = 3; i < count; i++) {
        if (std::sscanf(words[i], "%ldx%ld", &asked.rows, &asked.cols) != 2) return usage();
        if (asked.rows < 1 || asked.cols < 1) return usage();
        try {
            const Timed timed = time_normalization(asked);
            std::printf("%s %.9g %d.%d.%d %s\n", words[i], timed.seconds, version->major,
                        version->minor, version->patch, timed.implementation.c_str());
        } catch (const std::exception &why) {
            std::fprintf(stderr, "%s %s %s: %s\n", words[1], words[2], words[i], why.what());
            return 1;
        }
    }
}
