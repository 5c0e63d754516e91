/// Every kernel on tensors of every small size, each between inaccessible pages: none reads or writes beyond its arguments, and what
/// it computes does not depend on where they lie.
///
/// Once all buffers end at a page, so that their alignment is that of their size, and once they begin at one. What the kernels
/// compute is checked elsewhere.
#include <initializer_list>
#include <memory>
#include <utility>

#include "check.hpp"
#include "kernels/blockwise.hpp"
#include "kernels/embedding.hpp"
#include "kernels/four_bit.hpp"
#include "kernels/gemm_4bit.hpp"
#include "kernels/int8.hpp"
#include "kernels/optimizer.hpp"
#include "tier.hpp"

using namespace bnb;

namespace {

constexpr int64_t most = 257;
constexpr auto dtypes = {DType::float32, DType::float16, DType::bfloat16};

std::size_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

/// Arguments for one call of a kernel, the same for either side.
class Memory {
  public:
    explicit Memory(Guarded<uint8_t>::Side side) : side_(side) {}

    /// `count` zeros, which are a result.
    template <class T>
    T *out(int64_t count) {
        uint8_t *data = bytes(static_cast<std::size_t>(count) * sizeof(T));
        results_.push_back(buffers_.back().get());
        return reinterpret_cast<T *>(data);
    }
    void *out(DType dtype, int64_t count) { return out<uint8_t>(count * static_cast<int64_t>(size_of(dtype))); }

    template <class T>
    T *scratch(int64_t count) {
        return reinterpret_cast<T *>(bytes(static_cast<std::size_t>(count) * sizeof(T)));
    }

    uint8_t *codes(int64_t count) {
        uint8_t *data = bytes(static_cast<std::size_t>(count));
        for (int64_t i = 0; i < count; ++i) data[i] = static_cast<uint8_t>(random_());
        return data;
    }
    const int8_t *int8_codes(int64_t count) { return reinterpret_cast<int8_t *>(codes(count)); }

    void *values(DType dtype, int64_t count, bool is_result = false) {
        uint8_t *data = bytes(static_cast<std::size_t>(count) * size_of(dtype));
        if (is_result) results_.push_back(buffers_.back().get());
        with_type(dtype, [&](auto element) {
            auto *typed = reinterpret_cast<decltype(element) *>(data);
            for (int64_t i = 0; i < count; ++i) store1(typed + i, normal_(random_));
        });
        return data;
    }
    const float *floats(int64_t count) { return static_cast<const float *>(values(DType::float32, count)); }

    template <class T>
    const T *list(std::initializer_list<T> numbers) {
        T *data = scratch<T>(static_cast<int64_t>(numbers.size()));
        std::copy(numbers.begin(), numbers.end(), data);
        return data;
    }

    /// From -1 to 1.
    const float *codebook(int entries) {
        float *data = scratch<float>(entries);
        for (int i = 0; i < entries; ++i) data[i] = static_cast<float>(2 * i) / static_cast<float>(entries - 1) - 1;
        return data;
    }

    /// A tensor of n elements, and as many others behind it.
    Packed4bit packed(int64_t n, bool nested, int64_t tensors = 1) {
        constexpr int64_t blocksize = 32, nested_blocksize = 3;
        const int64_t blocks = (n + blocksize - 1) / blocksize * tensors;
        const uint8_t *pairs = codes((n + 1) / 2 * tensors);
        const float *sixteen = codebook(16);
        if (!nested) return {pairs, {floats(blocks), blocksize, {}}, sixteen};
        const Nested scales{floats((blocks + nested_blocksize - 1) / nested_blocksize), codebook(256), floats(1), nested_blocksize};
        return {pairs, {codes(blocks), blocksize, scales}, sixteen};
    }

    std::vector<uint8_t> results() const {
        std::vector<uint8_t> all;
        for (Guarded<uint8_t> *buffer : results_) all.insert(all.end(), buffer->begin(), buffer->end_of());
        return all;
    }

  private:
    uint8_t *bytes(std::size_t count) {
        buffers_.push_back(std::make_unique<Guarded<uint8_t>>(count, side_));
        return buffers_.back()->data();
    }

