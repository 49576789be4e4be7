// Compares the kernels of the best instruction set here with plain C++ on random input, and rows together with rows alone.
// For machines without Python, and for another architecture under an emulator:
//
//   cmake -S . -B build/arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
//   cmake --build build/arm
//   aarch64-linux-gnu-g++ -std=c++20 -O1 -static-libstdc++ tools/check_kernels.cpp build/arm/libsquawq.so -Wl,-rpath,build/arm -o build/check
//   qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu build/check
//
// Natively the same with the machine's own compiler and without the last line's emulator.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../csrc/ops.h"

extern "C" {
const char* squawq_isa();
int squawq_set_isa(const char*);
int squawq_set_threads(int);
int squawq_int4_matmul(const float*, int64_t, const squawq::Int4*, int, float*);
int squawq_int8_matmul(const float*, int64_t, const squawq::Int8*, float*);
int squawq_dense_matmul(const float*, int64_t, const squawq::DenseWeight*, float*);
int squawq_rms_norm(float*, const float*, const float*, float, int64_t, int64_t, float*);
int squawq_silu_mul(const float*, int64_t, int64_t, float*);
int squawq_rotate_and_store(float*, int64_t, int64_t, int64_t, int64_t, const float*, const float*, const float*, const float*,
                            float, const int64_t*, uint16_t*, uint16_t*);
int squawq_attention(const float*, int64_t, int64_t, int64_t, const int64_t*, int64_t, const int32_t*, int64_t, const uint16_t*,
                     const uint16_t*, float*);
}

namespace {

using Floats = std::vector<float>;
std::mt19937 engine(0);
std::string best;
int failures = 0;

Floats normal(size_t count) {
    std::normal_distribution<float> draw;
    Floats values(count);
    for (float& v : values) v = draw(engine);
    return values;
}

template <class T>
std::vector<T> integers(size_t count, int low, int high) {
    std::uniform_int_distribution<int> draw(low, high);
    std::vector<T> values(count);
    for (T& v : values) v = T(draw(engine));
    return values;
}

void say(const std::string& name, bool good, double error) {
    std::printf("%-44s %s  %.1e\n", name.c_str(), good ? "ok " : "BAD", error);
    failures += !good;
}

// The largest difference, relative to the largest value of plain C++.
void compare(const std::string& name, const std::function<Floats()>& run) {
    squawq_set_isa("scalar");
    const Floats expected = run();
    squawq_set_isa(best.c_str());
    const Floats found = run();
    double error = 0, largest = 1e-30;
    for (size_t i = 0; i < expected.size(); ++i) {
        error = std::fmax(error, std::fabs(double(expected[i]) - found[i]));
        largest = std::fmax(largest, std::fabs(expected[i]));
    }
    say(name, error / largest < 2e-5, error / largest);
}

// matmul(x, rows) -> y: rows together and one by one must be the same bits.
void matmul(const std::string& name, int64_t in, int64_t out, const std::function<void(const float*, int64_t, float*)>& run) {
    const int64_t rows = 13;
    const Floats x = normal(rows * in);
    compare(name, [&] {
        Floats y(rows * out);
        run(x.data(), rows, y.data());
        return y;
    });
    Floats together(rows * out), alone(rows * out);
    run(x.data(), rows, together.data());
    for (int64_t i = 0; i < rows; ++i) run(x.data() + i * in, 1, alone.data() + i * out);
    say(name + ", rows alone", std::memcmp(together.data(), alone.data(), together.size() * 4) == 0, 0);
}

void linears() {
    const int64_t in = 256, out = 40, blocks = 3;
    for (int64_t group : {16, 32, 64, 128}) {
        const auto weight = integers<uint8_t>(blocks * in * 8, 0, 255), zeros = integers<uint8_t>(blocks * in / group * 16, 0, 15);
        const auto scales = integers<uint16_t>(blocks * in / group * 16, 0x2000, 0x2fff);
        const Floats bias = normal(out);
        const squawq::Int4 w{weight.data(), scales.data(), zeros.data(), bias.data(), out, in, group};
        for (int exact : {0, 1})
            matmul("int4, group " + std::to_string(group) + (exact ? ", exact" : ""), in, out,
                   [&](const float* x, int64_t m, float* y) { squawq_int4_matmul(x, m, &w, exact, y); });
    }
    const auto bytes = integers<int8_t>(blocks * in * 16, -127, 127);
    const Floats scales = normal(blocks * 16), floats = normal(blocks * in * 16);
    const squawq::Int8 w{bytes.data(), scales.data(), nullptr, out, in, 128};
    matmul("int8", in, out, [&](const float* x, int64_t m, float* y) { squawq_int8_matmul(x, m, &w, y); });
    const auto halves = integers<uint16_t>(blocks * in * 16, 0x2c00, 0x3bff);  // numbers in float16 and in bfloat16
    for (squawq::Dense type : {squawq::Dense::f32, squawq::Dense::f16, squawq::Dense::bf16}) {
        const void* data = type == squawq::Dense::f32 ? static_cast<const void*>(floats.data()) : halves.data();
        const squawq::DenseWeight d{data, nullptr, out, in, type};
        matmul("dense " + std::to_string(int(type)), in, out,
               [&](const float* x, int64_t m, float* y) { squawq_dense_matmul(x, m, &d, y); });
    }
}

void attention(int64_t query, int64_t kv, int64_t dim, int64_t window) {
    const int64_t width = (query + 2 * kv) * dim, rows = 37, pages = 8;
    const int64_t sequences[] = {0, 1, 70, 0, 1, 36, 0, 5};  // one row after 70, a prompt of 36
    const int32_t table[] = {3, 1, 7, 0, 5, 2, 6, 4};
    Floats qkv = normal(rows * width);
    const Floats cos = normal(rows * dim / 2), sin = normal(rows * dim / 2), norm = normal(dim);
    const auto keys = integers<uint16_t>(pages * kv * dim * 16, 0x2c00, 0x3bff);
    std::vector<int64_t> slots(rows);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t position = i == 0 ? 70 : i - 1, first = i == 0 ? 0 : 5;
        slots[i] = table[first + position / 16] * 16 + position % 16;
    }
    const std::string name = std::to_string(query) + "/" + std::to_string(kv) + "/" + std::to_string(dim);
    compare("rotate, store, attend " + name + " window " + std::to_string(window), [&] {
        Floats rotated = qkv, y(rows * query * dim);
        auto k = keys, v = keys;
        squawq_rotate_and_store(rotated.data(), rows, query, kv, dim, cos.data(), sin.data(), norm.data(), norm.data(), 1e-5f,
                                slots.data(), k.data(), v.data());
        squawq_attention(rotated.data(), query, kv, dim, sequences, 2, table, window, k.data(), v.data(), y.data());
        return y;
    });
}

}  // namespace

int main() {
    best = squawq_isa();
    squawq_set_threads(3);
    std::printf("%s against scalar\n", best.c_str());
    linears();
    const Floats x = normal(9 * 256), delta = normal(9 * 256), weight = normal(256);
    compare("rms_norm", [&] {
        Floats hidden = x, y(9 * 256);
        squawq_rms_norm(hidden.data(), delta.data(), weight.data(), 1e-5f, 9, 256, y.data());
        return y;
    });
    compare("silu_mul", [&] {
        Floats y(9 * 128);
        squawq_silu_mul(x.data(), 9, 128, y.data());
        return y;
    });
    for (int64_t window : {0, 7}) {
        attention(4, 2, 32, window);
        attention(8, 1, 64, window);
        attention(3, 3, 48, window);
    }
    return failures != 0;
}
