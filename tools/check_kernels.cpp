// Compares the kernels of one instruction set (the best here, or the one named) with plain C++ on random input; and rows
// together, on any number of threads, with rows alone, bit for bit. Without Python, so also under an emulator (for aarch64
// tools/check_neon.sh does that). A line for each operation; the exit status is 1 where something differs.
//
//   cmake -S . -B build/check && cmake --build build/check
//   g++ -std=c++20 -O1 tools/check_kernels.cpp build/check/libsquawq.so -Wl,-rpath,build/check -pthread -o build/check/check
//   build/check/check [ISA [JOBS]]        # JOBS: how many calls an operation gets from each of two callers; 70 if not said
//
// aarch64: -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ on the first
// line, that compiler on the second, then `qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu max build/check/check neon`.
// A sanitizer: -DCMAKE_CXX_FLAGS=-fsanitize=... on the first line, -fsanitize=... on the second.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/layers.h"

using Int = int64_t;
using In = const float*;
using squawq::Kind;
extern "C" {
const char* squawq_isa();
int squawq_set_isa(const char*);
int squawq_set_threads(int);
int squawq_matmul(In, Int, Kind, const void*, float*);
int squawq_rms_norm(float*, In, In, float, Int, Int, float*);
int squawq_activation_mul(In, Int, Int, Int, float*);
int squawq_soft_cap(float*, Int, float);
int squawq_rotate_and_store(float*, Int, Int, Int, Int, In, In, Int, const squawq::Rotation*, float, const Int*, uint16_t*,
                            uint16_t*);
int squawq_attention(In, Int, Int, Int, const Int*, Int, const int32_t*, const squawq::Scoring*, const uint16_t*,
                     const uint16_t*, float*);
}

