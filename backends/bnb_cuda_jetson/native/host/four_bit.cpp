// Entry points of 4-bit quantization: quantize_4bit, dequantize_4bit.
#include <nanobind/nanobind.h>

#include "arguments.h"
#include "bindings.h"
#include "launch.h"

namespace bnb {
namespace {

constexpr int kElementsPerThread = 8;  // four_bit.cu's
constexpr int kTilesAtOnce = 4;

Kernel dequantize_kernels[kDtypes] = {
    {"four_bit", "dequantize_4bit_float32", 256},
    {"four_bit", "dequantize_4bit_float16", 256},
    {"four_bit", "dequantize_4bit_bfloat16", 256},
};

void dequantize_4bit(int device, Address stream, Address out, int dtype, std::int64_t n, Address packed, Address absmax, Address codebook,
                     int blocksize, Address nested_absmax, Address nested_codebook, Address nested_offset,
                     std::int64_t nested_blocksize) {
  Call call("dequantize_4bit", device, stream);
  Kernel& kernel = dequantize_kernels[dtype];
  std::int64_t tile = kernel.threads() * kElementsPerThread * kTilesAtOnce;
  Scales scales(absmax, nested_absmax, nested_codebook, nested_offset, nested_blocksize);
  launch(call, kernel, {blocks_for(call, kernel, ceil_div(n, tile))}, out, packed, scales, codebook, exact_log2(blocksize), n);
}

}  // namespace

void bind_four_bit(nanobind::module_& module) { module.def("dequantize_4bit", &dequantize_4bit, NoLock()); }

}  // namespace bnb
