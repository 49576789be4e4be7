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
#include "check_kernels.h"

namespace {
void product(const std::string& what, Int in, Int out, Kind kind, const void* weight) {
    check_product(what, 1e-5, in, out, [=](In x, Int m, float* y) { squawq_matmul(x, m, kind, weight, y); });
}

// An int4 weight with random contents.
struct RandomInt4 {
    std::vector<uint8_t> weight, zeros;
    std::vector<uint16_t> steps;
    squawq::Int4 w;

    RandomInt4(Int out, Int in, Int group, const float* bias = nullptr) {
        const Int rows = squawq::ceil_div(out, 16) * 16, scaled = rows * in / group;
        weight = random<uint8_t>(rows * in / 2, Integers(0, 255)), zeros = random<uint8_t>(scaled, Integers(0, 15));
        steps = random<uint16_t>(scaled, Integers(0x2000, 0x2fff));
        w = {weight.data(), steps.data(), zeros.data(), bias, out, in, group};
    }
};

void linears() {
    const Int out = 200, blocks = 13;
    const Floats bias = normal(out), scales = normal(blocks * 16), full = normal(blocks * 256 * 16);
    for (Int group : {16, 32, 64, 128}) {
        const Int in = group == 128 ? 2048 : 256;  // 17 * 2048: quantized in parallel
        const RandomInt4 weight(out, in, group, bias.data());
        for (int exact : {0, 1})
            product("int4, group " + std::to_string(group) + (exact ? ", exact" : ", int8 input"), in, out,
                    exact ? Kind::int4_exact : Kind::int4, &weight.w);
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

// Three of six experts for each row, whose outputs are as many as its inputs.
void mixture(const std::string& what, double tolerance, Int hidden, Int inner, squawq::Matrix gate_up, squawq::Matrix down) {
    using squawq::Activation, squawq::Scores, squawq::Shared;
    const Int count = 6;
    const Floats bias = normal(count), router = normal(16 * hidden, 1 / std::sqrt(float(hidden)));
    const squawq::Routing routings[] = {{count, 3, 1, 1, 1, Scores::softmax, 1, nullptr},
                                        {count, 3, 0, 1, 1, Scores::softmax, 1, nullptr},
                                        {count, 3, 1, 3, 2, Scores::sigmoid, 2.5f, bias.data()}};
    const char* names[] = {"", ", shared gated", ", shared, grouped"};
    for (int kind : {0, 1, 2}) {
        const Shared shared = std::vector{Shared::none, Shared::gated, Shared::added}[kind];
        const squawq::DenseWeight logits{router.data(), nullptr, count + (shared == Shared::gated), hidden, squawq::Dense::f32};
        const squawq::Experts layer{routings[kind], inner, kind == 1 ? Activation::gelu_tanh : Activation::silu,
                                    shared, {Kind::dense, &logits}, gate_up, down};
        check_product("experts " + what + names[kind], tolerance, hidden, hidden, [&](In x, Int m, float* y) {
            std::copy_n(x, m * hidden, y);  // the shared expert's output, which is overwritten where there is none
            squawq_experts(&layer, x, m, hidden, y);
        });
    }
}

void experts() {
    for (Int group : {16, 32, 64, 128}) {
        const Int hidden = group == 128 ? 2048 : 128, inner = group == 128 ? 128 : 192;  // 17 * 2048: gathered in parallel
        const RandomInt4 gate_up(6 * 2 * inner, hidden, group), down(6 * hidden, inner, group);
        // Where exp differs in its last bit, an inner feature can be rounded to the next integer.
        const std::string what = "int4, group " + std::to_string(group);
        mixture(what, 1e-2, hidden, inner, {Kind::int4, &gate_up.w}, {Kind::int4, &down.w});
        if (group == 64) mixture(what + ", exact", 1e-5, hidden, inner, {Kind::int4_exact, &gate_up.w}, {Kind::int4_exact, &down.w});
    }
    const Int hidden = 128, inner = 80;
    const auto half = halves(6 * 2 * inner * hidden);
    for (int type : {1, 2}) {
        const squawq::DenseWeight gate_up{half.data(), nullptr, 6 * 2 * inner, hidden, squawq::Dense(type)};
        const squawq::DenseWeight down{half.data(), nullptr, 6 * hidden, inner, squawq::Dense(type)};
        mixture(type == 1 ? "f16" : "bf16", 1e-5, hidden, inner, {Kind::dense, &gate_up}, {Kind::dense, &down});
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
    check("output_gate", 1e-5, 17, n, [&](Int first, Int count, float* y) {
        std::copy_n(&delta[first * n], count * n, y);
        squawq_output_gate(y, &x[first * n], count * n);
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

// The sequences above; all but the second, which is at its start, continue from a random state.
void delta_rule(const std::string& name, Int key_heads, Int heads, Int key_dim, Int value_dim, Int kernel) {
    const Int values = heads * value_dim, channels = 2 * key_heads * key_dim + values;
    const Int width = channels + values, sequences = std::size(SEQUENCES);
    const Floats convolution = normal(kernel * channels, 0.5f), norm = normal(value_dim), bias = normal(heads);
    const Floats rate = random<float>(heads, std::uniform_real_distribution<float>(-2, 0));
    const Floats wide = normal(ROWS * width), gates = normal(ROWS * 2 * heads, 2);
    const Floats inputs = normal(sequences * (kernel - 1) * channels);
    const Floats memory = normal(sequences * heads * key_dim * value_dim);
    check("delta_rule " + name, 1e-4, ROWS, values, [&](Int first, Int count, float* y) {
        Floats before = inputs, remembered = memory;
        const squawq::DeltaRule rule{key_heads,   heads,       key_dim,     value_dim,     kernel, convolution.data(),
                                     rate.data(), bias.data(), norm.data(), before.data(), remembered.data()};
        const auto run = [&](Int from, Int rows, const std::vector<Int>& parts, const std::vector<Int>& places, float* to) {
            Floats x(&wide[from * width], &wide[from * width] + rows * width);
            Floats opened(&gates[from * 2 * heads], &gates[from * 2 * heads] + rows * 2 * heads);
            squawq_gated_delta_rule(x.data(), opened.data(), &rule, parts.data(), places.data(), Int(places.size()), 1e-6f, to);
        };
        std::vector<Int> parts, places;
        for (Int i = 0; i < sequences; ++i) {
            const auto& s = SEQUENCES[i];
            const Int from = std::max(s[0], first), to = std::min(s[0] + s[1], first + count), place = sequences - 1 - i;
            if (from >= to) continue;
            parts.insert(parts.end(), {from - first, to - from, s[2] + from - s[0], 0}), places.push_back(place);
            Floats unused((from - s[0]) * values);  // of the rows before, which lead to the state at hand
            if (from > s[0]) run(s[0], from - s[0], {0, from - s[0], s[2], 0}, {place}, unused.data());
        }
        run(first, count, parts, places, y);
    });
}
}  // namespace

int main(int argc, char** argv) {
    isa = argc > 1 ? argv[1] : squawq_isa();
    if (argc > 2) jobs = std::stoi(argv[2]);
    const bool here = squawq_set_isa(isa.c_str()) == 0;
    std::printf("%s %s\n", isa.c_str(), here ? "against scalar" : "is not built in or not on this machine");
    if (!here) return 2;
    linears();
    experts();
    norms_and_silu();
    attention("4/2/32", 4, 2, 32);
    attention("8/1/64", 8, 1, 64);
    attention("3/3/48", 3, 3, 48);
    delta_rule("2/4/32/48", 2, 4, 32, 48, 4);
    delta_rule("1/3/64/32", 1, 3, 64, 32, 2);
    delta_rule("3/3/48/16", 3, 3, 48, 16, 16);
    return failures != 0;
}
