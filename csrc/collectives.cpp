// Collectives through shared memory. A rank writes its part into its slot, counts up and waits until all the others
// have counted as far; then it reads theirs. Slots are double, so that one wait for each piece is enough: who writes
// piece n + 2 has seen that all have published n + 1, that is, have read n. Between stages there is a ring of pieces
// for each pair of ranks. Nobody holds a lock, so a rank that is killed leaves nothing locked: the others wait until
// the region is aborted.
#include "collectives.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "thread_pool.h"

namespace {
constexpr int64_t kPiece = 128 << 10;  // bytes that are exchanged at once: two slots of two ranks fit into an L2 cache
constexpr int64_t kMagic = 0x31304c4c4f434c52;
constexpr uint32_t kFirst = (uint32_t)-1000;  // of every counter: that they wrap around shows early, not after a day
constexpr int64_t kSpinNs = 10'000, kYieldNs = 200'000;  // then a wait yields its processor, then it sleeps
constexpr int64_t kSleepNs = 20'000'000;  // and looks again: who should wake it may have been killed before it did

struct counter {  // counts up; one rank writes it, others wait for it
    std::atomic<uint32_t> value, sleepers;
    static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(value) == 4, "a value is a futex");

    bool has_reached(uint32_t target) const {
        return (int32_t)(value.load(std::memory_order_acquire) - target) >= 0;
    }
    void set(uint32_t next) {
        value.store(next);
        if (sleepers.load() > 0) wake();
    }
    void wake() {
#if defined(__linux__)
        syscall(SYS_futex, &value, FUTEX_WAKE, 1 << 30, nullptr, nullptr, 0);
#endif
    }
    // Until the next set or abort, but for kSleepNs at most.
    void sleep(uint32_t target, const std::atomic<uint32_t> &aborted) {
#if defined(__linux__)
        sleepers.fetch_add(1);
        const uint32_t seen = value.load();
        const timespec limit = {0, kSleepNs};
        if (!has_reached(target) && aborted.load() == 0) syscall(SYS_futex, &value, FUTEX_WAIT, seen, &limit, nullptr, 0);
        sleepers.fetch_sub(1);
#else
        (void)target, (void)aborted;
        std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
    }
};

// What a piece is part of, so that ranks which do not do the same fail instead of computing nonsense.
struct note {
    int64_t op, amount, rows;
    bool operator!=(const note &other) const { return op != other.op || amount != other.amount || rows != other.rows; }
};

struct alignas(128) header {
    int64_t magic;
    int32_t tp_size, pp_size;
    int64_t message_bytes;
    alignas(128) std::atomic<uint32_t> aborted;
};

struct alignas(128) seat {  // one for each rank; what the others read of it is one cache line
    counter published;
    note notes[2];
};
static_assert(sizeof(counter) + 2 * sizeof(note) <= 64);

struct ring {  // one for each tp rank between two stages
    alignas(128) counter written;
    alignas(128) counter read;
};

struct alignas(128) ring_piece {
    int64_t message_bytes;
    alignas(128) char bytes[kPiece];
};

// Where everything lies in the region: header, seats, slots, rings with their pieces.
struct layout {
    int64_t tp_size, pp_size, message_bytes;

    int64_t num_slots() const { return tp_size > 1 ? 2 * tp_size * pp_size : 0; }
    int64_t num_rings() const { return tp_size * (pp_size - 1); }
    int64_t ring_pieces() const {  // a power of two: their numbers wrap around
        int64_t pieces = 4;
        while (pieces < 2 * ((message_bytes + kPiece - 1) / kPiece)) pieces *= 2;
        return pieces;
    }
    int64_t seats_at() const { return sizeof(header); }
    int64_t slots_at() const { return seats_at() + tp_size * pp_size * (int64_t)sizeof(seat); }
    int64_t rings_at() const { return slots_at() + num_slots() * kPiece; }
    seat *seats(void *region) const { return (seat *)((char *)region + seats_at()); }
    ring *ring_of(void *region, int64_t i) const { return (ring *)((char *)region + rings_at() + i * ring_bytes()); }
    int64_t ring_bytes() const { return (int64_t)sizeof(ring) + ring_pieces() * (int64_t)sizeof(ring_piece); }
    int64_t num_bytes() const { return rings_at() + num_rings() * ring_bytes(); }
};

