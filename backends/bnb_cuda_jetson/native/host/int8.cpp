// Entry points of LLM.int8().
#include <algorithm>

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "arguments.h"
#include "bindings.h"
#include "launch.h"
#include "paths.h"

namespace bnb {
namespace {

constexpr std::int64_t kMostGridRows = 65535;  // what a grid may have in its second dimension
constexpr int kAnyRows = 32;                   // of int8_linear_transposed_any
constexpr int kAnyOutputs = 64;
constexpr unsigned kFewBytes = 64 * 1024;      // shared memory of int8_few.cu: codes of x and the list of outliers

#define BNB_FLOATS(unit, name, ...) \
  { {unit, name "_float32", __VA_ARGS__}, {unit, name "_float16", __VA_ARGS__}, {unit, name "_bfloat16", __VA_ARGS__} }

Kernel quantize_rows_kernels[kDtypes] = BNB_FLOATS("int8", "int8_quantize_rows", 256);
Kernel inspect_columns_kernels[kDtypes] = BNB_FLOATS("int8", "int8_inspect_columns", 256);
Kernel quantize_columns_kernels[kDtypes] = BNB_FLOATS("int8", "int8_quantize_columns", 256);
Kernel matmul_dequant_kernels[kDtypes] = BNB_FLOATS("int8", "int8_matmul_dequant", 256);
Kernel dequantize_rows_kernels[kDtypes] = BNB_FLOATS("int8", "int8_dequantize_rows", 256);
Kernel transposed_any_kernels[kDtypes] = BNB_FLOATS("int8_any", "int8_linear_transposed_any", 256);
Kernel linear_one_kernels[kDtypes] = BNB_FLOATS("int8_few", "int8_linear_one", 512, kFewBytes);
Kernel linear_four_kernels[kDtypes] = BNB_FLOATS("int8_few", "int8_linear_four", 512, kFewBytes);

// Kernels that multiply codes by tiles of this many rows and outputs.
struct Tiled {
  int rows;
  int outputs;
  Kernel matmul;
  Kernel linear[kDtypes];
};
#define BNB_TILED(unit, name, ...) \
  {unit, "int8_matmul_" name, __VA_ARGS__}, BNB_FLOATS(unit, "int8_linear_" name, __VA_ARGS__)

Tiled tiled_any{kAnyRows, kAnyOutputs, BNB_TILED("int8_any", "any", 256)};
// Of int8_tensor.cu: shared memory for three stages of 128 codes of each row and output.
Tiled tensor_few{16, 128, BNB_TILED("int8_tensor", "few", 256, 3 * 128 * (16 + 128))};
Tiled tensor_many{64, 64, BNB_TILED("int8_tensor", "many", 256, 3 * 128 * (64 + 64))};
// Of int8_wmma.cu: for two stages of 64 codes of each, whose planes are 32 bytes apart, or for the products.
Tiled wmma_few{16, 128, BNB_TILED("int8_wmma", "wmma_few", 256, 2 * 4 * (16 * (16 + 128) + 32))};
Tiled wmma_many{64, 128, BNB_TILED("int8_wmma", "wmma_many", 256, 4 * 64 * (128 + 4))};

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

// ---------------------------------------------------------------------------------------------------------- which kernels multiply
struct Product {
  const Device& device;
  bool is_linear;  // rather than a product of codes
  std::int64_t rows, K;
  bool aligned;  // codes: for kernels that read 16 at a time
};

// One kernel that quantizes x itself.
bool fits_few(const Product& product) {
  const std::int64_t bytes = ((product.rows == 1 ? 1 : 4) + 2) * product.K;
  return product.is_linear && product.rows <= 4 && product.K % 16 == 0 && product.aligned &&
         bytes <= static_cast<std::int64_t>(kFewBytes) && linear_one_kernels[0].fits(product.device);
}
bool fits_wmma(const Product& product) { return product.K % 16 == 0 && product.aligned; }
bool fits_tensor(const Product& product) { return fits_wmma(product) && product.device.architecture >= 80; }
bool always(const Product&) { return true; }

constexpr Paths<Product, 4> kPaths{"int8", {{"few", fits_few}, {"tensor", fits_tensor}, {"wmma", fits_wmma}, {"any", always}}};

// name: of a path, or "automatic" for the first that takes the product.
const Path<Product>& choose(const char* name, const Product& product) {
  return std::strcmp(name, "automatic") ? kPaths.named(name, product) : kPaths.first(product);
}

Tiled& tiled(const Path<Product>& path, std::int64_t rows) {
  if (path.fits == always) return tiled_any;
  if (path.fits == fits_wmma) return rows <= wmma_few.rows ? wmma_few : wmma_many;
  return rows <= tensor_few.rows ? tensor_few : tensor_many;
}

// The names of the paths of int8_linear, or of int8_matmul, whose operands begin at multiples of 16 bytes; first the automatic one.
std::vector<std::string> int8_paths(int ordinal, bool is_linear, std::int64_t rows, std::int64_t K) {
  return kPaths.names({device(ordinal), is_linear, rows, K, true});
}

// ------------------------------------------------------------------------------------------------------------------ entry points
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

// path: "automatic", or one of those that int8_paths names.
void int8_matmul(int device, Address stream, Address out, Address a, Address b, std::int64_t rows, std::int64_t N, std::int64_t K,
                 const char* path) {
  Call call("int8_matmul", device, stream);
  Tiled& tile = tiled(choose(path, {call.device, false, rows, K, a % 16 == 0 && b % 16 == 0}), rows);
  for (std::int64_t first = 0; first < rows; first += kMostGridRows * tile.rows) {
    const std::int64_t count = std::min(rows - first, kMostGridRows * tile.rows);
    const Grid grid = grid_of(ceil_div(N, tile.outputs), ceil_div(count, tile.rows));
    launch(call, tile.matmul, grid, out + 4 * first * N, a + first * K, b, count, N, K);
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

// Bytes that a call needs besides its arguments, in this order: codes of x, their absmax, the mask of outlier columns.
std::int64_t codes_bytes(std::int64_t rows, std::int64_t K) { return ceil_div(rows * K, 16) * 16; }

std::int64_t int8_linear_scratch(std::int64_t rows, std::int64_t K) { return codes_bytes(rows, K) + 4 * rows + K; }

// path: "automatic", or one of those that int8_paths names.
void int8_linear(int device, Address stream, Address out, int dtype, Address x, Address codes, Address absmax, Address bias,
                 float threshold, std::int64_t rows, std::int64_t N, std::int64_t K, Address scratch, const char* path) {
  Call call("int8_linear", device, stream);
  Linear linear{out, x, 0, codes, absmax, 0, bias, rows, N, K};
  const Path<Product>& chosen = choose(path, {call.device, true, rows, K, codes % 16 == 0 && scratch % 16 == 0});
  if (chosen.fits == fits_few) {
    Kernel& kernel = rows == 1 ? linear_one_kernels[dtype] : linear_four_kernels[dtype];
    launch_overlapping(call, kernel, {blocks_for(call, kernel, ceil_div(N, 2 * 16))}, linear, threshold);
    return;
  }
  const Address x_codes = scratch, x_absmax = scratch + codes_bytes(rows, K), mask = x_absmax + 4 * rows;
  quantize(call, dtype, x_codes, x_absmax, mask, x, rows, K, threshold);
  Tiled& tile = tiled(chosen, rows);
  linear.mask = threshold > 0 ? mask : 0;
  for (std::int64_t first = 0; first < rows; first += kMostGridRows * tile.rows) {
    linear.y = out + size_of(dtype) * first * N;
    linear.x = x + size_of(dtype) * first * K;
    linear.row_absmax = x_absmax + 4 * first;
    linear.rows = std::min(rows - first, kMostGridRows * tile.rows);
    launch(call, tile.linear[dtype], grid_of(ceil_div(N, tile.outputs), ceil_div(linear.rows, tile.rows)), linear, x_codes + first * K);
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
  module.def("int8_paths", &int8_paths);
  module.def("int8_matmul", &int8_matmul, NoLock());
  module.def("int8_matmul_dequant", &int8_matmul_dequant, NoLock());
  module.def("int8_dequantize_rows", &int8_dequantize_rows, NoLock());
  module.def("int8_linear", &int8_linear, NoLock());
  module.def("int8_linear_scratch", &int8_linear_scratch);
  module.def("int8_linear_transposed", &int8_linear_transposed, NoLock());
}

}  // namespace bnb
