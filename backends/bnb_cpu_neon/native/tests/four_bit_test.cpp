/// The 4-bit kernels against loops that follow the definition, on buffers that touch inaccessible pages.
#include <cmath>
#include <vector>

#include "check.hpp"
#include "kernels/embedding.hpp"
#include "kernels/four_bit.hpp"
#include "kernels/gemm_4bit.hpp"
#include "kernels/ranked.hpp"
#include "tier.hpp"

using namespace bnb;

namespace {

constexpr float nf4[16] = {-1.0f,       -0.69619280f, -0.52507305f, -0.39491749f, -0.28444138f, -0.18477343f, -0.09105004f, 0.0f,
                           0.07958030f, 0.16093020f,  0.24611230f,  0.33791524f,  0.44070983f,  0.56261700f,  0.72295684f,  1.0f};
constexpr auto sides = {Guarded<float>::end, Guarded<float>::beginning};

std::mt19937 &generator() {
    static std::mt19937 made(1);
    return made;
}

template <class T>
void fill_normal(T *values, std::size_t count) {
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < count; ++i) store1(values + i, normal(generator()));
}

void fill_bytes(uint8_t *values, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<uint8_t>(generator()());
}

/// A 4-bit tensor of n elements; with `nested_blocksize`, its scales are quantized too.
struct Tensor {
    Guarded<uint8_t> codes, coded_absmax;
    Guarded<float> absmax, nested_absmax, nested_codebook, offset;
    int64_t blocksize, nested_blocksize;

    Tensor(int64_t n, int64_t blocksize, int64_t nested_blocksize, int side)
        : codes(static_cast<std::size_t>(n + 1) / 2, static_cast<Guarded<uint8_t>::Side>(side)),
          coded_absmax(blocks_of(n, blocksize), static_cast<Guarded<uint8_t>::Side>(side)),
          absmax(blocks_of(n, blocksize), static_cast<Guarded<float>::Side>(side)),
          nested_absmax(nested_blocksize ? blocks_of(static_cast<int64_t>(coded_absmax.size()), nested_blocksize) : 0),
          nested_codebook(256),
          offset(1),
          blocksize(blocksize),
          nested_blocksize(nested_blocksize) {
        fill_bytes(codes.data(), codes.size());
        fill_bytes(coded_absmax.data(), coded_absmax.size());
        fill_normal(absmax.data(), absmax.size());
        fill_normal(nested_absmax.data(), nested_absmax.size());
        fill_normal(nested_codebook.data(), 256);
        offset[0] = 0.25f;
    }

    static std::size_t blocks_of(int64_t n, int64_t blocksize) { return static_cast<std::size_t>((n + blocksize - 1) / blocksize); }

    Packed4bit packed() {
        if (!nested_blocksize) return {codes.data(), {absmax.data(), blocksize, {}}, nf4};
        const Nested nested{nested_absmax.data(), nested_codebook.data(), offset.data(), nested_blocksize};
        return {codes.data(), {coded_absmax.data(), blocksize, nested}, nf4};
    }

    int code(int64_t i) {
        const uint8_t pair = codes[static_cast<std::size_t>(i / 2)];
        return i % 2 ? pair & 15 : pair >> 4;
    }
    float scale(int64_t number) {
        const std::size_t block = static_cast<std::size_t>(number);
        if (!nested_blocksize) return absmax[block];
        const float product = nested_codebook[coded_absmax[block]] * nested_absmax[block / static_cast<std::size_t>(nested_blocksize)];
        return product + offset[0];
    }
    float operator[](int64_t i) { return nf4[code(i)] * scale(i / blocksize); }
};

/// `value` rounded to T and back.
template <class T>
float rounded(float value) {
    T stored;
    store1(&stored, value);
    return load1(&stored);
}

template <class T>
constexpr DType dtype_of = std::is_same_v<T, Half> ? DType::float16 : std::is_same_v<T, BFloat16> ? DType::bfloat16 : DType::float32;

template <class T>
void check_quantize(int64_t n, int64_t blocksize, int side) {
    using Side = typename Guarded<T>::Side;
    Guarded<T> x(static_cast<std::size_t>(n), static_cast<Side>(side));
    fill_normal(x.data(), x.size());
    Guarded<uint8_t> packed(static_cast<std::size_t>(n + 1) / 2, static_cast<Guarded<uint8_t>::Side>(side));
    Guarded<float> absmax(Tensor::blocks_of(n, blocksize), static_cast<Guarded<float>::Side>(side));
    quantize_4bit(dtype_of<T>, x.data(), n, nf4, blocksize, packed.data(), absmax.data(), 1);
    const Ranked<16> ranked(nf4);
    for (int64_t start = 0; start < n; start += blocksize) {
        const int64_t stop = std::min(n, start + blocksize);
        float largest = 0;
        for (int64_t i = start; i < stop; ++i) largest = std::max(largest, std::abs(load1(x.data() + i)));
        CHECK(absmax[static_cast<std::size_t>(start / blocksize)] == largest);
        const float scale = 1.0f / std::max(largest, 0x1p-126f);
        for (int64_t i = start; i < stop; ++i) {
            const uint8_t pair = packed[static_cast<std::size_t>(i / 2)];
            CHECK((i % 2 ? pair & 15 : pair >> 4) == ranked.code_of_rank[ranked.count_below(load1(x.data() + i) * scale)]);
        }
    }
    if (n % 2) CHECK((packed[static_cast<std::size_t>(n / 2)] & 15) == ranked.code_of_zero());
}

