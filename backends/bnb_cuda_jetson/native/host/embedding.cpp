// Entry points of quantized tables: embedding_4bit and embedding_8bit.
#include "arguments.h"
#include "bindings.h"
#include "launch.h"

namespace bnb {
namespace {

constexpr int kRowsAtOnce = 8;  // of a block of threads in embedding.cu: one a warp

Kernel kernels_4bit[kDtypes] = {
    {"embedding", "embedding_4bit_float32", 256},
    {"embedding", "embedding_4bit_float16", 256},
    {"embedding", "embedding_4bit_bfloat16", 256},
};

Kernel kernels_8bit[kDtypes] = {
    {"embedding", "embedding_8bit_float32", 256},
    {"embedding", "embedding_8bit_float16", 256},
    {"embedding", "embedding_8bit_bfloat16", 256},
};

void embedding_4bit(int device, Address stream, Address out, int dtype, Address indices, int index_bytes, std::int64_t count,
                    Address packed, Address absmax, Address codebook, std::int64_t blocksize, std::int64_t rows, std::int64_t dim,
                    Address nested_absmax, Address nested_codebook, Address nested_offset, std::int64_t nested_blocksize) {
  Call call("embedding_4bit", device, stream);
  Kernel& kernel = kernels_4bit[dtype];
  Scales scales(absmax, nested_absmax, nested_codebook, nested_offset, nested_blocksize);
  launch(call, kernel, {blocks_for(call, kernel, ceil_div(count, kRowsAtOnce))}, out, indices, index_bytes, packed, scales, codebook,
         exact_log2(blocksize), rows, dim, count);
}

void embedding_8bit(int device, Address stream, Address out, int dtype, Address indices, int index_bytes, std::int64_t count,
                    Address codes, Address absmax, std::int64_t rows, std::int64_t dim) {
  Call call("embedding_8bit", device, stream);
  Kernel& kernel = kernels_8bit[dtype];
  launch(call, kernel, {blocks_for(call, kernel, ceil_div(count, kRowsAtOnce))}, out, indices, index_bytes, codes, absmax, rows, dim,
         count);
}

}  // namespace

void bind_embedding(nanobind::module_& module) {
  module.def("embedding_4bit", &embedding_4bit, NoLock());
  module.def("embedding_8bit", &embedding_8bit, NoLock());
}

}  // namespace bnb
