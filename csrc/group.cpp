// Each process has two slots, used in turn, and a counter. In an exchange it fills a slot, counts, and waits until all have
// counted as far. Nobody fills a slot again before all have read it: that is two exchanges later, and everybody has then
// counted the exchange between, which is after reading.
#include "group.h"

#include <sched.h>
#include <sys/wait.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "pool.h"

namespace squawq {
namespace {

constexpr int64_t LINE = 64;  // bytes of a cache line: one for `ended`, then one for each process's counter
constexpr int64_t PAGE = 4096;
constexpr int64_t PIECE = 1 << 14;  // floats that a thread adds at a time
constexpr int SPINS = 4000, YIELDS = 2000, SLEEPS = 100;  // SLEEPS: of 50 microseconds, between two looks at children

using Counter = std::atomic<uint64_t>;
static_assert(Counter::is_always_lock_free, "counters are shared by processes");

int64_t control_bytes(int64_t size) { return (LINE * (1 + size) + PAGE - 1) / PAGE * PAGE; }

Counter& line(const Group& group, int64_t index) { return *reinterpret_cast<Counter*>(group.shared + LINE * index); }

float* slot(const Group& group, int64_t rank) {
    const int64_t index = 2 * rank + int64_t(group.exchanges & 1);
    return reinterpret_cast<float*>(group.shared + control_bytes(group.size)) + index * group.capacity;
}

// Whether a child has ended. Its exit code stays for whoever waits for it; if somebody has, there is no such child.
bool child_has_ended(const Group& group) {
    for (int64_t i = 0; i < group.count; ++i) {
        siginfo_t info{};
        if (waitid(P_PID, id_t(group.children[i]), &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid != 0) return true;
    }
    return false;
}

// Counts this process's slot as filled, and waits for all others'.
void meet(Group& group) {
    const uint64_t wanted = group.exchanges + 1;
    line(group, 1 + group.rank).store(wanted, std::memory_order_release);
    for (int64_t rank = 0; rank < group.size; ++rank) {
        for (int64_t turn = 0; line(group, 1 + rank).load(std::memory_order_acquire) < wanted; ++turn) {
            if (line(group, 0).load(std::memory_order_relaxed) != 0) throw GroupEnded{};
            if (turn < SPINS) {
                relax();
            } else if (turn < SPINS + YIELDS) {
                sched_yield();
            } else {
                if ((turn - SPINS - YIELDS) % SLEEPS == 0 && child_has_ended(group)) end_group(group);
                const timespec pause{0, 50'000};
                nanosleep(&pause, nullptr);
            }
        }
    }
}

}  // namespace

int64_t group_bytes(int64_t size, int64_t capacity) {
    return control_bytes(size) + 2 * size * capacity * int64_t(sizeof(float));
}

void all_reduce(Group& group, float* x, int64_t n) {
    for (int64_t done = 0; done < n; done += group.capacity) {
        const int64_t count = std::min(group.capacity, n - done);
        float* to = x + done;
        std::memcpy(slot(group, group.rank), to, sizeof(float) * size_t(count));
        meet(group);
        parallel_for((count + PIECE - 1) / PIECE, [&, to](int64_t piece) {
            const int64_t begin = piece * PIECE, end = std::min(count, begin + PIECE);
            const float* first = slot(group, 0);
            for (int64_t i = begin; i < end; ++i) to[i] = first[i];
            for (int64_t rank = 1; rank < group.size; ++rank) {
                const float* next = slot(group, rank);
                for (int64_t i = begin; i < end; ++i) to[i] += next[i];
            }
        });
        ++group.exchanges;
    }
}

void gather(Group& group, const float* x, int64_t rows, const int64_t* widths, float* y) {
    const int64_t whole = std::accumulate(widths, widths + group.size, int64_t(0));
    const int64_t widest = *std::max_element(widths, widths + group.size);
    const int64_t piece = std::max<int64_t>(1, std::min(group.capacity, widest)), step = group.capacity / piece;
    const auto bytes = [=](int64_t rank, int64_t left) {  // of a row's piece that begins at column `left`
        return sizeof(float) * size_t(std::clamp<int64_t>(widths[rank] - left, 0, piece));
    };
    for (int64_t left = 0; left < widest; left += piece) {
        for (int64_t begin = 0; begin < rows; begin += step) {
            const int64_t count = std::min(step, rows - begin), own = widths[group.rank];
            for (int64_t row = 0; row < count; ++row)
                std::memcpy(slot(group, group.rank) + row * piece, x + (begin + row) * own + left, bytes(group.rank, left));
            meet(group);
            if (group.rank == 0) {
                int64_t column = left;
                for (int64_t rank = 0; rank < group.size; column += widths[rank++])
                    for (int64_t row = 0; row < count; ++row)
                        std::memcpy(y + (begin + row) * whole + column, slot(group, rank) + row * piece, bytes(rank, left));
            }
            ++group.exchanges;
        }
    }
}

void end_group(const Group& group) { line(group, 0).store(1, std::memory_order_relaxed); }

}  // namespace squawq
