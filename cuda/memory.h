#pragma once

// Global memory. Every access of a kernel goes through read() and write(): under emulation they are
// checked against the buffers of the test and counted, and every figure of bytes moved comes from
// that count. A Group is a thread's run of consecutive elements: 16-byte accesses where the array
// and the run allow, single elements otherwise.

#include "platform.h"

namespace halfstep::cuda {

template <class T>
HALFSTEP_FN T read(const T* from) {
#if defined(HALFSTEP_EMULATION)
  return emulation::read(from);
#else
  return *from;
#endif
}

/// The same address in every thread of a block: one access, as far as the memory is concerned.
template <class T>
HALFSTEP_FN T read_uniform(const T* from) {
#if defined(HALFSTEP_EMULATION)
  return emulation::read_uniform(from);
#else
  return *from;
#endif
}

template <class T>
HALFSTEP_FN void write(T* to, const T& value) {
#if defined(HALFSTEP_EMULATION)
  emulation::write(to, value);
#else
  *to = value;
#endif
}

/// Integers only: the result must not depend on the order of the threads.
HALFSTEP_FN void add_count(int64_t* to, int64_t value) {
#if defined(HALFSTEP_EMULATION)
  emulation::write(to, emulation::read(to) + value);
#elif defined(__CUDA_ARCH__)
  atomicAdd(reinterpret_cast<unsigned long long*>(to), (unsigned long long)(value));
#else
  *to += value;
#endif
}

/// The same in memory that a block of threads shares.
HALFSTEP_FN void add_shared(int* to, int value) {
#if defined(__CUDA_ARCH__)
  atomicAdd(to, value);
#else
  *to += value;
#endif
}

HALFSTEP_FN bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <class T, int kCount>
struct Group {
  T x[kCount];
};

/// Elements [i, i + lanes) of `from`; the rest of the group is zero. i is a multiple of kCount.
template <int kCount, class T>
HALFSTEP_FN Group<T, kCount> read_group(const T* from, int64_t i, int lanes) {
  Group<T, kCount> group = {};
  constexpr int kPiece = int(16 / sizeof(T)) < kCount ? int(16 / sizeof(T)) : kCount;
  struct alignas(kPiece * sizeof(T)) Piece {
    T x[kPiece];
  };
  if (lanes == kCount && is_aligned(from)) {
    HALFSTEP_UNROLL
    for (int p = 0; p < kCount / kPiece; ++p) {
      const Piece piece = read(reinterpret_cast<const Piece*>(from + i) + p);
      HALFSTEP_UNROLL
      for (int k = 0; k < kPiece; ++k) group.x[p * kPiece + k] = piece.x[k];
    }
  } else {
    for (int k = 0; k < kCount; ++k)
      if (k < lanes) group.x[k] = read(from + i + k);
  }
  return group;
}

template <int kCount, class T>
HALFSTEP_FN void write_group(T* to, int64_t i, int lanes, const Group<T, kCount>& group) {
  constexpr int kPiece = int(16 / sizeof(T)) < kCount ? int(16 / sizeof(T)) : kCount;
  struct alignas(kPiece * sizeof(T)) Piece {
    T x[kPiece];
  };
  if (lanes == kCount && is_aligned(to)) {
    HALFSTEP_UNROLL
    for (int p = 0; p < kCount / kPiece; ++p) {
      Piece piece;
      HALFSTEP_UNROLL
      for (int k = 0; k < kPiece; ++k) piece.x[k] = group.x[p * kPiece + k];
      write(reinterpret_cast<Piece*>(to + i) + p, piece);
    }
  } else {
    for (int k = 0; k < kCount; ++k)
      if (k < lanes) write(to + i + k, group.x[k]);
  }
}

}  // namespace halfstep::cuda
