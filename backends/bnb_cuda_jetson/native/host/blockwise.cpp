// Entry points of 8-bit blockwise quantization: quantize_blockwise and dequantize_blockwise.
#include "arguments.h"
#include "bindings.h"
#include "launch.h"

namespace bnb {
namespace {

constexpr int kQuantizeTile = 4096;        // elements that a block of threads quantizes at a time, in quantize_blocks.cuh
// Elements that a block of threads dequantizes before it ends, by dtype.
constexpr int kDequantizeTiles[kDtypes] = {256 * 4 * 4, 256 * 4 * 8, 256 * 4 * 8};

constexpr int kLargestBlock = 4096;        // of the kernels for powers of two, from 32 on; the same size in 4-bit ops

Kernel quantize_kernels[kDtypes] = {
    {"blockwise", "quantize_blockwise_float32", 256},
    {"blockwise", "quantize_blockwise_float16", 256},
    {"blockwise", "quantize_blockwise_bfloat16", 256},
};

Kernel quantize_any_kernels[kDtypes] = {
    {"blockwise", "quantize_any_float32", 256},
    {"blockwise", "quantize_any_float16", 256},
    {"blockwise", "quantize_any_bfloat16", 256},
};

Kernel dequantize_kernels[kDtypes] = {
    {"blockwise", "dequantize_blockwise_float32", 256},
    {"blockwise", "dequantize_blockwise_float16", 256},
    {"blockwise", "dequantize_blockwise_bfloat16", 256},
};

void quantize_blockwise(int device, Address stream, Address codes, Address absmax, Address x, int dtype, std::int64_t n,
                        Address codebook, std::int64_t blocksize) {
  Call call("quantize_blockwise", device, stream);
  int shift = exact_log2(blocksize);
  if (shift >= 5 && blocksize <= kLargestBlock) {
    Kernel& kernel = quantize_kernels[dtype];
    launch(call, kernel, {blocks_for(call, kernel, ceil_div(n, kQuantizeTile))}, codes, absmax, x, codebook, shift, n);
  } else {
    Kernel& kernel = quantize_any_kernels[dtype];
    launch(call, kernel, {blocks_for(call, kernel, ceil_div(n, blocksize))}, codes, absmax, x, codebook, blocksize, n);
  }
}

void dequantize_blockwise(int device, Address stream, Address out, int dtype, std::int64_t n, Address codes, Address absmax,
                          Address codebook, std::int64_t blocksize) {
  Call call("dequantize_blockwise", device, stream);
  Kernel& kernel = dequantize_kernels[dtype];
  launch(call, kernel, {static_cast<unsigned>(ceil_div(n, kDequantizeTiles[dtype]))}, out, codes, absmax, codebook, blocksize,
         exact_log2(blocksize), n);
}

}  // namespace

void bind_blockwise(nanobind::module_& module) {
  module.def("quantize_blockwise", &quantize_blockwise, NoLock());
  module.def("dequantize_blockwise", &dequantize_blockwise, NoLock());
}

}  // namespace bnb
