// Products of tiles of 16 x 16 on the tensor cores of sm_72 and up. How a tile lies in registers is the compiler's affair.
#pragma once

#include <mma.h>

#include "floats.cuh"

namespace wmma = nvcuda::wmma;

template <class T>
using LeftTile = wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major>;  // lines are rows
template <class T>
using RightTile = wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major>;  // lines are columns
template <class T>
using Sums = wmma::fragment<wmma::accumulator, 16, 16, 16, T>;

// kLines lines of kDepth elements in shared memory, from a multiple of 32 bytes on: sixteen columns of all lines, then the next sixteen.
// So a tile is in one piece, as tile loads want it. 32 bytes between the planes let lanes that write a line meet in no bank.
template <class T, int kLines, int kDepth>
struct Planes {
  static constexpr int kPlane = kLines * 16 + 32 / int(sizeof(T));
  static constexpr int kBytes = kDepth / 16 * kPlane * int(sizeof(T));

  T* first;

  // The 16 lines from `line` on, at columns 16 * plane and on.
  template <class Tile>
  __device__ void load(Tile& tile, int line, int plane) const { wmma::load_matrix_sync(tile, first + plane * kPlane + line * 16, 16); }

  // The 16 bytes of a line from `column` on.
  __device__ uint4& bytes_at(int line, int column) const {
    return *reinterpret_cast<uint4*>(first + column / 16 * kPlane + line * 16 + column % 16);
  }
};