    Guarded<uint8_t>::Side side_;
    std::mt19937 random_{1};
    std::normal_distribution<float> normal_;
    std::vector<std::unique_ptr<Guarded<uint8_t>>> buffers_;
    std::vector<Guarded<uint8_t> *> results_;
};

/// Runs `call(memory, n, dtype)` for every size from `least` on and every dtype, on both sides.
template <class Call>
void check_placement(int64_t least, const Call &call) {
    for (const DType dtype : dtypes)
        for (int64_t n = least; n <= most; ++n) {
            Memory at_end(Guarded<uint8_t>::end), at_beginning(Guarded<uint8_t>::beginning);
            call(at_end, n, dtype);
            call(at_beginning, n, dtype);
            CHECK(at_end.results() == at_beginning.results());
        }
}

template <class Use>
void in_every_tier(const Use &use) {
    const Tier before = current_tier();
    for (const Tier tier : {Tier::baseline, Tier::dotprod, Tier::i8mm}) {
        set_tier(tier);
        use();
    }
    set_tier(before);
}

}  // namespace

TEST(placement_of_blockwise_tensors) {
    for (const int64_t blocksize : {1, 64, 100}) {
        check_placement(0, [&](Memory &memory, int64_t n, DType dtype) {
            const int64_t blocks = (n + blocksize - 1) / blocksize;
            const void *x = memory.values(dtype, n);
            const float *codebook = memory.codebook(256);
            quantize_blockwise(dtype, x, n, codebook, blocksize, memory.out<uint8_t>(n), memory.out<float>(blocks), 1);
            const uint8_t *codes = memory.codes(n);
            dequantize_blockwise(codes, memory.floats(blocks), codebook, blocksize, n, dtype, memory.out(dtype, n), 1);
        });
    }
}

TEST(placement_of_4bit_tensors) {
    check_placement(0, [](Memory &memory, int64_t n, DType dtype) {
        const void *x = memory.values(dtype, n);
        const float *codebook = memory.codebook(16);
        quantize_4bit(dtype, x, n, codebook, 32, memory.out<uint8_t>((n + 1) / 2), memory.out<float>((n + 31) / 32), 1);
        for (const bool nested : {false, true}) dequantize_4bit(memory.packed(n, nested), n, dtype, memory.out(dtype, n), 1);
    });
}

TEST(placement_of_embeddings) {
    check_placement(1, [](Memory &memory, int64_t width, DType dtype) {
        const Indices wide{memory.list<int64_t>({2, 0, 2}), true, 3}, narrow{memory.list<int32_t>({1, 2}), false, 2};
        embedding_4bit(wide, memory.packed(3 * width, true), width, dtype, memory.out(dtype, 3 * width), 1);
        const int8_t *codes = memory.int8_codes(3 * width);
        embedding_8bit(narrow, codes, memory.floats(3), width, dtype, memory.out(dtype, 2 * width), 1);
    });
}

TEST(placement_of_4bit_products) {
    for (const int64_t M : {1, 6}) {
        check_placement(1, [&](Memory &memory, int64_t K, DType dtype) {
            constexpr int64_t N = 5;
            const Packed4bit weight = memory.packed(N * K, M == 1);
            const void *x = memory.values(dtype, M * K), *bias = memory.values(dtype, N), *g = memory.values(dtype, M * N);
            float *scratch = memory.scratch<float>(gemm_4bit_scratch(M, K));
            gemm_4bit(dtype, x, M, weight, N, K, bias, memory.out(dtype, M * N), scratch, 1);
            if (K % weight.scales.blocksize == 0) {
                in_every_tier([&] { fast_gemm_4bit(dtype, x, M, weight, N, K, bias, memory.out(dtype, M * N), scratch, 1); });
            }
            scratch = memory.scratch<float>(gemm_4bit_transposed_scratch(M, N));
            gemm_4bit_transposed(dtype, g, M, weight, N, K, memory.out(dtype, M * K), scratch, 1);
        });
    }
}

TEST(placement_of_grouped_products) {
    check_placement(1, [](Memory &memory, int64_t K, DType dtype) {
        const int64_t N = 5, tokens = 4;
        const Experts experts{memory.list<int32_t>({0, 3, 3, 4}), 3, memory.packed(N * K, false, 3)};
        const void *x = memory.values(dtype, tokens * K), *g = memory.values(dtype, tokens * N);
        float *scratch = memory.scratch<float>(grouped_gemm_4bit_scratch(tokens, K));
        grouped_gemm_4bit(gemm_4bit, dtype, x, experts, N, K, memory.out(dtype, tokens * N), scratch, 1);
        scratch = memory.scratch<float>(gemm_4bit_transposed_scratch(tokens, N));
        grouped_gemm_4bit_transposed(dtype, g, experts, N, K, memory.out(dtype, tokens * K), scratch, 1);
    });
}

