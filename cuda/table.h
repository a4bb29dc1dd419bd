#pragma once

// The table of rows as a block of threads sees it.

#include "memory.h"

namespace halfstep::cuda {

HALFSTEP_FN int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

/// The last row whose first chunk is not beyond `chunk`; rows without elements are never chosen.
__device__ inline int64_t find_row(const Table& table, int64_t chunk) {
  int64_t low = 0, high = table.count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (read(&table.rows[middle].first_chunk) <= chunk)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

/// body(row, position[0], chunk, begin, end) for every chunk of this block of threads: elements
/// [begin, end) of the row. One thread searches, and only where a chunk lies beyond the row at
/// hand. All threads of the block see the same calls, so the body may hold barriers.
template <class Body>
__device__ void for_each_chunk(const Table& table, const Body& body) {
  // Row has default values, which a shared variable may not have.
  HALFSTEP_SHARED(int64_t, storage, sizeof(Row) / sizeof(int64_t));
  HALFSTEP_SHARED(int64_t, position, 1);
  static_assert(sizeof(Row) % sizeof(int64_t) == 0 && alignof(Row) <= alignof(int64_t));
  Row& row = *reinterpret_cast<Row*>(storage);
  int64_t row_end = 0;
  for (int64_t chunk = blockIdx.x; chunk < table.chunks; chunk += gridDim.x) {
    if (chunk >= row_end) {
      __syncthreads();  // nobody still reads the row before
      if (threadIdx.x == 0) {
        position[0] = find_row(table, chunk);
        row = read(table.rows + position[0]);
      }
      __syncthreads();
      row_end = row.first_chunk + chunks_of(row.numel);
    }
    const int64_t begin = (chunk - row.first_chunk) * kChunk;
    const int64_t end = begin + kChunk < row.numel ? begin + kChunk : row.numel;
    body(row, position[0], chunk, begin, end);
  }
}

}  // namespace halfstep::cuda