// out = residual + (parts[0] + parts[1] + ...), a block of columns at a time so that the sums stay in the L1 cache.
template <class T> void add_parts(const T *const *parts, int64_t num_parts, const T *residual, T *out, int64_t count) {
    constexpr int64_t kBlock = 512;
    T sums[kBlock];
    for (int64_t at = 0; at < count; at += kBlock) {
        const int64_t n = std::min(kBlock, count - at);
        const T *first = parts[0] + at, *second = parts[1] + at;
        for (int64_t i = 0; i < n; i++) sums[i] = first[i] + second[i];
        for (int64_t r = 2; r < num_parts; r++) {
            const T *part = parts[r] + at;
            for (int64_t i = 0; i < n; i++) sums[i] += part[i];
        }
        if (residual)
            for (int64_t i = 0; i < n; i++) out[at + i] = residual[at + i] + sums[i];
        else
            std::memcpy(out + at, sums, (size_t)n * sizeof(T));
    }
}
}  // namespace

struct rl_rank {
    enum op { kAllReduce, kAllGather, kSend, kReceive, kNumOps };

    rl_rank(void *region, const layout &where, int64_t tp_rank, int64_t pp_rank)
        : base_((char *)region), header_(*(header *)region), where_(where), tp_rank_(tp_rank), pp_rank_(pp_rank),
          parts_((size_t)where.tp_size) {
        // With more ranks than processors, a spinning one keeps the one that it waits for from running.
        const bool crowded = where.tp_size * where.pp_size > (int64_t)std::thread::hardware_concurrency();
        spin_ns_ = crowded ? 0 : kSpinNs;
    }

    template <class T> int32_t all_reduce(const T *x, const T *residual, T *out, int64_t count) {
        return timed(kAllReduce, count * (int64_t)sizeof(T), [&]() -> int32_t {
            const int64_t step = kPiece / (int64_t)sizeof(T);
            if (where_.tp_size == 1) return RL_MISMATCH;
            for (int64_t at = 0; at < count; at += step) {
                const int64_t n = std::min(step, count - at);
                const note what = {kAllReduce, count * (int64_t)sizeof(T), at};
                if (const int32_t status = publish(x + at, n * (int64_t)sizeof(T), what)) return status;
                for (int64_t r = 0; r < where_.tp_size; r++) {
                    if (note_of(r) != what) return RL_MISMATCH;
                    parts_[(size_t)r] = r == tp_rank_ ? (const void *)(x + at) : slot_of(r);
                }
                add_parts((const T *const *)parts_.data(), where_.tp_size, residual ? residual + at : nullptr, out + at, n);
            }
            return RL_OK;
        });
    }

    // The part of a rank is a stream of bytes, whatever its rows are: pieces of it need not end with a row.
    int32_t all_gather(const char *x, int64_t rows, int64_t row_bytes, char *out, int64_t out_row_bytes) {
        return timed(kAllGather, rows * out_row_bytes, [&]() -> int32_t {
            int64_t longest = rows * row_bytes;  // of all ranks, as soon as they have said it
            for (int64_t at = 0; at < longest || at == 0; at += kPiece) {
                const int64_t n = std::max<int64_t>(0, std::min(kPiece, rows * row_bytes - at));
                if (const int32_t status = publish(x + at, n, {kAllGather, row_bytes, rows})) return status;
                int64_t begin = 0;
                for (int64_t r = 0; r < where_.tp_size; r++) {
                    const note &said = note_of(r);
                    if (said.op != kAllGather || said.rows != rows || begin + said.amount > out_row_bytes)
                        return RL_MISMATCH;
                    const int64_t bytes = rows * said.amount;
                    longest = std::max(longest, bytes);
                    const char *from = r == tp_rank_ ? x + at : (const char *)slot_of(r);
                    put_rows(from, at, std::min(kPiece, bytes - at), said.amount, out + begin, out_row_bytes);
                    begin += said.amount;
                }
                if (begin != out_row_bytes) return RL_MISMATCH;
            }
            return RL_OK;
        });
    }

