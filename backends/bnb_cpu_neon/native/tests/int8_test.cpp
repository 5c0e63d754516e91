/// The int8 kernels against plain loops, in every tier, between guard pages.
#include <cmath>
#include <limits>

#include "check.hpp"
#include "kernels/int8.hpp"
#include "tier.hpp"

using bnb::DType;

static std::mt19937 generator(0);

static int8_t random_code(int low = -127) { return static_cast<int8_t>(std::uniform_int_distribution<int>(low, 127)(generator)); }
static float random_value() { return std::normal_distribution<float>()(generator); }

/// What `use` computes is the same in every tier and with several threads.
template <class Use>
static void in_every_tier(const Use &use) {
    const bnb::Tier before = bnb::current_tier();
    for (bnb::Tier tier : {bnb::Tier::baseline, bnb::Tier::dotprod, bnb::Tier::i8mm}) {
        bnb::set_tier(tier);
        for (int threads : {1, 3}) use(threads);
    }
    bnb::set_tier(before);
}

static std::vector<int32_t> plain_product(const int8_t *a, const int8_t *b, int64_t M, int64_t N, int64_t K) {
    std::vector<int32_t> product;
    for (int64_t m = 0; m < M; ++m)
        for (int64_t n = 0; n < N; ++n) {
            int32_t sum = 0;
            for (int64_t k = 0; k < K; ++k) sum += a[m * K + k] * b[n * K + k];
            product.push_back(sum);
        }
    return product;
}

static void check_product(int64_t M, int64_t N, int64_t K, bool extreme) {
    for (auto side : {Guarded<int8_t>::end, Guarded<int8_t>::beginning}) {
        Guarded<int8_t> a(static_cast<std::size_t>(M * K), side), b(static_cast<std::size_t>(N * K), side);
        for (int8_t *code = a.begin(); code != a.end_of(); ++code) *code = extreme ? int8_t{-128} : random_code(-128);
        for (int8_t *code = b.begin(); code != b.end_of(); ++code) *code = extreme ? int8_t{-128} : random_code(-128);
        const std::vector<int32_t> expected = plain_product(a.data(), b.data(), M, N, K);
        in_every_tier([&](int threads) {
            Guarded<int32_t> product(static_cast<std::size_t>(M * N));
            Guarded<uint8_t> scratch(static_cast<std::size_t>(bnb::int8_matmul_scratch(M, K)));
            bnb::int8_matmul(a.data(), b.data(), M, N, K, product.data(), scratch.data(), threads);
            CHECK(std::equal(expected.begin(), expected.end(), product.begin()));
        });
    }
}

TEST(int8_matmul_of_every_number_of_columns) {
    for (int64_t K = 1; K <= 80; ++K) check_product(9, 9, K, false);
}

TEST(int8_matmul_of_every_number_of_rows) {
    for (int64_t M = 1; M <= 33; ++M) check_product(M, 17, 37, false);
    for (int64_t N = 1; N <= 33; ++N) check_product(7, N, 37, false);
    check_product(131, 70, 257, false);
}

TEST(int8_matmul_of_the_least_codes) { check_product(9, 9, 300, true); }

TEST(int8_matmul_of_more_rows_than_are_packed_at_a_time) { check_product(200, 9, 9000, false); }

