// Times oneDNN's layer and group normalization on one thread, into memory that exists already.
//
//     OMP_NUM_THREADS=1 ./onednn_norms layer_norm float32 32x768 4096x768
//     OMP_NUM_THREADS=1 ./onednn_norms group_norm float32 8x256x28x28
//
// The op is layer_norm; rms_norm, which oneDNN has as a flag of the same primitive (from 3.9 on); or
// group_norm (from 3.3 on), of 32 groups where 32 divides the channels, else of the largest power of
// two below that does. The type is float32, float16 or bfloat16, with weight and bias in float32.
// Each result is checked before it is timed. Group normalization takes its memory channels first or
// channels last, and has other implementations for each: both are timed, the faster is printed. One
// line for each shape:
//
//     32x768 <seconds a call, median of the rounds> <version> <oneDNN's name of its implementation>
//
// Build it against any oneDNN from 3.0 on (its CPU runtime with OpenMP):
//
//     g++ -O2 -std=c++17 onednn_norms.cpp -I<onednn>/include -L<onednn>/lib
//         -Wl,-rpath,<onednn>/lib -ldnnl -o onednn_norms
//
// and give its path to must_show.py and readme.py in FASTNORM_ONEDNN.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <sstream>
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
    std::string op;
    data_type type;
    memory::dims shape;
};