    int32_t send(const char *x, int64_t bytes) {
        return timed(kSend, bytes, [&]() -> int32_t {
            ring *to = ring_after(pp_rank_);
            if (!to) return RL_MISMATCH;
            for (int64_t at = 0; at < bytes; at += kPiece) {
                if (!wait_for(to->read, num_sent_ + 1 - (uint32_t)where_.ring_pieces())) return RL_ABORTED;
                ring_piece &piece = piece_of(to, num_sent_);
                piece.message_bytes = bytes;
                std::memcpy(piece.bytes, x + at, (size_t)std::min(kPiece, bytes - at));
                to->written.set(++num_sent_);
            }
            return RL_OK;
        });
    }

    int32_t receive(char *x, int64_t bytes) {
        return timed(kReceive, bytes, [&]() -> int32_t {
            ring *from = ring_after(pp_rank_ - 1);
            if (!from) return RL_MISMATCH;
            for (int64_t at = 0; at < bytes; at += kPiece) {
                if (!wait_for(from->written, num_received_ + 1)) return RL_ABORTED;
                const ring_piece &piece = piece_of(from, num_received_);
                if (piece.message_bytes != bytes) return RL_MISMATCH;
                std::memcpy(x + at, piece.bytes, (size_t)std::min(kPiece, bytes - at));
                from->read.set(++num_received_);
            }
            return RL_OK;
        });
    }

    rl_traffic traffic[kNumOps] = {};

private:
    seat &seat_of(int64_t tp_rank) const { return where_.seats(base_)[pp_rank_ * where_.tp_size + tp_rank]; }
    const note &note_of(int64_t tp_rank) const { return seat_of(tp_rank).notes[num_published_ & 1]; }
    void *slot_of(int64_t tp_rank) const {
        const int64_t pair = pp_rank_ * where_.tp_size + tp_rank;
        return base_ + where_.slots_at() + (2 * pair + (num_published_ & 1)) * kPiece;
    }
    ring *ring_after(int64_t stage) const {
        if (stage < 0 || stage + 1 >= where_.pp_size) return nullptr;
        return where_.ring_of(base_, stage * where_.tp_size + tp_rank_);
    }
    ring_piece &piece_of(ring *r, uint32_t number) const {
        return ((ring_piece *)(r + 1))[number % (uint64_t)where_.ring_pieces()];
    }

    template <class F> int32_t timed(op which, int64_t bytes, const F &fn) {
        const int64_t begin = Timeline::now();
        wait_ns_ = 0;
        const int32_t status = fn();
        rl_traffic &t = traffic[which];
        t.calls++, t.bytes += bytes, t.ns += Timeline::now() - begin, t.wait_ns += wait_ns_;
        return status;
    }

    // This rank's part of a piece, for the others; then wait until they all have published theirs.
    int32_t publish(const void *from, int64_t bytes, const note &what) {
        num_published_++;
        if (where_.tp_size > 1 && bytes > 0) std::memcpy(slot_of(tp_rank_), from, (size_t)bytes);
        seat_of(tp_rank_).notes[num_published_ & 1] = what;
        seat_of(tp_rank_).published.set(num_published_);
        for (int64_t r = 0; r < where_.tp_size; r++)
            if (r != tp_rank_ && !wait_for(seat_of(r).published, num_published_)) return RL_ABORTED;
        return RL_OK;
    }

    bool is_aborted() const { return header_.aborted.load(std::memory_order_relaxed) != 0; }

    // Until c has reached target; false: the region was aborted.
    bool wait_for(counter &c, uint32_t target) {
        if (c.has_reached(target)) return !is_aborted();
        const int64_t begin = Timeline::now();
        int64_t waited = 0;
        while (!c.has_reached(target) && !is_aborted()) {
            if (waited < spin_ns_)
                for (int i = 0; i < 16 && !c.has_reached(target); i++) ThreadPool::pause();
            else if (waited < kYieldNs)
                std::this_thread::yield();
            else
                c.sleep(target, header_.aborted);
            waited = Timeline::now() - begin;
        }
        wait_ns_ += waited;
        return !is_aborted();
    }

    // Bytes at..at+count of rows of `row_bytes`, to their places in wider rows.
    static void put_rows(const char *from, int64_t at, int64_t count, int64_t row_bytes, char *out, int64_t out_row_bytes) {
        while (count > 0) {
            const int64_t row = at / row_bytes, column = at % row_bytes, n = std::min(count, row_bytes - column);
            std::memcpy(out + row * out_row_bytes + column, from, (size_t)n);
            from += n, at += n, count -= n;
        }
    }

