// Entry points of LLM.int8().
#include <algorithm>

#include "arguments.h"
#include "bindings.h"
#include "launch.h"

namespace bnb {
namespace {

constexpr std::int64_t kMostGridRows = 65535;  // what a grid may have in its second dimension
constexpr int kAnyRows = 32;                   // tile of tiled_product.cuh
constexpr int kAnyOutputs = 64;
constexpr unsigned kFewBytes = 64 * 1024;      // shared memory of int8_few.cu: codes of x and the list of outliers

#define BNB_FLOATS(unit, name, ...) \
  { {unit, name "_float32", __VA_ARGS__}, {unit, name "_float16", __VA_ARGS__}, {unit, name "_bfloat16", __VA_ARGS__} }

Kernel quantize_rows_kernels[kDtypes] = BNB_FLOATS("int8", "int8_quantize_rows", 256);
Kernel inspect_columns_kernels[kDtypes] = BNB_FLOATS("int8", "int8_inspect_columns", 256);
Kernel quantize_columns_kernels[kDtypes] = BNB_FLOATS("int8", "int8_quantize_columns", 256);
Kernel matmul_dequant_kernels[kDtypes] = BNB_FLOATS("int8", "int8_matmul_dequant", 256);
Kernel dequantize_rows_kernels[kDtypes] = BNB_FLOATS("int8", "int8_dequantize_rows", 256);
Kernel linear_any_kernels[kDtypes] = BNB_FLOATS("int8_any", "int8_linear_any", 256);
Kernel transposed_any_kernels[kDtypes] = BNB_FLOATS("int8_any", "int8_linear_transposed_any", 256);
Kernel linear_one_kernels[kDtypes] = BNB_FLOATS("int8_few", "int8_linear_one", 512, kFewBytes);
Kernel linear_four_kernels[kDtypes] = BNB_FLOATS("int8_few", "int8_linear_four", 512, kFewBytes);
Kernel matmul_any_kernel("int8_any", "int8_matmul_any", 256);

// The tiles of int8_tensor.cu: outputs and rows, and the shared memory for three stages of 128 codes of each.
struct Tile {
  int outputs;
  int rows;
  constexpr unsigned shared_bytes() const { return 3 * 128 * static_cast<unsigned>(outputs + rows); }
};
constexpr Tile kMany{64, 64};
constexpr Tile kFew{128, 16};
Kernel matmul_many_kernel("int8_tensor", "int8_matmul_many", 256, kMany.shared_bytes());
Kernel matmul_few_kernel("int8_tensor", "int8_matmul_few", 256, kFew.shared_bytes());
Kernel linear_many_kernels[kDtypes] = BNB_FLOATS("int8_tensor", "int8_linear_many", 256, kMany.shared_bytes());
Kernel linear_few_kernels[kDtypes] = BNB_FLOATS("int8_tensor", "int8_linear_few", 256, kFew.shared_bytes());

// The same struct as in native/device/int8_linear.cuh.
struct Linear {
  Address y;
  Address x;
  Address row_absmax;
  Address codes;
  Address absmax;
  Address mask;
  Address bias;
  std::int64_t rows;
  std::int64_t N;
  std::int64_t K;
};

Grid grid_of(std::int64_t columns, std::int64_t rows) {
  return {static_cast<unsigned>(columns), static_cast<unsigned>(std::min(rows, kMostGridRows))};
}

unsigned row_blocks(std::int64_t rows) { return static_cast<unsigned>(std::min<std::int64_t>(rows, 1 << 20)); }

std::int64_t size_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

bool on_tensor_cores(const Device& device, std::int64_t K, Address a, Address b) {
  return device.architecture >= 80 && K % 16 == 0 && a % 16 == 0 && b % 16 == 0;
}

// Codes and absmax of rows, and the mask of outlier columns; all zeros without a threshold.
void quantize(const Call& call, int dtype, Address codes, Address absmax, Address mask, Address x, std::int64_t rows, std::int64_t K,
              float threshold) {
  const int own_mask = rows == 1;
  if (!own_mask) {
    launch(call, inspect_columns_kernels[dtype], grid_of(ceil_div(K, 32), 1), mask, Address(0), x, threshold > 0 ? rows : 0, K, threshold);
  }
  launch(call, quantize_rows_kernels[dtype], {row_blocks(rows)}, codes, absmax, mask, x, rows, K, threshold, own_mask);
}

void int8_quantize_rows(int device, Address stream, Address codes, Address absmax, Address mask, int dtype, Address x, std::int64_t rows,
                        std::int64_t K, float threshold) {
  Call call("int8_quantize_rows", device, stream);
  quantize(call, dtype, codes, absmax, mask, x, rows, K, threshold);
}

void int8_quantize_rows_cols(int device, Address stream, Address row_codes, Address row_absmax, Address column_codes,
                             Address column_absmax, Address mask, int dtype, Address x, std::int64_t rows, std::int64_t K,
                             float threshold) {
  Call call("int8_quantize_rows_cols", device, stream);
  launch(call, inspect_columns_kernels[dtype], grid_of(ceil_div(K, 32), 1), mask, column_absmax, x, rows, K, threshold);
  launch(call, quantize_rows_kernels[dtype], {row_blocks(rows)}, row_codes, row_absmax, mask, x, rows, K, threshold, 0);
  launch(call, quantize_columns_kernels[dtype], grid_of(ceil_div(K, 256), rows), column_codes, column_absmax, x, rows, K, threshold);
}

void int8_matmul(int device, Address stream, Address out, Address a, Address b, std::int64_t rows, std::int64_t N, std::int64_t K) {
  Call call("int8_matmul", device, stream);
  const bool tensor = on_tensor_cores(call.device, K, a, b);
  const Tile tile = !tensor ? Tile{kAnyOutputs, kAnyRows} : rows <= 16 ? kFew : kMany;
  Kernel& kernel = !tensor ? matmul_any_kernel : rows <= 16 ? matmul_few_kernel : matmul_many_kernel;
  for (std::int64_t first = 0; first < rows; first += kMostGridRows * tile.rows) {
    const std::int64_t count = std::min(rows - first, kMostGridRows * tile.rows);
    launch(call, kernel, grid_of(ceil_div(N, tile.outputs), ceil_div(count, tile.rows)), out + 4 * first * N, a + first * K, b, count, N, K);
  }
}

void int8_matmul_dequant(int device, Address stream, Address out, int dtype, Address products, Address row_absmax, Address column_absmax,
                         Address bias, std::int64_t rows, std::int64_t N) {
  Call call("int8_matmul_dequant", device, stream);
  launch(call, matmul_dequant_kernels[dtype], grid_of(ceil_div(N, 256), rows), out, products, row_absmax, column_absmax, bias, rows, N);
}

void int8_dequantize_rows(int device, Address stream, Address out, int dtype, Address codes, Address absmax, std::int64_t rows,
                          std::int64_t K) {
  Call call("int8_dequantize_rows", device, stream);
  launch(call, dequantize_rows_kernels[dtype], grid_of(ceil_div(K, 256), rows), out, codes, absmax, rows, K);
}

// Whether a call is one kernel that quantizes x itself.
bool fits_few(std::int64_t rows, std::int64_t K, Address codes) {
  return rows <= 4 && K % 16 == 0 && codes % 16 == 0 && ((rows == 1 ? 1 : 4) + 2) * K <= static_cast<std::int64_t>(kFewBytes);
}

// Bytes that a call needs besides its arguments, in this order: codes of x, their absmax, the mask of outlier columns.
std::int64_t codes_bytes(std::int64_t rows, std::int64_t K) { return ceil_div(rows * K, 16) * 16; }

std::int64_t int8_linear_scratch(std::int64_t rows, std::int64_t K) { return codes_bytes(rows, K) + 4 * rows + K; }

void int8_linear(int device, Address stream, Address out, int dtype, Address x, Address codes, Address absmax, Address bias,
                 float threshold, std::int64_t rows, std::int64_t N, std::int64_t K, Address scratch) {
  Call call("int8_linear", device, stream);
  Linear linear{out, x, 0, codes, absmax, 0, bias, rows, N, K};
  if (fits_few(rows, K, codes)) {
    Kernel& kernel = rows == 1 ? linear_one_kernels[dtype] : linear_four_kernels[dtype];
    launch(call, kernel, {blocks_for(call, kernel, ceil_div(N, 2 * 16))}, linear, threshold);
    return;
  }
  const Address x_codes = scratch, x_absmax = scratch + codes_bytes(rows, K), mask = x_absmax + 4 * rows;
  quantize(call, dtype, x_codes, x_absmax, mask, x, rows, K, threshold);
  const bool tensor = on_tensor_cores(call.device, K, x_codes, codes);
  const Tile tile = !tensor ? Tile{kAnyOutputs, kAnyRows} : rows <= 16 ? kFew : kMany;
  Kernel& kernel = !tensor ? linear_any_kernels[dtype] : rows <= 16 ? linear_few_kernels[dtype] : linear_many_kernels[dtype];
  linear.mask = threshold > 0 ? mask : 0;
  for (std::int64_t first = 0; first < rows; first += kMostGridRows * tile.rows) {
    linear.y = out + size_of(dtype) * first * N;
    linear.x = x + size_of(dtype) * first * K;
    linear.row_absmax = x_absmax + 4 * first;
    linear.rows = std::min(rows - first, kMostGridRows * tile.rows);
    launch(call, kernel, grid_of(ceil_div(N, tile.outputs), ceil_div(linear.rows, tile.rows)), linear, x_codes + first * K);
  }
}

void int8_linear_transposed(int device, Address stream, Address out, int dtype, Address g, Address codes, Address absmax,
                            std::int64_t rows, std::int64_t N, std::int64_t K) {
  Call call("int8_linear_transposed", device, stream);
  for (std::int64_t first = 0; first < rows; first += kMostGridRows * kAnyRows) {
    const std::int64_t count = std::min(rows - first, kMostGridRows * kAnyRows);
    launch(call, transposed_any_kernels[dtype], grid_of(ceil_div(K, kAnyOutputs), ceil_div(count, kAnyRows)),
           out + size_of(dtype) * first * K, g + size_of(dtype) * first * N, codes, absmax, count, N, K);
  }
}

}  // namespace

void bind_int8(nanobind::module_& module) {
  module.def("int8_quantize_rows", &int8_quantize_rows, NoLock());
  module.def("int8_quantize_rows_cols", &int8_quantize_rows_cols, NoLock());
  module.def("int8_matmul", &int8_matmul, NoLock());
  module.def("int8_matmul_dequant", &int8_matmul_dequant, NoLock());
  module.def("int8_dequantize_rows", &int8_dequantize_rows, NoLock());
  module.def("int8_linear", &int8_linear, NoLock());
  module.def("int8_linear_scratch", &int8_linear_scratch);
  module.def("int8_linear_transposed", &int8_linear_transposed, NoLock());
}

}  // namespace bnb