bool op_of(const std::string &name, Asked &asked)
{
    asked.op = name;
    return name == "layer_norm" || name == "rms_norm" || name == "group_norm";
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

// Numbers with an x between them: two of them, of group_norm four.
bool shape_of(const std::string &text, Asked &asked)
{
    asked.shape.clear();
    std::istringstream words(text);
    for (std::string word; std::getline(words, word, 'x');)
        asked.shape.push_back(std::atol(word.c_str()));
    if (asked.shape.size() != (asked.op == "group_norm" ? 4 : 2)) return false;
    return std::all_of(asked.shape.begin(), asked.shape.end(), [](long n) { return n > 0; });
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

// What is normalised together: units of `size` elements one after the other, of which `shared` in a
// row have the same weight and bias; those of unit k begin at `parameters` times k modulo `period`.
struct Units {
    long count, size, shared, parameters, period;
    bool rms;
};

// The largest difference from the definition in double, in units of max(1, |y|).
double unit_error(const Units &units, const float *x, const float *y, const float *weight,
                  const float *bias)
{
    double mean = 0, square = 0, worst = 0;
    for (long i = 0; i < units.size && !units.rms; i++) mean += x[i] / double(units.size);
    for (long i = 0; i < units.size; i++)
        square += (x[i] - mean) * (x[i] - mean) / double(units.size);
    for (long i = 0; i < units.size; i++) {
        const double xh = (x[i] - mean) / std::sqrt(square + eps);
        const long k = i / units.shared;
        const double exact = xh * weight[k] + (units.rms ? 0 : bias[k]);
        worst = std::max(worst, std::abs(y[i] - exact) / std::max(1.0, std::abs(exact)));
    }
    return worst;
}

void check(const Units &units, data_type type, const float *x, const float *y, const float *weight,
           const float *bias)
{
    const double limit = type == data_type::f32 ? 1e-4 : 1e-2;
    for (long k = 0; k < units.count; k++) {
        const long first = k * units.size, parameter = k * units.parameters % units.period;
        const double error = unit_error(units, x + first, y + first, weight + parameter,
                                        bias + parameter);
        if (!(error < limit)) throw std::runtime_error("oneDNN's result is another function's");
    }
}

// ---- the primitives -----------------------------------------------------------------------------

struct Timed {
    double seconds;
    std::string implementation;
};

// Of a primitive on x and y of `data`; `plain` is the layout in which the units are.
Timed time_primitive(const engine &cpu, const Asked &asked, const dnnl::primitive &norm,
                     const memory::desc &data, const memory::desc &plain, const Units &units,
                     const char *implementation)
{
    stream queue(cpu);
    const long parameters = asked.shape[1];
    const memory::desc parameter({parameters}, data_type::f32, memory::format_tag::a);
    const memory x = converted(filled(plain, cpu, 1), data, cpu, queue);
    const memory y(data, cpu), weight = filled(parameter, cpu, 3), bias = filled(parameter, cpu, 4);
    std::unordered_map<int, memory> arguments{{DNNL_ARG_SRC, x},
                                              {DNNL_ARG_DST, y},
                                              {DNNL_ARG_SCALE, weight}};
    if (!units.rms) arguments.insert({DNNL_ARG_SHIFT, bias});
    const auto call = [&] {
        norm.execute(queue, arguments);
        queue.wait();
    };
    call();
    const memory x_wide = converted(x, plain, cpu, queue), y_wide = converted(y, plain, cpu, queue);
    check(units, asked.type, values(x_wide), values(y_wide), values(weight), values(bias));
    return {median_seconds(call), implementation};
}

dnnl::normalization_flags flags(bool rms)
{
    using dnnl::normalization_flags;
    if (!rms) return normalization_flags::use_scale | normalization_flags::use_shift;
#if DNNL_VERSION_MAJOR > 3 || (DNNL_VERSION_MAJOR == 3 && DNNL_VERSION_MINOR >= 9)
    return normalization_flags::use_scale | normalization_flags::rms_norm;
#else
    throw std::runtime_error("rms_norm: this oneDNN has none, wanted 3.9 or newer");
#endif
}

Timed time_layer_norm(const Asked &asked)
{
    const engine cpu(engine::kind::cpu, 0);
    const long rows = asked.shape[0], cols = asked.shape[1];
    const Units units{rows, cols, 1, 0, 1, asked.op == "rms_norm"};
    const memory::desc data(asked.shape, asked.type, memory::format_tag::ab);
    const memory::desc plain(asked.shape, data_type::f32, memory::format_tag::ab);
    const dnnl::layer_normalization_forward::primitive_desc
        described(cpu, dnnl::prop_kind::forward_inference, data, data, eps, flags(units.rms));
    return time_primitive(cpu, asked, dnnl::layer_normalization_forward(described), data, plain,
                          units, described.impl_info_str());
}

Timed time_group_norm(const Asked &asked)
{
#if DNNL_VERSION_MAJOR > 3 || (DNNL_VERSION_MAJOR == 3 && DNNL_VERSION_MINOR >= 3)
    const engine cpu(engine::kind::cpu, 0);
    const long samples = asked.shape[0], channels = asked.shape[1];
    const long plane = asked.shape[2] * asked.shape[3];
    long groups = 32;
    while (channels % groups) groups /= 2;
    const long joint = channels / groups;
    const Units units{samples * groups, joint * plane, plane, joint, channels, false};
    const memory::desc plain(asked.shape, data_type::f32, memory::format_tag::nchw);
    Timed fastest{HUGE_VAL, ""};
    for (const auto layout : {memory::format_tag::nchw, memory::format_tag::nhwc}) {
        const memory::desc data(asked.shape, asked.type, layout);
        const dnnl::group_normalization_forward::primitive_desc described(
            cpu, dnnl::prop_kind::forward_inference, data, data, groups, eps, flags(false));
        const dnnl::group_normalization_forward norm(described);
        const Timed timed = time_primitive(cpu, asked, norm, data, plain, units,
                                           described.impl_info_str());
        if (timed.seconds < fastest.seconds) fastest = timed;
    }
    return fastest;
#else
    (void)asked;
    throw std::runtime_error("group_norm: this oneDNN has none, wanted 3.3 or newer");
#endif
}

int usage()
{
    std::fprintf(stderr, "wanted layer_norm, rms_norm or group_norm, float32, float16 or bfloat16, "
                         "and shapes: for example layer_norm float32 32x768\n");
    return 2;
}

} // namespace

int main(int count, char **words)
{
    Asked asked{};
    if (count < 4 || !op_of(words[1], asked) || !type_of(words[2], asked)) return usage();
    const dnnl_version_t *version = dnnl_version();
    for (int i = 3; i < count; i++) {
        if (!shape_of(words[i], asked)) return usage();
        try {
            const bool group = asked.op == "group_norm";
            const Timed timed = group ? time_group_norm(asked) : time_layer_norm(asked);
            std::printf("%s %.9g %d.%d.%d %s\n", words[i], timed.seconds, version->major,
                        version->minor, version->patch, timed.implementation.c_str());
        } catch (const std::exception &why) {
            std::fprintf(stderr, "%s %s %s: %s\n", words[1], words[2], words[i], why.what());
            return 1;
        }
    }
}
