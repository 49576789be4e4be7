// A job is a ticket: epoch and next unit in one word. Threads claim units by compare-and-swap, so the caller never waits
// for a worker that is asleep or descheduled, only for units that were claimed. After fork() the child has no workers
// and runs all units itself. Workers spin for some microseconds (between two operations of a step),
// then sleep, so that an idle process uses no CPU and other libraries' threads find the cores free.
#include "pool.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>
#include <thread>
#include <vector>

namespace squawq {
namespace {

constexpr int SPINS = 4000;  // about 50 to 100 microseconds
constexpr uint64_t INDEX = 0xffffffffu;

struct Pool {
    std::atomic<uint64_t> ticket{0};  // epoch << 32 | next unit
    std::atomic<uint32_t> epoch{0};   // sleeping workers wait on this
    std::atomic<int64_t> units{0}, done{0};
    std::atomic<Unit> unit{nullptr};
    std::atomic<void*> context{nullptr};
    std::atomic<bool> stop{false};
    std::vector<std::thread> workers;
};

Pool& pool() {
    static Pool* the = new Pool;  // never destroyed: workers may outlive static destruction
    return *the;
}

// Claims and runs units until the current job has none left.
void work(Pool& p) {
    uint64_t seen = p.ticket.load(std::memory_order_acquire);
    for (;;) {
        const int64_t index = int64_t(seen & INDEX);
        const Unit unit = p.unit.load(std::memory_order_relaxed);
        void* context = p.context.load(std::memory_order_relaxed);
        if (index >= p.units.load(std::memory_order_relaxed)) return;
        // On success the job is still open, so the fields read above belong to it.
        if (!p.ticket.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
        unit(context, index);
        p.done.fetch_add(1, std::memory_order_release);
        seen = p.ticket.load(std::memory_order_acquire);
    }
}

void worker(Pool& p) {
    uint32_t last = p.epoch.load(std::memory_order_acquire);
    while (!p.stop.load(std::memory_order_acquire)) {
        work(p);
        uint32_t now = last;
        for (int spin = 0; spin < SPINS && now == last; ++spin) {
            relax();
            now = p.epoch.load(std::memory_order_acquire);
        }
        if (now == last) {
            p.epoch.wait(last);
            now = p.epoch.load(std::memory_order_acquire);
        }
        last = now;
    }
}

// What a compiler calls for `#pragma omp parallel` (libgomp's ABI, which LLVM's and Intel's libraries have as well): runs
// function(data) on `count` threads, the caller among them, and returns when all have ended.
using OpenMP = void (*)(void (*function)(void*), void* data, unsigned count, unsigned flags);
OpenMP openmp = nullptr;  // used instead of the pool's workers
int openmp_count = 0;

struct Shared {
    std::atomic<int64_t> next{0};
    int64_t units;
    Unit unit;
    void* context;
};

void share(void* data) {
    Shared& job = *static_cast<Shared*>(data);
    for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.units;) job.unit(job.context, i);
}

}  // namespace

void parallel(int64_t units, Unit unit, void* context) {
    Pool& p = pool();
    if (openmp != nullptr && units > 1) {
        Shared job{.units = units, .unit = unit, .context = context};
        openmp(share, &job, unsigned(openmp_count), 0);
        return;
    }
    if (units <= 1 || p.workers.empty()) {
        for (int64_t i = 0; i < units; ++i) unit(context, i);
        return;
    }
    // Close the old job for late readers before changing its fields, then open the new one.
    p.units.store(0, std::memory_order_relaxed);
    const uint32_t epoch = p.epoch.load(std::memory_order_relaxed) + 1;
    p.ticket.store(uint64_t(epoch) << 32 | INDEX, std::memory_order_seq_cst);
    std::atomic_thread_fence(std::memory_order_seq_cst);  // the stores to the fields must not be reordered before closing
    p.done.store(0, std::memory_order_relaxed);
    p.unit.store(unit, std::memory_order_relaxed);
    p.context.store(context, std::memory_order_relaxed);
    p.units.store(units, std::memory_order_relaxed);
    p.ticket.store(uint64_t(epoch) << 32, std::memory_order_seq_cst);
    p.epoch.store(epoch, std::memory_order_seq_cst);
    p.epoch.notify_all();
    work(p);
    for (int spin = 0; p.done.load(std::memory_order_acquire) != units; ++spin) {
        if (spin < SPINS) relax();
        else std::this_thread::yield();
    }
}

void set_threads(int threads) {
    Pool& p = pool();
    if (threads == squawq::threads() && openmp == nullptr) return;
    openmp = nullptr;
    p.stop.store(true, std::memory_order_release);
    p.epoch.fetch_add(1);
    p.epoch.notify_all();
    for (std::thread& t : p.workers) t.join();
    p.workers.clear();
    p.stop.store(false);
    try {
        for (int i = 1; i < threads; ++i) p.workers.emplace_back([&p] { worker(p); });
    } catch (const std::exception&) {  // at a limit on threads or memory, use those that started
    }
}

bool use_openmp(int threads) {
    const auto found = reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (found == nullptr) return false;
    set_threads(1);
    openmp = threads > 1 ? found : nullptr;
    openmp_count = threads;
    return true;
}

int threads() { return openmp != nullptr ? openmp_count : int(pool().workers.size()) + 1; }

void* scratch(int slot, size_t bytes) {
    static void* memory[SLOTS] = {};
    static size_t size[SLOTS] = {};
    if (size[slot] < bytes) {
        std::free(memory[slot]);
        size[slot] = 0;
        memory[slot] = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
        if (memory[slot] == nullptr) throw std::bad_alloc();
        size[slot] = bytes;
    }
    return memory[slot];
}

}  // namespace squawq
