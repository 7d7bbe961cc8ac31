// Sums a buffer over the processes of one machine, through memory that they share.
//
// The memory: a counter of arrivals on a cache line of its own, a buffer for each rank, and one for
// the sum. Every rank writes its values into its buffer; when all have, each sums its share of the
// elements over the buffers, in the order of the ranks; when all have, each copies the sum. Both
// waits are for the same counter. A rank's next values come after the second wait, when nobody reads
// the last ones any more, and the next sum after the next first one, when everybody has copied.

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t kLine = 64;
// A thread that slept is awake some 50 us after the last arrival. Ranks seldom come so close, and
// one that spins for longer takes a core from those that still compute.
constexpr long kSpinNanoseconds = 200'000;
// Between two looks at the other ranks' lives. torchrun, which looks every 100 ms, ends those that
// are left: by then they must have seen who was lost, or they would take it for a preemption.
constexpr long kLookNanoseconds = 5'000'000;
constexpr int kTimedOut = -1;

using Counter = std::atomic<uint32_t>;
static_assert(sizeof(Counter) == sizeof(uint32_t) && Counter::is_always_lock_free);

struct Waiting {
    Counter* arrivals;
    const int* pidfds;  // of all ranks; that of this rank is never ready
    int ranks;
    double seconds;
};

double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// 1 + the rank of a process that has ended; 0: all live.
int ended(const Waiting& waiting) {
    for (int rank = 0; rank < waiting.ranks; ++rank) {
        pollfd one{waiting.pidfds[rank], POLLIN, 0};
        if (poll(&one, 1, 0) > 0) return 1 + rank;
    }
    return 0;
}

// Report this rank's arrival and wait until `target` have been reported: 0, or what went wrong.
int meet(const Waiting& waiting, uint32_t target) {
    auto* word = reinterpret_cast<uint32_t*>(waiting.arrivals);
    const auto there = [&](uint32_t seen) { return static_cast<int32_t>(seen - target) >= 0; };
    if (there(waiting.arrivals->fetch_add(1, std::memory_order_acq_rel) + 1)) {
        syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
        return 0;
    }
    const double start = now();
    do {
        for (int i = 0; i < 64; ++i) {
            if (there(waiting.arrivals->load(std::memory_order_acquire))) return 0;
            relax();
        }
    } while (now() - start < 1e-9 * kSpinNanoseconds);
    while (true) {
        const uint32_t seen = waiting.arrivals->load(std::memory_order_acquire);
        if (there(seen)) return 0;
        const timespec look{0, kLookNanoseconds};
        const long woken = syscall(SYS_futex, word, FUTEX_WAIT, seen, &look, nullptr, 0);
        if (woken == 0 || errno == EAGAIN) continue;
        if (const int gone = ended(waiting)) {
            // It may have arrived and then ended.
            return there(waiting.arrivals->load(std::memory_order_acquire)) ? 0 : gone;
        }
        if (now() - start > waiting.seconds) return kTimedOut;
    }
}

template <typename T>
int sum(char* memory, T* values, int64_t count, int rank, uint32_t call, const Waiting& waiting) {
    const int ranks = waiting.ranks;
    const int64_t stride = (count * sizeof(T) + kLine - 1) / kLine * kLine;
    const auto buffer = [&](int of) { return reinterpret_cast<T*>(memory + kLine + of * stride); };
    const uint32_t before = 2 * call * ranks;
    std::memcpy(buffer(rank), values, count * sizeof(T));
    if (const int failed = meet(waiting, before + ranks)) return failed;
    const int64_t lines = stride / kLine, each = kLine / sizeof(T);
    const int64_t begin = lines * rank / ranks * each;
    const int64_t end = rank + 1 == ranks ? count : lines * (rank + 1) / ranks * each;
    T* total = buffer(ranks);
    std::memcpy(total + begin, buffer(0) + begin, (end - begin) * sizeof(T));
    for (int other = 1; other < ranks; ++other) {
        const T* terms = buffer(other);
        for (int64_t i = begin; i < end; ++i) total[i] += terms[i];
    }
    if (const int failed = meet(waiting, before + 2 * ranks)) return failed;
    std::memcpy(values, total, count * sizeof(T));
    return 0;
}

}  // namespace

// call: how many sums came before, modulo 2^32. Returns 0; 1 + the rank that has ended; -1 after
// `seconds`.
extern "C" int shared_sum(void* memory, void* values, int64_t count, int is_double, int rank,
                          int ranks, uint32_t call, const int* pidfds, double seconds) {
    const Waiting waiting{static_cast<Counter*>(memory), pidfds, ranks, seconds};
    auto* bytes = static_cast<char*>(memory);
    if (is_double) return sum(bytes, static_cast<double*>(values), count, rank, call, waiting);
    return sum(bytes, static_cast<float*>(values), count, rank, call, waiting);
}
