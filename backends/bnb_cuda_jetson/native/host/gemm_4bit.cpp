// Entry points of products with 4-bit weights: gemm_4bit, gemm_4bit_transposed and the grouped ones.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "arguments.h"
#include "bindings.h"
#include "launch.h"

namespace bnb {
namespace {

// The same struct as in native/device/weight_4bit.cuh.
struct Weight4bit {
  Address packed;
  Scales scales;
  Address codebook;
  std::int64_t N;
  std::int64_t K;
  std::int64_t first_block = 0;
  int blocksize_shift;
  int unused = 0;
};

// ------------------------------------------------------------------------------------------------------- any shape and alignment
constexpr int kAnyRows = 32;  // tile of tiled_product.cuh
constexpr int kAnyOutputs = 64;

Kernel any_kernels[kDtypes] = {
    {"gemm_4bit_any", "gemm_4bit_any_float32", 256},
    {"gemm_4bit_any", "gemm_4bit_any_float16", 256},
    {"gemm_4bit_any", "gemm_4bit_any_bfloat16", 256},
};
Kernel transposed_kernels[kDtypes] = {
    {"gemm_4bit_any", "gemm_4bit_transposed_any_float32", 256},
    {"gemm_4bit_any", "gemm_4bit_transposed_any_float16", 256},
    {"gemm_4bit_any", "gemm_4bit_transposed_any_bfloat16", 256},
};

constexpr std::int64_t kMostGridRows = 65535;  // what a grid may have in its second dimension

// Rows of x are tiles in a grid's second dimension: as many launches as that needs.
template <class Launch>
void by_rows(std::int64_t rows, std::int64_t tile, Launch launch_rows) {
  for (std::int64_t first = 0; first < rows; first += kMostGridRows * tile) launch_rows(first, std::min(rows - first, kMostGridRows * tile));
}

// What is multiplied, as far as kernels may depend on it.
struct Product {
  const Device& device;
  int dtype;
  std::int64_t M, N, K;
  int blocksize_shift;
  bool nested;
  bool aligned;  // for kernels that read 16 bytes at a time

  bool has_tensor_cores() const { return device.architecture >= 80 && dtype != kFloat32; }
  bool one_scale_for_64() const { return K % 64 == 0 && blocksize_shift >= 6; }
};

// ---------------------------------------------------------------------------------------------------------------- few rows of x
// The kernels of gemm_4bit_few.cu.
struct FewKernel {
  int tokens;       // rows of x that it multiplies at a time
  int warps[2];     // plain and nested
  Kernel plain;
  Kernel nested;

  // table_words, scale_run: of the kernel's dot.
  static constexpr unsigned shared_bytes(unsigned table_words, unsigned tokens, unsigned scale_run, unsigned warps, bool nested) {
    const unsigned piece = 16 * 128 + 16 * (256 / scale_run + 1) * 4;
    return 4 * (table_words + 2 * warps * 16 * tokens + (nested ? 256 : 0)) + warps * 3 * piece;
  }

