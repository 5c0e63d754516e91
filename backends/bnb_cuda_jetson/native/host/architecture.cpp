#include <algorithm>

#include "device_code.h"

namespace bnb {
namespace {

// Code for a desktop device runs on later ones of the same major version. Between those and Jetsons nothing is promised.
bool is_jetson(int architecture) { return architecture == 72 || architecture == 87 || architecture == 110; }

bool runs_on(int architecture, int compute_capability) {
  if (architecture == compute_capability) return true;
  return !is_jetson(architecture) && !is_jetson(compute_capability) && architecture / 10 == compute_capability / 10 &&
         architecture < compute_capability;
}

}  // namespace

int architecture_for(int compute_capability) {
  int best = 0;
  for (int i = 0; i < kCubinCount; ++i) {
    if (runs_on(kCubins[i].architecture, compute_capability)) best = std::max(best, kCubins[i].architecture);
  }
  return best;
}

std::string dotted(int architecture) { return std::to_string(architecture / 10) + "." + std::to_string(architecture % 10); }

std::vector<int> architectures() {
  std::vector<int> all;
  for (int i = 0; i < kCubinCount; ++i) all.push_back(kCubins[i].architecture);
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return all;
}

}  // namespace bnb
