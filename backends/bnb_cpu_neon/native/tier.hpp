/// Which instructions kernels may use beyond ARMv8.0, set once by whoever looked at the CPU.
#pragma once

#include <array>
#include <cstddef>

namespace bnb {

/// Each tier includes those before it; the order is that of bnb_cpu_neon.cpu.TIERS.
enum class Tier {
    baseline,  ///< ARMv8.0 with NEON: every 64-bit core, NVIDIA Carmel (Xavier) among them
    dotprod,   ///< int8 dot products: Cortex-A76, A78AE (Orin)
    i8mm,      ///< int8 and bfloat16 matrix products: Neoverse V2, V3AE (Thor)
};
constexpr std::size_t tier_count = 3;

void set_tier(Tier tier);
Tier current_tier();

/// One function pointer for each tier; a tier without an inner loop of its own repeats the one below.
template <class Function>
using TierTable = std::array<Function *, tier_count>;

template <class Function>
Function *best(const TierTable<Function> &table) {
    return table[static_cast<std::size_t>(current_tier())];
}

}  // namespace bnb
