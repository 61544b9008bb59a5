// Runs kernel cases without Python: for sanitizers and for processors that are only emulated. The files are written by
// `ridgeline kernels test --dump DIR` (dump_case in ops/run_case.py); every buffer is exactly as large as it must be, so
// that a step outside of it is seen.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ridgeline.h"

namespace {
struct Free {
    void operator()(void *p) const { std::free(p); }
};
using Memory = std::unique_ptr<uint8_t, Free>;

Memory allocate(int64_t bytes) {  // exactly `bytes`, at a cache line
    void *p = nullptr;
    if (posix_memalign(&p, 64, bytes > 0 ? (size_t)bytes : 1)) throw std::runtime_error("out of memory");
    return Memory((uint8_t *)p);
}

class Reader {
public:
    explicit Reader(const std::string &path) {
        std::ifstream file(path, std::ios::binary);
        if (!file) throw std::runtime_error("cannot be opened");
        bytes_.assign(std::istreambuf_iterator<char>(file), {});
    }
    void take(void *to, int64_t count) {
        if (count < 0 || count > (int64_t)bytes_.size() - at_) throw std::runtime_error("ends too early");
        if (count) std::memcpy(to, bytes_.data() + at_, (size_t)count);
        at_ += count;
    }
    int32_t integer() { return number<int32_t>(); }
    float real() { return number<float>(); }
    int64_t length() { return number<int64_t>(); }
    template <class T> std::vector<T> array() {
        const int64_t count = length();
        if (count < 0 || count > (int64_t)bytes_.size() - at_) throw std::runtime_error("ends too early");
        std::vector<T> values((size_t)count / sizeof(T));
        take(values.data(), count);
        return values;
    }

private:
    template <class T> T number() {
        T value;
        take(&value, sizeof value);
        return value;
    }
    std::vector<char> bytes_;
    int64_t at_ = 0;
};

struct Batch {
    int32_t num_tokens, num_seqs, num_blocks_per_table, num_logits;
    std::vector<int32_t> arrays[7];
};

// "" or what went wrong.
std::string run_case(const std::string &path, int num_threads, std::string &name) {
    Reader in(path);
    char magic[8];
    in.take(magic, sizeof magic);
    if (std::memcmp(magic, "RLCASE02", sizeof magic)) return "not a case file";
    const auto letters = in.array<char>();
    name.assign(letters.begin(), letters.end());

    std::vector<rl_instruction> instructions((size_t)in.integer());
    in.take(instructions.data(), (int64_t)(instructions.size() * sizeof(rl_instruction)));
    std::vector<rl_buffer> buffers((size_t)in.integer());
    for (rl_buffer &b : buffers) {
        b.address = nullptr;
        b.rows_are_logits = in.integer();
        b.columns = in.integer();
    }
    std::vector<Memory> memory;
    std::vector<rl_weight> weights((size_t)in.integer());
    std::vector<std::vector<int32_t>> orders(weights.size());
    for (size_t i = 0; i < weights.size(); i++) {
        rl_weight &w = weights[i];
        const int32_t dimensions = in.integer();
        w.format = in.integer();
        w.rows = in.integer();
        w.columns = in.integer();
        const int32_t group_size = in.integer(), has_zeros = in.integer();
        w.rounds_input = in.integer();
        w.input_scale = in.real();
        w.outlier = in.real();
        orders[i] = in.array<int32_t>();
        w.order = orders[i].empty() ? nullptr : orders[i].data();
        const auto file = in.array<uint8_t>();
        const bool is_vector = dimensions == 1;
        const int64_t bytes = is_vector ? (int64_t)file.size() : rl_packed_bytes(w.format, w.rows, w.columns);
        if (bytes == 0) return "no kernel for format " + std::to_string(w.format);
        memory.push_back(allocate(bytes));
        w.address = memory.back().get();
        if (is_vector) {
            std::memcpy(memory.back().get(), file.data(), file.size());
        } else {  // file rows at a cache line too: they are read as their own type
            const Memory rows = allocate((int64_t)file.size());
            std::memcpy(rows.get(), file.data(), file.size());
            for (int32_t begin = 0; begin < w.rows; begin += 32)
                rl_pack(w.format, group_size, has_zeros, rows.get(), begin, begin + 32, w.rows, w.columns, memory.back().get());
        }
    }
    std::vector<std::vector<float>> constants;
    for (int32_t i = in.integer(); i > 0; i--) constants.push_back(in.array<float>());
    std::vector<const float *> constant_addresses;
    for (const auto &c : constants) constant_addresses.push_back(c.data());

    rl_cache cache;
    for (int32_t *field : {&cache.dtype, &cache.num_layers, &cache.num_blocks, &cache.block_size, &cache.num_kv_heads,
                           &cache.head_dim})
        *field = in.integer();
    const int64_t page_bytes = in.length();
    const Memory pages = allocate(page_bytes);
    std::memset(pages.get(), 0xff, (size_t)page_bytes);  // NaN: a slot that was never written shows
    cache.pages = pages.get();

    std::vector<Batch> batches((size_t)in.integer());
    for (Batch &b : batches) {
        for (int32_t *field : {&b.num_tokens, &b.num_seqs, &b.num_blocks_per_table, &b.num_logits})
            *field = in.integer();
        for (auto &array : b.arrays) array = in.array<int32_t>();
    }
    const rl_buffer *const output = &buffers.at((size_t)in.integer());
    const auto expected = in.array<float>(), tolerance = in.array<float>();

    rl_program *program =
        rl_create(instructions.data(), (int32_t)instructions.size(), buffers.data(), (int32_t)buffers.size(),
                  weights.data(), (int32_t)weights.size(), constant_addresses.data(),
                  (int32_t)constant_addresses.size(), &cache, num_threads);
    if (!program) return "rl_create knows an opcode or format of it not";
    std::vector<Memory> activations;
    for (const Batch &b : batches) {
        activations.clear();
        for (rl_buffer &buffer : buffers) {
            const int64_t rows = buffer.rows_are_logits ? b.num_logits : b.num_tokens;
            activations.push_back(allocate(4 * rows * buffer.columns));
            std::memset(activations.back().get(), 0xff, (size_t)(4 * rows * buffer.columns));
            buffer.address = (float *)activations.back().get();
        }
        rl_set_buffers(program, buffers.data());
        const rl_batch step = {b.arrays[0].data(), b.arrays[1].data(), b.arrays[2].data(), b.arrays[3].data(),
                               b.arrays[4].data(), b.arrays[5].data(), b.arrays[6].data(), b.num_tokens,
                               b.num_seqs,         b.num_blocks_per_table, b.num_logits};
        if (rl_step(program, &step) != RL_OK) return "a collective failed";
    }
    std::string problem;
    const size_t rows = (size_t)(output->rows_are_logits ? batches.back().num_logits : batches.back().num_tokens);
    if (expected.size() != rows * (size_t)output->columns || tolerance.size() != expected.size())
        problem = "expected output has another size than the buffer";
    for (size_t i = 0; i < expected.size() && problem.empty(); i++) {
        const float error = std::fabs(output->address[i] - expected[i]);
        if (error <= tolerance[i]) continue;
        char line[160];
        std::snprintf(line, sizeof line, "row %zu column %zu: %.9g, expected %.9g within %.3g",
                      i / (size_t)output->columns, i % (size_t)output->columns, (double)output->address[i],
                      (double)expected[i], (double)tolerance[i]);
        problem = line;
    }
    rl_destroy(program);
    return problem;
}
// A file, or every .case file of a directory in order of their names.
void collect(const std::string &path, std::vector<std::string> &files) {
    if (!std::filesystem::is_directory(path)) {
        files.push_back(path);
        return;
    }
    std::vector<std::string> found;
    for (const auto &entry : std::filesystem::directory_iterator(path))
        if (entry.path().extension() == ".case") found.push_back(entry.path().string());
    std::sort(found.begin(), found.end());
    files.insert(files.end(), found.begin(), found.end());
}
}  // namespace

