/// What the native tests are made of: tests by name, checks, and memory between guard pages.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

struct Test {
    const char *name;
    void (*body)();
};

inline std::vector<Test> &all_tests() {
    static std::vector<Test> tests;
    return tests;
}

struct Registration {
    Registration(const char *name, void (*body)()) { all_tests().push_back({name, body}); }
};

/// Defines a test: `TEST(quantize_then_dequantize) { CHECK(...); }`.
#define TEST(name)                                            \
    static void name();                                       \
    static const Registration registration_of_##name(#name, name); \
    static void name()

/// Ends the program with the place and the expression, unless it holds.
#define CHECK(condition)                                                             \
    do {                                                                             \
        if (!(condition)) {                                                          \
            std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                            \
        }                                                                            \
    } while (0)

/// `count` elements that touch an inaccessible page: at their end, or at their beginning.
template <class T>
class Guarded {
  public:
    enum Side { end, beginning };

    explicit Guarded(std::size_t count, Side side = end) : count_(count) {
        const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        const std::size_t bytes = count * sizeof(T), inner = (bytes + page - 1) / page * page;
        mapped_ = inner + 2 * page;
        memory_ = static_cast<char *>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        CHECK(memory_ != MAP_FAILED);
        CHECK(inner == 0 || mprotect(memory_ + page, inner, PROT_READ | PROT_WRITE) == 0);
        data_ = reinterpret_cast<T *>(memory_ + page + (side == end ? inner - bytes : 0));
    }
    ~Guarded() { munmap(memory_, mapped_); }
    Guarded(const Guarded &) = delete;
    Guarded &operator=(const Guarded &) = delete;

    T *data() { return data_; }
    T &operator[](std::size_t i) { return data_[i]; }
    std::size_t size() const { return count_; }
    T *begin() { return data_; }
    T *end_of() { return data_ + count_; }

  private:
    std::size_t count_, mapped_;
    char *memory_;
    T *data_;
};
