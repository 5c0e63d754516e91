/// What both fuzz targets share: an input made of arbitrary bytes, and the definition that its codes are checked against.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include "elements.hpp"
#include "tests/check.hpp"  // whose CHECK ends the run, which the fuzzer takes for a crash

/// Arguments of a quantizer: a dtype, a blocksize, a codebook and values. Every buffer is as large as it must be and no larger, so
/// that the address sanitizer sees whoever leaves it.
template <std::size_t entries>
class Arguments {
  public:
    Arguments(const uint8_t *bytes, std::size_t size) : bytes_(bytes), left_(size) {
        const uint8_t kinds = byte();
        dtype = static_cast<bnb::DType>(kinds % 3);
        blocksize_byte = byte();
        read_codebook(kinds / 3 % 4);
        bnb::with_type(dtype, [&](auto element) {
            if (kinds / 12 % 2) {
                read_values<decltype(element)>();
            } else {
                make_values<decltype(element)>();
            }
        });
    }

    const void *values() const { return values_.get(); }

    float value(int64_t i) const {
        return bnb::with_type(dtype, [&](auto element) { return bnb::load1(reinterpret_cast<const decltype(element) *>(values_.get()) + i); });
    }

    /// Whether the definition says what codes there are: it orders entries, which NaN have no place in.
    bool has_order() const {
        return std::all_of(codebook.get(), codebook.get() + entries, [](float entry) { return std::isfinite(entry); });
    }

    bnb::DType dtype;
    uint8_t blocksize_byte;  ///< from which the target makes a blocksize
    int64_t n;
    std::unique_ptr<float[]> codebook{new float[entries]};

  private:
    uint8_t byte() { return left_ ? --left_, *bytes_++ : uint8_t{0}; }

    uint32_t word() { return uint32_t{byte()} << 24 | uint32_t{byte()} << 16 | uint32_t{byte()} << 8 | byte(); }

    void read_codebook(int kind) {
        const uint32_t first = kind == 1 ? word() : 0, stride = kind == 1 ? word() >> byte() % 32 : 0;
        for (std::size_t i = 0; i < entries; ++i) {
            switch (kind) {
                case 0:  // any bits
                    codebook[i] = from_bits(word());
                    break;
                case 1:  // bits at equal distances, near or far
                    codebook[i] = from_bits(first + static_cast<uint32_t>(i) * stride);
                    break;
                case 2:  // numbers of equal steps, in any order, repeated or not: their midpoints are exact in every dtype
                    codebook[i] = static_cast<float>(static_cast<int8_t>(byte())) / 128;
                    break;
                default:  // from -1 to 1
                    codebook[i] = static_cast<float>(2 * i) / (entries - 1) - 1;
            }
        }
    }

    static float from_bits(uint32_t bits) {
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }

    template <class T>
    T *allocate(std::size_t count) {
        n = static_cast<int64_t>(count);
        values_.reset(new uint8_t[count * sizeof(T)]);
        return reinterpret_cast<T *>(values_.get());
    }

    /// Values of any bits.
    template <class T>
    void read_values() {
        T *values = allocate<T>(left_ / sizeof(T));
        if (n) std::memcpy(values, bytes_, static_cast<std::size_t>(n) * sizeof(T));
    }

    /// Values on midpoints of neighbouring entries or next to them, and 1, which makes scaling exact where it is the absmax of a
    /// block; two bytes each.
    template <class T>
    void make_values() {
        using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
        T *values = allocate<T>(left_ / 2);
        for (int64_t i = 0; i < n; ++i) {
            const std::size_t entry = byte() % (entries - 1);
            const uint8_t how = byte();
            bnb::store1(values + i, how % 4 == 3 ? 1.0f : (codebook[entry] + codebook[entry + 1]) * 0.5f);
            Bits bits;
            std::memcpy(&bits, values + i, sizeof bits);
            bits = static_cast<Bits>(how % 4 == 1 ? bits + 1 : how % 4 == 2 ? bits - 1 : bits);
            std::memcpy(values + i, &bits, sizeof bits);
        }
    }

    const uint8_t *bytes_;
    std::size_t left_;
    std::unique_ptr<uint8_t[]> values_;
};

/// The definition of a quantized block, computed without any of the kernels' code; see bnb_core.ops.spec.
template <std::size_t entries>
class Definition {
  public:
    explicit Definition(const float *codebook) {
        for (std::size_t i = 0; i < entries; ++i) codes_[i] = static_cast<uint8_t>(i);
        std::stable_sort(codes_.begin(), codes_.end(), [&](uint8_t a, uint8_t b) { return codebook[a] < codebook[b]; });
        for (std::size_t i = 0; i + 1 < entries; ++i) midpoints_[i] = (codebook[codes_[i]] + codebook[codes_[i + 1]]) * 0.5f;
    }

    /// The largest magnitude of the values from `begin` to `end`; NaN if one of them is.
    static float absmax(const Arguments<entries> &arguments, int64_t begin, int64_t end) {
        float largest = 0;
        for (int64_t i = begin; i < end; ++i) {
            const float magnitude = std::fabs(arguments.value(i));
            if (!(magnitude <= largest)) largest = magnitude;
            if (std::isnan(largest)) break;
        }
        return largest;
    }

    /// The code of a value in a block of that absmax.
    uint8_t code(float value, float absmax) const {
        const float divisor = absmax > 0x1p-126f ? absmax : 0x1p-126f;
        float scaled = std::isnan(absmax) ? 0 : value * (1.0f / divisor);
        if (std::isnan(scaled)) scaled = 0;
        std::size_t rank = 0;
        for (float midpoint : midpoints_) rank += midpoint < scaled;
        return codes_[rank];
    }

  private:
    std::array<uint8_t, entries> codes_;
    std::array<float, entries - 1> midpoints_;
};