    char *base_;
    header &header_;
    const layout where_;
    const int64_t tp_rank_, pp_rank_;
    int64_t spin_ns_ = 0, wait_ns_ = 0;
    uint32_t num_published_ = kFirst, num_sent_ = kFirst, num_received_ = kFirst;  // pieces
    std::vector<const void *> parts_;
};

extern "C" {

int64_t rl_region_bytes(int32_t tp_size, int32_t pp_size, int64_t message_bytes) {
    return layout{tp_size, pp_size, message_bytes}.num_bytes();
}

void rl_region_init(void *region, int32_t tp_size, int32_t pp_size, int64_t message_bytes) {
    header *h = new (region) header{};
    h->tp_size = tp_size, h->pp_size = pp_size, h->message_bytes = message_bytes;
    const layout where = {tp_size, pp_size, message_bytes};
    for (int64_t i = 0; i < where.tp_size * where.pp_size; i++) where.seats(region)[i].published.value = kFirst;
    for (int64_t i = 0; i < where.num_rings(); i++) {
        where.ring_of(region, i)->written.value = kFirst;
        where.ring_of(region, i)->read.value = kFirst;
    }
    h->magic = kMagic;
}

void rl_region_abort(void *region) {
    header &h = *(header *)region;
    const layout where = {h.tp_size, h.pp_size, h.message_bytes};
    h.aborted.store(1);
    for (int64_t i = 0; i < where.tp_size * where.pp_size; i++) where.seats(region)[i].published.wake();
    for (int64_t i = 0; i < where.num_rings(); i++) {
        where.ring_of(region, i)->written.wake();
        where.ring_of(region, i)->read.wake();
    }
}

rl_rank *rl_join(void *region, int64_t bytes, int32_t tp_size, int32_t pp_size, int32_t tp_rank, int32_t pp_rank) {
    const header &h = *(const header *)region;
    if (bytes < (int64_t)sizeof(header) || h.magic != kMagic || h.tp_size != tp_size || h.pp_size != pp_size) return nullptr;
    const layout where = {tp_size, pp_size, h.message_bytes};
    if (bytes < where.num_bytes() || tp_rank < 0 || tp_rank >= tp_size || pp_rank < 0 || pp_rank >= pp_size) return nullptr;
    return new rl_rank(region, where, tp_rank, pp_rank);
}

void rl_leave(rl_rank *rank) { delete rank; }

int32_t rl_all_reduce(rl_rank *rank, const void *x, const void *residual, void *out, int64_t count, int32_t element_size) {
    if (element_size == 8) return rank->all_reduce((const double *)x, (const double *)residual, (double *)out, count);
    return rank->all_reduce((const float *)x, (const float *)residual, (float *)out, count);
}

int32_t rl_all_gather(rl_rank *rank, const void *x, int64_t rows, int64_t columns, void *out, int64_t out_columns,
                      int32_t element_size) {
    return rank->all_gather((const char *)x, rows, columns * element_size, (char *)out, out_columns * element_size);
}

int32_t rl_send(rl_rank *rank, const void *x, int64_t bytes) { return rank->send((const char *)x, bytes); }

int32_t rl_receive(rl_rank *rank, void *x, int64_t bytes) { return rank->receive((char *)x, bytes); }

void rl_pointers(rl_rank *rank, rl_collectives *out) {
    *out = {rank,
            [](void *r, const float *x, const float *residual, float *y, int64_t count) {
                return ((rl_rank *)r)->all_reduce(x, residual, y, count);
            },
            [](void *r, const float *x, int64_t rows, int64_t columns, float *y, int64_t out_columns) {
                return rl_all_gather((rl_rank *)r, x, rows, columns, y, out_columns, sizeof(float));
            },
            [](void *r, const float *x, int64_t count) { return rl_send((rl_rank *)r, x, count * (int64_t)sizeof(float)); },
            [](void *r, float *x, int64_t count) { return rl_receive((rl_rank *)r, x, count * (int64_t)sizeof(float)); }};
}

void rl_traffic_of(const rl_rank *rank, rl_traffic *out) { std::copy_n(rank->traffic, rl_rank::kNumOps, out); }
}