/// A linear layer's result, and how far from it rounding may be.
static void check_linear(int64_t M, int64_t N, int64_t K, double threshold, bool with_bias) {
    Guarded<float> x(static_cast<std::size_t>(M * K)), absmax(static_cast<std::size_t>(N)), bias(static_cast<std::size_t>(N));
    Guarded<int8_t> codes(static_cast<std::size_t>(N * K));
    for (float *value = x.begin(); value != x.end_of(); ++value) *value = random_value() * (generator() % 16 ? 1.0f : 4.0f);
    for (float *value = absmax.begin(); value != absmax.end_of(); ++value) *value = 0.5f + std::abs(random_value());
    for (float *value = bias.begin(); value != bias.end_of(); ++value) *value = random_value();
    for (int8_t *code = codes.begin(); code != codes.end_of(); ++code) *code = random_code();

    std::vector<int8_t> x_codes(x.size());
    std::vector<float> x_absmax(static_cast<std::size_t>(M));
    std::vector<uint8_t> outlier(static_cast<std::size_t>(K));
    const bnb::Matrix matrix{DType::float32, x.data(), M, K};
    bnb::int8_quantize_rows(matrix, threshold, x_codes.data(), x_absmax.data(), outlier.data(), 1);
    in_every_tier([&](int threads) {
        Guarded<float> y(static_cast<std::size_t>(M * N));
        Guarded<uint8_t> scratch(static_cast<std::size_t>(bnb::int8_linear_scratch(M, K, threshold)));
        bnb::int8_linear(
            matrix, {codes.data(), absmax.data(), N, K}, with_bias ? bias.data() : nullptr, threshold, y.data(), scratch.data(), threads);
        for (int64_t m = 0; m < M; ++m)
            for (int64_t n = 0; n < N; ++n) {
                const std::size_t row = static_cast<std::size_t>(m), column = static_cast<std::size_t>(n);
                double sum = 0, magnitude = 0;
                for (int64_t k = 0; k < K; ++k) {
                    const std::size_t at = static_cast<std::size_t>(m * K + k);
                    const double left = outlier[static_cast<std::size_t>(k)] ? x[at] : x_codes[at] * double{x_absmax[row]} / 127;
                    const double term = left * codes[static_cast<std::size_t>(n * K + k)] * absmax[column] / 127;
                    sum += term;
                    magnitude += std::abs(term);
                }
                if (with_bias) sum += bias[column];
                const double bound = 0x1p-24 * (std::abs(sum) + static_cast<double>(K + 4) * magnitude);
                CHECK(std::abs(y[row * static_cast<std::size_t>(N) + column] - sum) <= bound);
            }
    });
}

TEST(int8_linear_with_and_without_outliers) {
    for (double threshold : {0.0, 6.0, 0.5, 1e30})
        for (int64_t M : {1, 2, 7, 8, 9, 70})
            for (int64_t K : {1, 15, 16, 17, 100}) check_linear(M, 11, K, threshold, M % 2);
    check_linear(3, 8, 257, 6.0, true);
    check_linear(140, 3, 9000, 6.0, false);
}

TEST(int8_quantize_of_every_number_of_columns) {
    const float infinity = std::numeric_limits<float>::infinity(), nan = std::nanf("");
    for (double threshold : {0.0, 2.0})
        for (int64_t K = 1; K <= 70; ++K) {
            const int64_t M = 5;
            const std::size_t size = static_cast<std::size_t>(M * K), columns = static_cast<std::size_t>(K);
            Guarded<float> x(size), row_absmax(M), col_absmax(columns);
            Guarded<int8_t> row_codes(size), col_codes(size);
            Guarded<uint8_t> outlier(columns);
            for (float *value = x.begin(); value != x.end_of(); ++value) *value = random_value();
            x[0] = infinity;
            x[size - 1] = nan;
            const bnb::Matrix matrix{DType::float32, x.data(), M, K};
            bnb::int8_quantize_rows_cols(
                matrix, threshold, row_codes.data(), row_absmax.data(), col_codes.data(), col_absmax.data(), outlier.data(), 2);
            const auto is_regular = [&](float value) { return threshold == 0 || std::abs(value) < threshold; };
            for (std::size_t k = 0; k < columns; ++k) {
                bool reached = false;
                float largest = 0;
                for (std::size_t m = 0; m < M; ++m) {
                    const float value = x[m * columns + k];
                    reached = reached || (threshold > 0 && std::abs(value) >= threshold);
                    if (is_regular(value) && !(std::abs(value) <= largest)) largest = std::isnan(largest) ? largest : std::abs(value);
                }
                CHECK(outlier[k] == reached);
                CHECK(col_absmax[k] == largest || (std::isnan(col_absmax[k]) && std::isnan(largest)));
                for (std::size_t m = 0; m < M; ++m) {
                    const float value = x[m * columns + k];
                    const float by_row = std::nearbyint(value * (127.0f / row_absmax[m]));
                    const float by_col = std::nearbyint(value * (127.0f / largest));
                    CHECK(row_codes[m * columns + k] == (reached || std::isnan(by_row) ? 0 : static_cast<int>(by_row)));
                    CHECK(col_codes[m * columns + k] == (!is_regular(value) || std::isnan(by_col) ? 0 : static_cast<int>(by_col)));
                }
            }
        }
}