  constexpr FewKernel(const char* plain_name, const char* nested_name, unsigned table_words, unsigned tokens, unsigned scale_run,
                      unsigned plain_warps, unsigned nested_warps)
      : tokens(static_cast<int>(tokens)),
        warps{static_cast<int>(plain_warps), static_cast<int>(nested_warps)},
        plain("gemm_4bit_few", plain_name, 32 * plain_warps, shared_bytes(table_words, tokens, scale_run, plain_warps, false)),
        nested("gemm_4bit_few", nested_name, 32 * nested_warps, shared_bytes(table_words, tokens, scale_run, nested_warps, true)) {}
};

// What a block may have, on Xavier and on Orin.
constexpr unsigned kSharedOfXavier = 96 * 1024;
constexpr unsigned kSharedOfOrin = 163 * 1024;

constexpr unsigned kPairTable = 256 * 32;
constexpr unsigned kValueTable = 16 * 32;

#define BNB_FEW(name, ...) \
  { "gemm_4bit_few_" name, "gemm_4bit_few_" name "_nested", __VA_ARGS__ }
#define BNB_SIXTEEN_BITS(name, ...) \
  { BNB_FEW(name "_float16", kPairTable, __VA_ARGS__), BNB_FEW(name "_bfloat16", kPairTable, __VA_ARGS__) }

// Of float16 and bfloat16, from sm_80 on.
FewKernel one_row[2] = BNB_SIXTEEN_BITS("one", 1, 64, 16, 12);
FewKernel four_rows[2] = BNB_SIXTEEN_BITS("rows4", 4, 64, 16, 16);
FewKernel eight_rows[2] = BNB_SIXTEEN_BITS("rows8", 8, 64, 16, 16);
FewKernel sixteen_rows[2] = BNB_SIXTEEN_BITS("rows16", 16, 64, 12, 12);
FewKernel wide_sixteen_rows[2] = BNB_SIXTEEN_BITS("wide_rows16", 16, 64, 16, 12);  // from sm_90 on
FewKernel thirty_two_rows[2] = BNB_SIXTEEN_BITS("rows32", 32, 64, 8, 8);
FewKernel small_blocks[2] = BNB_SIXTEEN_BITS("blocks32", 2, 32, 12, 12);
static_assert(FewKernel::shared_bytes(kPairTable, 1, 64, 16, false) <= kSharedOfOrin, "one row");
static_assert(FewKernel::shared_bytes(kPairTable, 8, 64, 16, true) <= kSharedOfOrin, "eight rows");
static_assert(FewKernel::shared_bytes(kPairTable, 16, 64, 12, true) <= kSharedOfOrin, "sixteen rows");
static_assert(FewKernel::shared_bytes(kPairTable, 32, 64, 8, true) <= kSharedOfOrin, "32 rows");

// Of float32, and before sm_80 of all three.
#define BNB_SCALAR(name, tokens)                                                                                            \
  {                                                                                                                         \
    BNB_FEW(name "_float32", kValueTable, tokens, 32, 8, 8), BNB_FEW(name "_float16", kValueTable, tokens, 32, 8, 8),   \
        BNB_FEW(name "_bfloat16", kValueTable, tokens, 32, 8, 8)                                                          \
  }
FewKernel scalar_one[kDtypes] = BNB_SCALAR("scalar1", 1);
FewKernel scalar_two[kDtypes] = BNB_SCALAR("scalar2", 2);
static_assert(FewKernel::shared_bytes(kValueTable, 2, 32, 8, true) <= kSharedOfXavier, "two rows, without tensor cores");

FewKernel& few_kernel(const Product& product) {
  if (!product.has_tensor_cores()) return product.M == 1 ? scalar_one[product.dtype] : scalar_two[product.dtype];
  const int index = product.dtype - kFloat16;
  if (!product.one_scale_for_64()) return small_blocks[index];
  if (product.M == 1) return one_row[index];
  if (product.M <= 8) return product.M <= 4 ? four_rows[index] : eight_rows[index];
  if (product.M > 16) return thirty_two_rows[index];
  return product.device.architecture >= 90 ? wide_sixteen_rows[index] : sixteen_rows[index];
}

bool fits_few(const Product& product) { return product.aligned && product.K % 32 == 0 && product.K < (std::int64_t(1) << 31) - 4096; }

// Rows up to which these win over the kernels for any shape.
std::int64_t most_few(const Product& product) { return product.has_tensor_cores() ? 1 << 30 : 8; }

// Warps that share a tile of 16 rows of W, as a power of two. The estimate, in pieces of 256 columns: the tiles that a team of warps takes
// one after the other, each of its share of pieces and about one more for the exchange of sums; and from some number of warps on,
// those of a multiprocessor slow each other down.
int split_shift(const Device& device, const Weight4bit& weight, int warps) {
  constexpr double kWarpsAtFullSpeed = 8;
  const std::int64_t tiles = ceil_div(weight.N, 16), pieces = ceil_div(weight.K, 256);
  int best_shift = 0;
  double best = 0;
  for (int shift = 0; shift <= 4 && (1 << shift) <= pieces && warps % (1 << shift) == 0; ++shift) {
    const std::int64_t teams = static_cast<std::int64_t>(device.multiprocessors) * (warps >> shift);
    const double busy = static_cast<double>(std::min(tiles, teams) << shift) / device.multiprocessors;
    const double cost = ceil_div(tiles, teams) * (ceil_div(pieces, 1 << shift) + 1) * std::max(kWarpsAtFullSpeed, busy);
    if (!shift || cost < best) {
      best = cost;
      best_shift = shift;
    }
  }
  return best_shift;
}

void multiply_few(const Call& call, const Product& product, Address out, Address x, const Weight4bit& weight, Address bias) {
  FewKernel& few = few_kernel(product);
  Kernel& kernel = product.nested ? few.nested : few.plain;
  const int shift = split_shift(call.device, weight, few.warps[product.nested]);
  launch_overlapping(call, kernel, {blocks_for(call, kernel, ceil_div(weight.N, 16))}, out, x, weight, bias, product.M, shift);
}

// ------------------------------------------------------------------------------------------------------ one row of x, larger weights
// The kernels of gemm_4bit_one.cu, of float16 and bfloat16 from sm_80 on.
constexpr unsigned kOneBytes = 4 * kPairTable + 8 * 3 * (8 * 256 + 8 * 8 * 4);

Kernel one_kernels[2] = {
    {"gemm_4bit_one", "gemm_4bit_one_float16", 256, kOneBytes},
    {"gemm_4bit_one", "gemm_4bit_one_bfloat16", 256, kOneBytes},
};

// Elements of W on a multiprocessor from which this is faster than the kernels for few rows, and from which two blocks are than one.
constexpr std::int64_t kWorthOne = 64 << 10, kWorthTwoBlocks = 1 << 20;

bool fits_one(const Product& product) {
  return fits_few(product) && product.M == 1 && product.has_tensor_cores() && product.one_scale_for_64() && !product.nested;
}

bool is_worth_one(const Product& product) { return product.N * product.K >= kWorthOne * product.device.multiprocessors; }

void multiply_one(const Call& call, const Product& product, Address out, Address x, const Weight4bit& weight, Address bias) {
  Kernel& kernel = one_kernels[product.dtype - kFloat16];
  const std::int64_t groups = ceil_div(weight.N, 8), each = call.device.multiprocessors;
  const bool two = weight.N * weight.K >= kWorthTwoBlocks * each;
  launch_overlapping(call, kernel, {blocks_for(call, kernel, std::min(groups, two ? 2 * each : each))}, out, x, weight, bias);
}

// --------------------------------------------------------------------------------------------------------------- many rows of x
// The kernels of gemm_4bit_many.cu, of float16 and bfloat16 from sm_80 on.
constexpr int kManyRows = 128;    // of W that a block multiplies
constexpr int kManyDepth = 128;   // columns that it takes at a time: a stage
constexpr int kFewestStages = 2;  // that are worth a block

constexpr int kManyTokens[] = {32, 64, 128};  // rows of x of a tile

constexpr unsigned many_shared_bytes(unsigned tokens) { return 4 * kPairTable + 3 * (kManyRows * 64 + 2 * kManyRows * 8 + tokens * 256); }

static_assert(many_shared_bytes(128) <= kSharedOfOrin, "128 rows of x");

#define BNB_MANY(name)                                                                   \
  {                                                                                      \
    {"gemm_4bit_many", "gemm_4bit_many32_" name, 256, many_shared_bytes(32)},            \
        {"gemm_4bit_many", "gemm_4bit_many64_" name, 256, many_shared_bytes(64)},        \
        {"gemm_4bit_many", "gemm_4bit_many128_" name, 256, many_shared_bytes(128)},      \
  }
Kernel many_kernels[2][3] = {BNB_MANY("float16"), BNB_MANY("bfloat16")};
Kernel many_nested_kernels[2][3] = {BNB_MANY("float16_nested"), BNB_MANY("bfloat16_nested")};
Kernel add_kernels[2] = {
    {"gemm_4bit_many", "gemm_4bit_add_float16", 256},
    {"gemm_4bit_many", "gemm_4bit_add_bfloat16", 256},
};

// How the kernels for many rows cut a product: the size of tiles of rows of x, as an index of kManyTokens, and blocks that share the
// columns, `stages` stages each.
struct Cut {
  int size;
  int parts;
  int stages;
};

// The cut that takes the fewest clocks, by an estimate that src/bnb_cuda_jetson/panels.py makes too: clocks of a stage of each size, of
// a launch, and bytes in a clock and multiprocessor of the sums of parts, which are written and read again. As measured on sm_90.
Cut cut_many(const Product& product) {
  constexpr double kStageClocks[] = {1740, 2400, 3860}, kLaunchClocks = 2000, kSumBytes = 19;
  const Device& device = product.device;
  const std::int64_t M = product.M, N = product.N, K = product.K;
  const std::int64_t stages = ceil_div(K, kManyDepth);
  Cut best{};
  double fewest = 0;
  for (int size = 0; size < 3; ++size) {
    const std::int64_t blocks = ceil_div(N, kManyRows) * ceil_div(M, kManyTokens[size]);
    const std::int64_t wanted = std::max<std::int64_t>(1, std::min(device.multiprocessors / blocks, stages / kFewestStages));
    const std::int64_t each = ceil_div(stages, wanted), parts = ceil_div(stages, each);
    double clocks = static_cast<double>(ceil_div(blocks * parts, device.multiprocessors)) * each * kStageClocks[size];
    if (parts > 1) clocks += kLaunchClocks + 8.0 * parts * M * N / (kSumBytes * device.multiprocessors);
    if (!size || clocks < fewest) {
      fewest = clocks;
      best = {size, static_cast<int>(parts), static_cast<int>(each)};
    }
  }
  return best;
}

// Products of a multiprocessor up to which the kernels for few rows are faster: those for many take longer to start.
constexpr double kSmallProduct = 1.2e6;

bool fits_many(const Product& product) { return fits_few(product) && product.has_tensor_cores() && product.one_scale_for_64(); }

bool is_worth_many(const Product& product) {
  const bool small = product.M <= 32 && static_cast<double>(product.M) * product.N * product.K <=
                                            kSmallProduct * product.device.multiprocessors;
  return product.M > 16 && !small;
}

void multiply_many(const Call& call, const Product& product, Address out, Address x, const Weight4bit& weight, Address bias,
                   Address scratch) {
  const Cut cut = cut_many(product);
  const std::int64_t M = product.M;
  const int index = product.dtype - kFloat16, tokens = kManyTokens[cut.size];
  Kernel& kernel = (product.nested ? many_nested_kernels : many_kernels)[index][cut.size];
  const Address sums = cut.parts > 1 ? scratch : 0;
  by_rows(M, tokens, [&](std::int64_t first, std::int64_t count) {  // more than one launch only where there is one part
    const Grid grid{static_cast<unsigned>(ceil_div(weight.N, kManyRows)), static_cast<unsigned>(ceil_div(count, tokens)),
                    static_cast<unsigned>(cut.parts)};
    launch_overlapping(call, kernel, grid, out + 2 * first * weight.N, sums, x + 2 * first * weight.K, weight, bias, count, cut.stages);
  });
  if (cut.parts > 1) {
    Kernel& add = add_kernels[index];
    launch_overlapping(call, add, {blocks_for(call, add, ceil_div(M * weight.N, 256))}, out, sums, bias, M, weight.N, cut.parts);
  }
}

// ------------------------------------------------------------------------------------------------------------------ which of these
struct Path {
  const char* name;
  bool (*fits)(const Product&);
  bool (*is_worth)(const Product&);  // where it fits, and none before it is
};

constexpr Path kMany{"many", fits_many, is_worth_many};
constexpr Path kOne{"one", fits_one, is_worth_one};
constexpr Path kFew{"few", fits_few, [](const Product& product) { return product.M <= most_few(product); }};
constexpr Path kAny{"any", [](const Product&) { return true; }, [](const Product&) { return true; }};
constexpr const Path* kPaths[] = {&kMany, &kOne, &kFew, &kAny};
constexpr const char* kAutomatic = "automatic";

const Path& choose(const Product& product) {
  return **std::find_if(std::begin(kPaths), std::end(kPaths), [&](const Path* path) { return path->fits(product) && path->is_worth(product); });
}

const Path& path_named(const char* name, const Product& product) {
  if (!std::strcmp(name, kAutomatic)) return choose(product);
  for (const Path* path : kPaths) {
    if (!std::strcmp(name, path->name) && path->fits(product)) return *path;
  }
  throw std::invalid_argument(std::string("gemm_4bit: no path '") + name + "' takes this product; gemm_4bit_paths names those that do");
}

// ------------------------------------------------------------------------------------------------------------------ entry points
// The names of the paths that take a product whose operands begin at multiples of 16 bytes; first the one that is automatic.
std::vector<std::string> gemm_4bit_paths(int ordinal, int dtype, std::int64_t M, std::int64_t N, std::int64_t K, std::int64_t blocksize,
                                         bool nested) {
  const Product product{device(ordinal), dtype, M, N, K, exact_log2(blocksize), nested, true};
  std::vector<std::string> names{choose(product).name};
  for (const Path* path : kPaths) {
    if (path->fits(product) && path->name != names[0]) names.push_back(path->name);
  }
  return names;
}

// Bytes of scratch memory for a call, for sums of parts of the columns.
std::int64_t gemm_4bit_scratch(int ordinal, int dtype, std::int64_t M, std::int64_t N, std::int64_t K, std::int64_t blocksize, bool nested,
                               const char* path) {
  const Product product{device(ordinal), dtype, M, N, K, exact_log2(blocksize), nested, true};
  if (&path_named(path, product) != &kMany) return 0;
  const Cut cut = cut_many(product);
  return cut.parts > 1 ? 4 * cut.parts * M * N : 0;
}

// path: "automatic", or one of those that gemm_4bit_paths names.
void gemm_4bit(int device, Address stream, Address out, int dtype, Address x, std::int64_t M, Address packed, Address absmax,
               Address codebook, std::int64_t blocksize, std::int64_t N, std::int64_t K, Address bias, Address nested_absmax,
               Address nested_codebook, Address nested_offset, std::int64_t nested_blocksize, Address scratch, const char* path) {
  Call call("gemm_4bit", device, stream);
  Weight4bit weight{packed, {absmax, nested_absmax, nested_codebook, nested_offset, nested_blocksize}, codebook, N, K, 0,
                    exact_log2(blocksize)};
  const bool aligned = packed % 16 == 0 && x % 16 == 0 && weight.scales.nested_shift >= 0;
  const Product product{call.device, dtype, M, N, K, weight.blocksize_shift, nested_absmax != 0, aligned};
  const Path& chosen = path_named(path, product);
  if (&chosen == &kMany) return multiply_many(call, product, out, x, weight, bias, scratch);
  if (&chosen == &kOne) return multiply_one(call, product, out, x, weight, bias);
  if (&chosen == &kFew) return multiply_few(call, product, out, x, weight, bias);
  const std::int64_t size = dtype == kFloat32 ? 4 : 2;
  by_rows(M, kAnyRows, [&](std::int64_t first, std::int64_t count) {
    const Grid grid{static_cast<unsigned>(ceil_div(N, kAnyOutputs)), static_cast<unsigned>(ceil_div(count, kAnyRows))};
    launch(call, any_kernels[dtype], grid, out + first * N * size, x + first * K * size, weight, bias, count, Address(0), 0);
  });
}

void gemm_4bit_transposed(int device, Address stream, Address out, int dtype, Address g, std::int64_t M, Address packed, Address absmax,
                          Address codebook, std::int64_t blocksize, std::int64_t N, std::int64_t K, Address nested_absmax,
                          Address nested_codebook, Address nested_offset, std::int64_t nested_blocksize) {
  Call call("gemm_4bit_transposed", device, stream);
  Weight4bit weight{packed, {absmax, nested_absmax, nested_codebook, nested_offset, nested_blocksize}, codebook, N, K, 0,
                    exact_log2(blocksize)};
  const std::int64_t size = dtype == kFloat32 ? 4 : 2;
  by_rows(M, kAnyRows, [&](std::int64_t first, std::int64_t count) {
    const Grid grid{static_cast<unsigned>(ceil_div(K, kAnyOutputs)), static_cast<unsigned>(ceil_div(count, kAnyRows))};
    launch(call, transposed_kernels[dtype], grid, out + first * K * size, g + first * N * size, weight, count, Address(0), 0);
  });
}

Kernel panel_kernel("gemm_4bit_panel", "gemm_4bit_panel", 256);

// Dequantize a part of a weight to bfloat16. K and the column numbers are multiples of 8, `packed` of 4.
void gemm_4bit_panel(int device, Address stream, Address out, Address packed, Address absmax, Address codebook, std::int64_t blocksize,
                     std::int64_t N, std::int64_t K, std::int64_t first_row, std::int64_t rows, std::int64_t first_column,
                     std::int64_t columns, Address nested_absmax, Address nested_codebook, Address nested_offset,
                     std::int64_t nested_blocksize) {
  Call call("gemm_4bit", device, stream);
  Weight4bit weight{packed, {absmax, nested_absmax, nested_codebook, nested_offset, nested_blocksize}, codebook, N, K, 0,
                    exact_log2(blocksize)};
  const std::int64_t across = ceil_div(columns, 8 * 256), down = ceil_div(panel_kernel.on(call.device).resident_blocks, across);
  const Grid grid{static_cast<unsigned>(across), static_cast<unsigned>(std::min({ceil_div(rows, 4), down, kMostGridRows}))};
  launch(call, panel_kernel, grid, out, weight, first_row, rows, first_column, columns);
}

void grouped_gemm_4bit(int device, Address stream, Address out, int dtype, Address x, std::int64_t tokens, Address packed, Address absmax,
                       Address codebook, std::int64_t blocksize, Address offsets, int experts, std::int64_t N, std::int64_t K,
                       bool transposed, Address nested_absmax, Address nested_codebook, Address nested_offset,
                       std::int64_t nested_blocksize) {
  Call call(transposed ? "grouped_gemm_4bit_transposed" : "grouped_gemm_4bit", device, stream);
  Weight4bit weight{packed, {absmax, nested_absmax, nested_codebook, nested_offset, nested_blocksize}, codebook, N, K, 0,
                    exact_log2(blocksize)};
  // Which tokens are whose is known on the device alone: as many tiles of tokens as there can be, those left over do nothing.
  const std::int64_t tiles = tokens / kAnyRows + std::min<std::int64_t>(experts, tokens);
  const Grid grid{static_cast<unsigned>(ceil_div(transposed ? K : N, kAnyOutputs)), static_cast<unsigned>(std::min(tiles, kMostGridRows))};
  if (transposed) {
    launch(call, transposed_kernels[dtype], grid, out, x, weight, tokens, offsets, experts);
  } else {
    launch(call, any_kernels[dtype], grid, out, x, weight, Address(0), tokens, offsets, experts);
  }
}

}  // namespace

void bind_gemm_4bit(nanobind::module_& module) {
  module.def("gemm_4bit", &gemm_4bit, NoLock());
  module.def("gemm_4bit_paths", &gemm_4bit_paths);
  module.def("gemm_4bit_scratch", &gemm_4bit_scratch);
  module.def("gemm_4bit_transposed", &gemm_4bit_transposed, NoLock());
  module.def("gemm_4bit_panel", &gemm_4bit_panel, NoLock());
  module.def("grouped_gemm_4bit", &grouped_gemm_4bit, NoLock());
}

}  // namespace bnb