int main(int count, char **arguments) {
    std::vector<std::string> files;
    std::string isa;
    for (int i = 1; i < count; i++) {
        if (!std::strcmp(arguments[i], "--isa") && i + 1 < count)
            isa = arguments[++i];
        else
            collect(arguments[i], files);
    }
    if (files.empty()) {
        std::fprintf(stderr,
                     "usage: %s [--isa NAME] FILE.case|DIRECTORY ...\n"
                     "--isa: what this program was built for; nothing is run where the processor lacks it.\n"
                     "The files are written by: ridgeline kernels test --dump DIRECTORY\n",
                     arguments[0]);
        return 2;
    }
    if (!isa.empty() && !rl_cpu_supports(isa.c_str())) {
        std::printf("SKIPPED: this processor does not run %s\n", isa.c_str());
        return 0;
    }
    int failed = 0;
    for (const std::string &file : files) {
        std::string name = file, problem;
        try {
            problem = run_case(file, 2, name);
        } catch (const std::exception &error) {
            problem = error.what();
        }
        if (problem.empty()) continue;
        failed++;
        std::printf("FAILED %s: %s\n", name.c_str(), problem.c_str());
    }
    std::printf("%zu cases, %d failed\n", files.size(), failed);
    return failed ? 1 : 0;
}