template <class T>
void check_dequantize(int64_t n, int64_t blocksize, int64_t nested_blocksize, int side) {
    Tensor tensor(n, blocksize, nested_blocksize, side);
    Guarded<T> out(static_cast<std::size_t>(n), static_cast<typename Guarded<T>::Side>(side));
    dequantize_4bit(tensor.packed(), n, dtype_of<T>, out.data(), 1);
    for (int64_t i = 0; i < n; ++i) CHECK(load1(out.data() + i) == rounded<T>(tensor[i]));
}

/// What rounding to T may take, relative to the number, and of subnormal ones of float16.
template <class T>
constexpr double unit = std::is_same_v<T, Half> ? 0x1p-11 : std::is_same_v<T, BFloat16> ? 0x1p-8 : 0x1p-24;
template <class T>
constexpr double subnormal = std::is_same_v<T, Half> ? 0x1p-25 : 0;

/// Checks a product in `y` against float64: each element may be off by what its terms' magnitudes allow.
template <class T, class Term>
void check_product(const T *y, int64_t M, int64_t N, int64_t K, const Term &term) {
    for (int64_t m = 0; m < M; ++m)
        for (int64_t n = 0; n < N; ++n) {
            double sum = 0, magnitude = 0;
            for (int64_t k = 0; k < K; ++k) {
                const double product = term(m, n, k);
                sum += product;
                magnitude += std::abs(product);
            }
            const double error = std::abs(load1(y + m * N + n) - sum);
            CHECK(error <= unit<T> * std::abs(sum) + 0x1p-24 * static_cast<double>(K + 1) * magnitude + subnormal<T>);
        }
}

template <class T>
void check_gemm(int64_t M, int64_t N, int64_t K, int64_t blocksize, int side) {
    using Side = typename Guarded<T>::Side;
    Tensor weight(N * K, blocksize, 0, side);
    Guarded<T> x(static_cast<std::size_t>(M * K), static_cast<Side>(side)), y(static_cast<std::size_t>(M * N), static_cast<Side>(side));
    fill_normal(x.data(), x.size());
    Guarded<float> scratch(static_cast<std::size_t>(gemm_4bit_scratch(M, K)));
    gemm_4bit(dtype_of<T>, x.data(), M, weight.packed(), N, K, nullptr, y.data(), scratch.data(), 2);
    check_product(y.data(), M, N, K, [&](int64_t m, int64_t n, int64_t k) {
        return static_cast<double>(load1(x.data() + m * K + k)) * weight[n * K + k];
    });

    Guarded<T> g(static_cast<std::size_t>(M * N), static_cast<Side>(side)), back(static_cast<std::size_t>(M * K), static_cast<Side>(side));
    fill_normal(g.data(), g.size());
    Guarded<float> more(static_cast<std::size_t>(gemm_4bit_transposed_scratch(M, N)));
    gemm_4bit_transposed(dtype_of<T>, g.data(), M, weight.packed(), N, K, back.data(), more.data(), 2);
    check_product(back.data(), M, K, N, [&](int64_t m, int64_t k, int64_t n) {
        return static_cast<double>(load1(g.data() + m * N + n)) * weight[n * K + k];
    });
}

/// int8 codes of values that have this absmax.
double int8_code(float value, float absmax) { return std::nearbyint(value * (127.0f / absmax)); }

