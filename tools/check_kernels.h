// What tools/check_kernels.cpp is written with: the functions of the library, random numbers, and one check for all of them.
#pragma once
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
int squawq_experts(const squawq::Experts*, In, Int, Int, float*);
int squawq_activation_mul(In, Int, Int, Int, float*);
int squawq_soft_cap(float*, Int, float);
int squawq_rotate_and_store(float*, Int, Int, Int, Int, In, In, Int, const squawq::Rotation*, float, const Int*, uint16_t*,
                            uint16_t*);
int squawq_attention(In, Int, Int, Int, const Int*, Int, const int32_t*, const squawq::Scoring*, const uint16_t*,
                     const uint16_t*, float*);
int squawq_output_gate(float*, In, Int);
int squawq_gated_delta_rule(float*, float*, const squawq::DeltaRule*, const Int*, const Int*, Int, float, float*);
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

// The same for y = multiply(x [rows][in]) [rows][out], and that a NaN shows in all of its row and only there.
void check_product(const std::string& what, double tolerance, Int in, Int out, const std::function<void(In, Int, float*)>& multiply) {
    Floats x = normal(17 * in), before(17 * out), after(17 * out);
    check(what, tolerance, 17, out, [&](Int first, Int count, float* y) { multiply(&x[first * in], count, y); });
    multiply(x.data(), 17, before.data());
    x[4 * in + 5] = NAN;
    multiply(x.data(), 17, after.data());
    for (Int i = 0; i < 17 * out; ++i)
        if (i / out == 4 ? !std::isnan(after[i]) : after[i] != before[i]) return say(false, what + ", NaN", NAN, "NOT the same");
}
}  // namespace
