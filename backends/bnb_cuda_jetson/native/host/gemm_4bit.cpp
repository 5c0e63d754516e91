// Entry points of gemm_4bit, one of whose kernels the caller names.
#include <utility>

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "paths.h"
#include "weight_4bit.h"

namespace bnb {
namespace {

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
  bool whole_runs() const { return aligned && K % 32 == 0 && K < (std::int64_t(1) << 31) - 4096; }  // of 16 bytes
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

bool fits_few(const Product& product) {
  const FewKernel& few = few_kernel(product);
  return product.whole_runs() && (product.nested ? few.nested : few.plain).fits(product.device);
}

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

// Elements of W on a multiprocessor from which two blocks are faster than one.
constexpr std::int64_t kWorthTwoBlocks = 1 << 20;

// Nested scales take longer here than with the kernels for few rows.
bool fits_one(const Product& product) {
  return product.whole_runs() && product.M == 1 && product.has_tensor_cores() && product.one_scale_for_64() && !product.nested &&
         one_kernels[0].fits(product.device);
}

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

// How the kernels for many rows cut the columns: into parts for different blocks, of `stages` stages each.
struct Cut {
  int parts;
  int stages;
};

// As many parts as there are multiprocessors for, if each has work enough. tokens: rows of x of a tile.
Cut cut_many(std::int64_t multiprocessors, int tokens, std::int64_t M, std::int64_t N, std::int64_t K) {
  const std::int64_t stages = ceil_div(K, kManyDepth), blocks = ceil_div(N, kManyRows) * ceil_div(M, tokens);
  const std::int64_t wanted = std::max<std::int64_t>(1, std::min(multiprocessors / blocks, stages / kFewestStages));
  const std::int64_t each = ceil_div(stages, wanted);
  return {static_cast<int>(ceil_div(stages, each)), static_cast<int>(each)};
}

// size: of tiles, as an index of kManyTokens.
template <int size>
bool fits_many(const Product& product) {
  return product.whole_runs() && product.has_tensor_cores() && product.one_scale_for_64() && many_kernels[0][size].fits(product.device);
}

void multiply_many(const Call& call, const Product& product, int size, Address out, Address x, const Weight4bit& weight, Address bias,
                   Address scratch) {
  const std::int64_t M = product.M;
  const int index = product.dtype - kFloat16, tokens = kManyTokens[size];
  const Cut cut = cut_many(call.device.multiprocessors, tokens, M, weight.N, weight.K);
  Kernel& kernel = (product.nested ? many_nested_kernels : many_kernels)[index][size];
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

// ------------------------------------------------------------------------------------------------- tensor cores before sm_80
// The kernels of gemm_4bit_wmma.cu, of float16: by the rows of x of a tile.
constexpr int kWmmaTokens[] = {16, 32, 64};
constexpr int kWmmaRows = 128;  // of W that a block multiplies

constexpr unsigned wmma_shared_bytes(unsigned tokens) {
  const unsigned plane = 32 * (kWmmaRows + 1) + 32 * (tokens + 1);  // 16 columns
  return 4 * kPairTable + 2 * (4 * plane + 4 * kWmmaRows);
}
static_assert(wmma_shared_bytes(64) <= kSharedOfXavier, "64 rows of x");

Kernel wmma_kernels[3] = {
    {"gemm_4bit_wmma", "gemm_4bit_wmma16", 256, wmma_shared_bytes(16)},
    {"gemm_4bit_wmma", "gemm_4bit_wmma32", 256, wmma_shared_bytes(32)},
    {"gemm_4bit_wmma", "gemm_4bit_wmma64", 256, wmma_shared_bytes(64)},
};

bool fits_wmma(const Product& product) {
  return product.whole_runs() && product.dtype == kFloat16 && product.one_scale_for_64() && wmma_kernels[2].fits(product.device);
}

void multiply_wmma(const Call& call, const Product& product, Address out, Address x, const Weight4bit& weight, Address bias) {
  const int size = product.M <= 16 ? 0 : product.M <= 32 ? 1 : 2, tokens = kWmmaTokens[size];
  by_rows(product.M, tokens, [&](std::int64_t first, std::int64_t count) {
    const Grid grid{static_cast<unsigned>(ceil_div(weight.N, kWmmaRows)), static_cast<unsigned>(ceil_div(count, tokens))};
    launch(call, wmma_kernels[size], grid, out + 2 * first * weight.N, x + 2 * first * weight.K, weight, bias, count);
  });
}

// ------------------------------------------------------------------------------------------------------------- which of these
// src/bnb_cuda_jetson/choice.py chooses.
constexpr Paths<Product, 7> kPaths{"gemm_4bit",
                                   {{"any", [](const Product&) { return true; }},
                                    {"one", fits_one},
                                    {"few", fits_few},
                                    {"wmma", fits_wmma},
                                    {"many32", fits_many<0>, 0},
                                    {"many64", fits_many<1>, 1},
                                    {"many128", fits_many<2>, 2}}};

// ------------------------------------------------------------------------------------------------------------------ entry points
// The names of the paths that take a product whose operands begin at multiples of 16 bytes.
std::vector<std::string> gemm_4bit_paths(int ordinal, int dtype, std::int64_t M, std::int64_t N, std::int64_t K, std::int64_t blocksize,
                                         bool nested) {
  return kPaths.names({device(ordinal), dtype, M, N, K, exact_log2(blocksize), nested, true});
}

// Bytes of scratch memory that a path needs, for sums of parts of the columns.
std::int64_t gemm_4bit_scratch(int ordinal, int dtype, std::int64_t M, std::int64_t N, std::int64_t K, std::int64_t blocksize, bool nested,
                               const char* path) {
  const Product product{device(ordinal), dtype, M, N, K, exact_log2(blocksize), nested, true};
  const int size = kPaths.named(path, product).size;
  if (size < 0) return 0;
  const Cut cut = cut_many(product.device.multiprocessors, kManyTokens[size], M, N, K);
  return cut.parts > 1 ? 4 * cut.parts * M * N : 0;
}

// How kernels for many rows, with tiles of `tokens` rows, cut the columns: into how many parts, of how many stages of 128 columns.
std::pair<int, int> gemm_4bit_cut(std::int64_t multiprocessors, int tokens, std::int64_t M, std::int64_t N, std::int64_t K) {
  const Cut cut = cut_many(multiprocessors, tokens, M, N, K);
  return {cut.parts, cut.stages};
}

// path: one of those that gemm_4bit_paths names.
void gemm_4bit(int device, Address stream, Address out, int dtype, Address x, std::int64_t M, Address packed, Address absmax,
               Address codebook, std::int64_t blocksize, std::int64_t N, std::int64_t K, Address bias, Address nested_absmax,
               Address nested_codebook, Address nested_offset, std::int64_t nested_blocksize, Address scratch, const char* path) {
  Call call("gemm_4bit", device, stream);
  const Scales scales(absmax, nested_absmax, nested_codebook, nested_offset, nested_blocksize);
  const Weight4bit weight(packed, scales, codebook, blocksize, N, K);
  const bool aligned = packed % 16 == 0 && x % 16 == 0 && weight.scales.nested_shift >= 0;
  const Product product{call.device, dtype, M, N, K, weight.blocksize_shift, nested_absmax != 0, aligned};
  const Path<Product>& chosen = kPaths.named(path, product);
  if (chosen.size >= 0) return multiply_many(call, product, chosen.size, out, x, weight, bias, scratch);
  if (chosen.fits == fits_one) return multiply_one(call, product, out, x, weight, bias);
  if (chosen.fits == fits_wmma) return multiply_wmma(call, product, out, x, weight, bias);
  if (chosen.fits == fits_few) return multiply_few(call, product, out, x, weight, bias);
  multiply_any(call, dtype, out, x, weight, bias, M);
}

}  // namespace

void bind_gemm_4bit(nanobind::module_& module) {
  module.def("gemm_4bit", &gemm_4bit, NoLock());
  module.def("gemm_4bit_paths", &gemm_4bit_paths);
  module.def("gemm_4bit_scratch", &gemm_4bit_scratch);
  module.def("gemm_4bit_cut", &gemm_4bit_cut);
}

}  // namespace bnb
