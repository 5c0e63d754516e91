/// The tier in force, for the whole process.
#include "tier.hpp"

#include <atomic>

namespace bnb {

static std::atomic<Tier> chosen{Tier::baseline};

void set_tier(Tier tier) { chosen.store(tier, std::memory_order_relaxed); }

Tier current_tier() { return chosen.load(std::memory_order_relaxed); }

}  // namespace bnb