TEST(placement_of_int8_rows) {
    check_placement(1, [](Memory &memory, int64_t K, DType dtype) {
        const int64_t M = 3;
        const Matrix x{dtype, memory.values(dtype, M * K), M, K};
        int8_quantize_rows(x, 2, memory.out<int8_t>(M * K), memory.out<float>(M), memory.out<uint8_t>(K), 1);
        int8_t *row_codes = memory.out<int8_t>(M * K), *col_codes = memory.out<int8_t>(M * K);
        float *row_absmax = memory.out<float>(M), *col_absmax = memory.out<float>(K);
        int8_quantize_rows_cols(x, 2, row_codes, row_absmax, col_codes, col_absmax, memory.out<uint8_t>(K), 1);
        const int8_t *codes = memory.int8_codes(M * K);
        int8_dequantize_rows(codes, memory.floats(M), M, K, dtype, memory.out(dtype, M * K), 1);
        const int32_t *product = reinterpret_cast<const int32_t *>(memory.codes(4 * M * K));
        const float *absmax = memory.floats(M);
        int8_matmul_dequant(product, absmax, memory.floats(K), memory.values(dtype, K), M, K, dtype, memory.out(dtype, M * K), 1);
    });
}

TEST(placement_of_int8_products) {
    in_every_tier([] {
        for (const int64_t M : {1, 9}) {
            check_placement(1, [&](Memory &memory, int64_t K, DType dtype) {
                const int64_t N = 11;
                const int8_t *a = memory.int8_codes(M * K), *codes = memory.int8_codes(N * K);
                void *scratch = memory.scratch<uint8_t>(int8_matmul_scratch(M, K));
                int8_matmul(a, codes, M, N, K, memory.out<int32_t>(M * N), scratch, 1);
                const Int8Weight weight{codes, memory.floats(N), N, K};
                const Matrix x{dtype, memory.values(dtype, M * K), M, K}, g{dtype, memory.values(dtype, M * N), M, N};
                for (const double threshold : {0.0, 2.0}) {
                    scratch = memory.scratch<uint8_t>(int8_linear_scratch(M, K, threshold));
                    int8_linear(x, weight, memory.values(dtype, N), threshold, memory.out(dtype, M * N), scratch, 1);
                }
                float *floats = memory.scratch<float>(int8_linear_transposed_scratch(M, N));
                int8_linear_transposed(g, weight, memory.out(dtype, M * K), floats, 1);
            });
        }
    });
}

TEST(placement_of_optimizer_tensors) {
    const std::pair<Algorithm, std::size_t> algorithms[] = {{Algorithm::adam, 2}, {Algorithm::ademamix, 3}, {Algorithm::lion, 1},
                                                            {Algorithm::sgd, 1},  {Algorithm::rmsprop, 1},  {Algorithm::adagrad, 1}};
    for (const auto &[algorithm, states] : algorithms) {
        check_placement(1, [&, algorithm = algorithm, states = states](Memory &memory, int64_t n, DType dtype) {
            constexpr int64_t blocksize = 64;
            Hyperparameters h{};
            h.beta1 = h.beta2 = h.beta3 = 0.5;
            h.momentum = algorithm == Algorithm::sgd ? 0.5 : 0;  // of which others keep another state
            h.eps = 0.1;
            h.gnorm_scale = h.step = 1;
            h.max_unorm = h.lr = 0.5;
            std::array<const float *, most_states> codebooks{};
            OptimizerTensor plain{memory.values(dtype, n, true), memory.values(dtype, n), {}, {}, n};
            OptimizerTensor coded{memory.values(dtype, n, true), memory.values(dtype, n), {}, {}, n};
            for (std::size_t state = 0; state < states; ++state) {
                plain.states[state] = memory.out<float>(n);
                coded.states[state] = memory.out<uint8_t>(n);
                coded.absmax[state] = memory.out<float>((n + blocksize - 1) / blocksize);
                codebooks[state] = memory.codebook(256);
            }
            optimizer_step_32bit(dtype, {plain}, algorithm, h, 1);
            optimizer_step_8bit_blockwise(dtype, {coded}, codebooks, algorithm, h, blocksize, 1);
        });
    }
}