namespace {
using Floats = std::vector<float>;
using Integers = std::uniform_int_distribution<int>;
std::mt19937 engine(0);
std::string isa;
int jobs = 70, failures = 0;

template <class T, class Draw>
std::vector<T> random(Int count, Draw draw) {
    std::vector<T> values(count);
    for (T& v : values) v = T(draw(engine));
    return values;
}
Floats normal(Int count, float scale = 1) { return random<float>(count, std::normal_distribution<float>(0, scale)); }
// As float16 from 1/16 to almost 1, of both signs; numbers as bfloat16, too.
std::vector<uint16_t> halves(Int count) {
    return random<uint16_t>(count, [](std::mt19937& from) { return (0x2c00 + from() % 0x1000) | (from() & 0x8000); });
}

void say(bool good, const std::string& what, double error, const char* rows_alone) {
    std::printf("%-4s %-30s differs by %.1e, rows alone: %s\n", good ? "ok" : "BAD", what.c_str(), error, rows_alone);
    failures += !good;
}

// run(first, count, y): `count` rows from `first` on give y [count][width].
void check(const std::string& what, double tolerance, Int rows, Int width, const std::function<void(Int, Int, float*)>& run) {
    Floats results[2] = {Floats(rows * width), Floats(rows * width)};
    std::atomic<bool> same = true;
    for (int i : {0, 1}) {
        squawq_set_isa(i == 0 ? "scalar" : isa.c_str());
        Floats& alone = results[i];
        for (Int row = 0; row < rows; ++row) run(row, 1, &alone[row * width]);
        const auto caller = [&](int number) {
            for (int job = 0; job < jobs; ++job) {
                if (number == 0 && job % 10 == 0) squawq_set_threads(4 - job / 10 % 4);
                const Int count = 1 + job % rows, first = rows - count;
                Floats y(count * width);
                run(first, count, y.data());
                if (std::memcmp(y.data(), &alone[first * width], y.size() * sizeof(float)) != 0) same = false;
            }
        };
        std::thread other(caller, 1);
        caller(0);
        other.join();
    }
    double error = 0;  // relative to the largest value of its row
    for (Int row = 0; row < rows; ++row) {
        double largest = 1e-30, difference = 0;
        for (Int i = row * width; i < (row + 1) * width; ++i) {
            const double d = std::fabs(double(results[0][i]) - results[1][i]);
            difference = d <= difference ? difference : d;  // NaN stays
            largest = std::fmax(largest, std::fabs(results[0][i]));
        }
        error = difference / largest <= error ? error : difference / largest;
    }
    say(error <= tolerance && same, what, error, same ? "the same" : "NOT the same");
}

void product(const std::string& what, Int in, Int out, Kind kind, const void* weight) {
    const auto multiply = [=](In x, Int m, float* y) { squawq_matmul(x, m, kind, weight, y); };
    Floats x = normal(17 * in), before(17 * out), after(17 * out);
    check(what, 1e-5, 17, out, [&](Int first, Int count, float* y) { multiply(&x[first * in], count, y); });
    multiply(x.data(), 17, before.data());
    x[4 * in + 5] = NAN;  // must show in all of row 4 and only there
    multiply(x.data(), 17, after.data());
    for (Int i = 0; i < 17 * out; ++i)
        if (i / out == 4 ? !std::isnan(after[i]) : after[i] != before[i]) return say(false, what + ", NaN", NAN, "NOT the same");
}

void linears() {
    const Int out = 200, blocks = 13;
    const Floats bias = normal(out), scales = normal(blocks * 16), full = normal(blocks * 256 * 16);
    for (Int group : {16, 32, 64, 128}) {
        const Int in = group == 128 ? 2048 : 256, scaled = blocks * in / group * 16;  // 17 * 2048: quantized in parallel
        const auto weight = random<uint8_t>(blocks * in * 8, Integers(0, 255)), zeros = random<uint8_t>(scaled, Integers(0, 15));
        const auto steps = random<uint16_t>(scaled, Integers(0x2000, 0x2fff));
        const squawq::Int4 w{weight.data(), steps.data(), zeros.data(), bias.data(), out, in, group};
        for (int exact : {0, 1})
            product("int4, group " + std::to_string(group) + (exact ? ", exact" : ", int8 input"), in, out,
                    exact ? Kind::int4_exact : Kind::int4, &w);
    }
    const auto bytes = random<int8_t>(blocks * 256 * 16, Integers(-127, 127));
    const squawq::Int8 w{bytes.data(), scales.data(), nullptr, out, 256, 128};
    product("int8", 256, out, Kind::int8, &w);
    const auto half = halves(blocks * 256 * 16);
    const void* data[] = {full.data(), half.data(), half.data()};
    for (int type : {0, 1, 2}) {
        const squawq::DenseWeight d{data[type], nullptr, out, 256, squawq::Dense(type)};
        product(std::vector{"dense f32", "dense f16", "dense bf16"}[type], 256, out, Kind::dense, &d);
    }
}

void norms_and_silu() {
    const Int n = 1024;  // 17 rows are enough for several threads
    const Floats x = normal(17 * 2 * n, 8), delta = normal(17 * n), weight = normal(n);
    for (bool sum : {false, true})
        check(sum ? "rms_norm of a sum" : "rms_norm", 1e-5, 17, n, [&](Int first, Int count, float* y) {
            Floats hidden(&x[first * n], &x[first * n] + count * n);
            squawq_rms_norm(hidden.data(), sum ? &delta[first * n] : nullptr, weight.data(), 1e-5f, count, n, y);
        });
    check("soft_cap", 1e-5, 17, n, [&](Int first, Int count, float* y) {
        std::copy_n(&x[first * n], count * n, y);
        squawq_soft_cap(y, count * n, 3.f);
    });
    for (Int kind : {0, 1}) {
        check(kind ? "gelu_tanh_mul" : "silu_mul", 1e-5, 17, n,
              [&](Int first, Int count, float* y) { squawq_activation_mul(&x[first * 2 * n], count, n, kind, y); });
    }
}

// Five sequences in scattered pages: {first row, rows, start, place of the first page in the table}.
constexpr Int SEQUENCES[5][4] = {{0, 1, 70, 0}, {1, 36, 0, 5}, {37, 20, 31, 8}, {57, 1, 200, 12}, {58, 12, 63, 25}};
constexpr Int ROWS = 70, PAGES = 30;

void attention(const std::string& name, Int query, Int kv, Int dim) {
    const Int width = (query + 2 * kv) * dim, half = dim / 2;
    const Floats cos = normal(ROWS * half), sin = normal(ROWS * half), norm = normal(query * dim);
    const auto keys = halves(PAGES * kv * dim * 16), values = halves(PAGES * kv * dim * 16);
    Floats qkv = normal(ROWS * width);
    int32_t table[PAGES];
    for (int32_t i = 0; i < PAGES; ++i) table[i] = i * 7 % PAGES;
    const float scale = 1 / std::sqrt(float(dim));
    const squawq::Scoring scorings[] = {{0, scale, 0, 0, 1}, {7, scale, 0, 0, 1}, {0, 2 * scale, 3, 0.1f, 40}};
    const char* names[] = {"", ", window 7", ", capped"};
    for (int kind : {0, 1, 2})
        check("attention " + name + names[kind], 1e-5, ROWS, query * dim, [&](Int first, Int count, float* y) {
            std::vector<Int> parts;  // of the sequences, in these rows
            for (const auto& s : SEQUENCES) {
                const Int from = std::max(s[0], first), to = std::min(s[0] + s[1], first + count);
                if (from < to) parts.insert(parts.end(), {from - first, to - from, s[2] + from - s[0], s[3]});
            }
            squawq_attention(&qkv[first * width], query, kv, dim, parts.data(), Int(parts.size()) / 4, table, &scorings[kind],
                             keys.data(), values.data(), y);
        });
    Int slots[ROWS];
    for (const auto& s : SEQUENCES)
        for (Int i = 0; i < s[1]; ++i) slots[s[0] + i] = table[s[3] + (s[2] + i) / 16] * 16 + (s[2] + i) % 16;
    for (Int i = 0; i < width; ++i) qkv[i] *= i % 2 ? 1e6f : 1e-7f;  // beyond float16 and below its normal numbers
    const squawq::Rotation rotations[] = {{0, half, 0, 0, 0, nullptr, nullptr},
                                          {0, half, 0, 0, 0, norm.data(), norm.data()},
                                          {3, half / 2, 1, 1, 1, norm.data(), norm.data()}};
    const char* kinds[] = {"", ", norms", ", neighbours"};
    for (int normed : {0, 1, 2}) {  // without norms what is stored is compared, too, and not a bit may differ
        const Int stored = normed ? 0 : kv * dim;
        const std::string what = "rotate_and_store " + name + kinds[normed];
        check(what, normed ? 1e-5 : 0, ROWS, width + 2 * stored, [&](Int first, Int count, float* y) {
            Floats rotated(&qkv[first * width], &qkv[first * width] + count * width);
            auto k = keys, v = values;
            squawq_rotate_and_store(rotated.data(), count, query, kv, dim, &cos[first * half], &sin[first * half], half,
                                    &rotations[normed], 1e-5f, slots + first, k.data(), v.data());
            for (Int i = 0; i < count; ++i) {
                const Int page = slots[first + i] / 16, place = slots[first + i] % 16;
                y = std::copy_n(&rotated[i * width], width, y);
                for (Int j = 0; j < stored; ++j) *y++ = k[(page * kv * dim + j) * 16 + place];
                for (Int j = 0; j < stored; ++j) *y++ = v[((page * kv + j / dim) * 16 + place) * dim + j % dim];
            }
        });
    }
}
}  // namespace

int main(int argc, char** argv) {
    isa = argc > 1 ? argv[1] : squawq_isa();
    if (argc > 2) jobs = std::stoi(argv[2]);
    const bool here = squawq_set_isa(isa.c_str()) == 0;
    std::printf("%s %s\n", isa.c_str(), here ? "against scalar" : "is not built in or not on this machine");
    if (!here) return 2;
    linears();
    norms_and_silu();
    attention("4/2/32", 4, 2, 32);
    attention("8/1/64", 8, 1, 64);
    attention("3/3/48", 3, 3, 48);
    return failures != 0;
}