template <class T>
void check_fast_gemm(int64_t M, int64_t N, int64_t blocks, int64_t blocksize, int64_t nested_blocksize, int side) {
    using Side = typename Guarded<T>::Side;
    const int64_t K = blocks * blocksize;
    Tensor weight(N * K, blocksize, nested_blocksize, side);
    Guarded<T> x(static_cast<std::size_t>(M * K), static_cast<Side>(side)), y(static_cast<std::size_t>(M * N), static_cast<Side>(side));
    fill_normal(x.data(), x.size());
    Guarded<float> scratch(static_cast<std::size_t>(gemm_4bit_scratch(M, K)), static_cast<Guarded<float>::Side>(side));
    fast_gemm_4bit(dtype_of<T>, x.data(), M, weight.packed(), N, K, nullptr, y.data(), scratch.data(), 2);
    for (int64_t m = 0; m < M; ++m)
        for (int64_t n = 0; n < N; ++n) {
            double sum = 0, magnitude = 0;
            for (int64_t block = 0; block < blocks; ++block) {
                const T *values = x.data() + m * K + block * blocksize;
                float absmax = 0;
                for (int64_t i = 0; i < blocksize; ++i) absmax = std::max(absmax, std::abs(load1(values + i)));
                double product = 0;
                for (int64_t i = 0; i < blocksize; ++i) {
                    product += int8_code(load1(values + i), absmax) * int8_code(nf4[weight.code(n * K + block * blocksize + i)], 1.0f);
                }
                product *= static_cast<double>(absmax) * weight.scale(n * blocks + block) / (127 * 127);
                sum += product;
                magnitude += std::abs(product);
            }
            const double error = std::abs(load1(y.data() + m * N + n) - sum);
            CHECK(error <= unit<T> * std::abs(sum) + 0x1p-24 * static_cast<double>(blocks + 6) * magnitude + subnormal<T>);
        }
}

}  // namespace

TEST(quantize_4bit_follows_the_definition) {
    for (const int side : sides)
        for (const int64_t blocksize : {32, 64, 128})
            for (int64_t n = 0; n <= 257; ++n) {
                check_quantize<float>(n, blocksize, side);
                check_quantize<Half>(n, blocksize, side);
                check_quantize<BFloat16>(n, blocksize, side);
            }
}

TEST(dequantize_4bit_follows_the_definition) {
    for (const int side : sides)
        for (const int64_t nested_blocksize : {0, 1, 3})
            for (const int64_t blocksize : {32, 64})
                for (int64_t n = 0; n <= 257; ++n) {
                    check_dequantize<float>(n, blocksize, nested_blocksize, side);
                    check_dequantize<Half>(n, blocksize, nested_blocksize, side);
                    check_dequantize<BFloat16>(n, blocksize, nested_blocksize, side);
                }
}

TEST(products_are_within_their_bound) {
    for (const int side : sides)
        for (const int64_t M : {1, 2, 5, 13, 16, 17, 33})
            for (const auto &[N, K] : {std::pair{1, 1}, {3, 5}, {4, 64}, {7, 65}, {9, 257}, {8, 128}, {2, 1100}})
                for (const int64_t blocksize : {32, 64}) {
                    check_gemm<float>(M, N, K, blocksize, side);
                    check_gemm<Half>(M, N, K, blocksize, side);
                    check_gemm<BFloat16>(M, N, K, blocksize, side);
                }
}

TEST(products_of_more_rows_than_are_worked_on_at_a_time) { check_gemm<float>(259, 6, 70, 32, 0); }

TEST(fast_products_are_those_of_int8_codes) {
    for (const Tier tier : {Tier::baseline, Tier::dotprod, Tier::i8mm}) {
        set_tier(tier);
        for (const int side : sides)
            for (const int64_t M : {1, 3, 4, 5, 6, 7, 8, 9, 17}) {
                if (tier == Tier::baseline && M > 6) continue;
                for (const auto &[N, blocks] : {std::pair{1, 1}, {3, 2}, {9, 5}, {4, 130}})
                    for (const int64_t nested_blocksize : {0, 3}) {
                        check_fast_gemm<float>(M, N, blocks, 32, nested_blocksize, side);
                        check_fast_gemm<Half>(M, N, blocks, 32, nested_blocksize, side);
                        check_fast_gemm<BFloat16>(M, N, blocks, 64, nested_blocksize, side);
                    }
            }
        check_fast_gemm<float>(5, 2, 2, 4096, 0, 0);
    }
    check_fast_gemm<float>(259, 2, 3, 32, 0, 0);
    set_tier(Tier::baseline);
}

TEST(embedding_4bit_reads_no_other_rows) {
    for (const int side : sides)
        for (const int64_t width : {1, 2, 31, 33, 64, 257}) {
            Tensor table(5 * width, 32, 2, side);
            Guarded<int64_t> indices(4);
            Guarded<float> out(static_cast<std::size_t>(4 * width), static_cast<Guarded<float>::Side>(side));
            for (const std::size_t i : {0, 1, 2, 3}) indices[i] = static_cast<int64_t>(4 - i);
            embedding_4bit({indices.data(), true, 4}, table.packed(), width, DType::float32, out.data(), 1);
            for (int64_t i = 0; i < 4 * width; ++i) CHECK(out[static_cast<std::size_t>(i)] == table[(4 - i / width) * width + i % width]);
        }
}
