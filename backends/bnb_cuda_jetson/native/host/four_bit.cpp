// Entry points of 4-bit quantization: quantize_4bit and dequantize_4bit.
#include "arguments.h"
#include "bindings.h"
#include "launch.h"

namespace bnb {
namespace {

constexpr int kQuantizeTile = 4096;        // elements that a block of threads quantizes at a time, in quantize_blocks.cuh
// Elements that a block of threads dequantizes before it ends, by dtype.
constexpr int kDequantizeTiles[kDtypes] = {256 * 4 * 4, 256 * 4 * 8, 256 * 4 * 8};

Kernel quantize_kernels[kDtypes] = {
    {"four_bit", "quantize_4bit_float32", 256},
    {"four_bit", "quantize_4bit_float16", 256},
    {"four_bit", "quantize_4bit_bfloat16", 256},
};

Kernel dequantize_kernels[kDtypes] = {
    {"four_bit", "dequantize_4bit_float32", 256},
    {"four_bit", "dequantize_4bit_float16", 256},
    {"four_bit", "dequantize_4bit_bfloat16", 256},
};

void quantize_4bit(int device, Address stream, Address packed, Address absmax, Address x, int dtype, std::int64_t n, Address codebook,
                   std::int64_t blocksize) {
  Call call("quantize_4bit", device, stream);
  Kernel& kernel = quantize_kernels[dtype];
  launch(call, kernel, {blocks_for(call, kernel, ceil_div(n, kQuantizeTile))}, packed, absmax, x, codebook, exact_log2(blocksize), n);
}

void dequantize_4bit(int device, Address stream, Address out, int dtype, std::int64_t n, Address packed, Address absmax, Address codebook,
                     std::int64_t blocksize, Address nested_absmax, Address nested_codebook, Address nested_offset,
                     std::int64_t nested_blocksize) {
  Call call("dequantize_4bit", device, stream);
  Kernel& kernel = dequantize_kernels[dtype];
  Scales scales(absmax, nested_absmax, nested_codebook, nested_offset, nested_blocksize);
  const unsigned tiles = static_cast<unsigned>(ceil_div(n, kDequantizeTiles[dtype]));
  launch(call, kernel, {tiles}, out, packed, scales, codebook, exact_log2(blocksize), n);
}

}  // namespace

void bind_four_bit(nanobind::module_& module) {
  module.def("quantize_4bit", &quantize_4bit, NoLock());
  module.def("dequantize_4bit", &dequantize_4bit, NoLock());
}

}  // namespace bnb
