// Entry points of products with 4-bit weights that have one kernel, for any shape and alignment: gradients, experts and panels.
#include "bindings.h"
#include "weight_4bit.h"

namespace bnb {
namespace {

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

void gemm_4bit_transposed(int device, Address stream, Address out, int dtype, Address g, std::int64_t M, Address packed, Address absmax,
                          Address codebook, std::int64_t blocksize, std::int64_t N, std::int64_t K, Address nested_absmax,
                          Address nested_codebook, Address nested_offset, std::int64_t nested_blocksize) {
  Call call("gemm_4bit_transposed", device, stream);
  const Scales scales(absmax, nested_absmax, nested_codebook, nested_offset, nested_blocksize);
  const Weight4bit weight(packed, scales, codebook, blocksize, N, K);
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
  const Scales scales(absmax, nested_absmax, nested_codebook, nested_offset, nested_blocksize);
  const Weight4bit weight(packed, scales, codebook, blocksize, N, K);
  const std::int64_t across = ceil_div(columns, 8 * 256), down = ceil_div(panel_kernel.on(call.device).resident_blocks, across);
  const Grid grid{static_cast<unsigned>(across), static_cast<unsigned>(std::min({ceil_div(rows, 4), down, kMostGridRows}))};
  launch(call, panel_kernel, grid, out, weight, first_row, rows, first_column, columns);
}

void grouped_gemm_4bit(int device, Address stream, Address out, int dtype, Address x, std::int64_t tokens, Address packed, Address absmax,
                       Address codebook, std::int64_t blocksize, Address offsets, int experts, std::int64_t N, std::int64_t K,
                       bool transposed, Address nested_absmax, Address nested_codebook, Address nested_offset,
                       std::int64_t nested_blocksize) {
  Call call(transposed ? "grouped_gemm_4bit_transposed" : "grouped_gemm_4bit", device, stream);
  const Scales scales(absmax, nested_absmax, nested_codebook, nested_offset, nested_blocksize);
  const Weight4bit weight(packed, scales, codebook, blocksize, N, K);
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

void multiply_any(const Call& call, int dtype, Address out, Address x, const Weight4bit& weight, Address bias, std::int64_t M) {
  const std::int64_t size = dtype == kFloat32 ? 4 : 2;
  by_rows(M, kAnyRows, [&](std::int64_t first, std::int64_t count) {
    const Grid grid{static_cast<unsigned>(ceil_div(weight.N, kAnyOutputs)), static_cast<unsigned>(ceil_div(count, kAnyRows))};
    launch(call, any_kernels[dtype], grid, out + first * weight.N * size, x + first * weight.K * size, weight, bias, count, Address(0), 0);
  });
}

void bind_gemm_4bit_any(nanobind::module_& module) {
  module.def("gemm_4bit_transposed", &gemm_4bit_transposed, NoLock());
  module.def("gemm_4bit_panel", &gemm_4bit_panel, NoLock());
  module.def("grouped_gemm_4bit", &grouped_gemm_4bit, NoLock());
}

}  // namespace bnb
