#include "../../cuda/table.cu"

#include "../cpp/catch.h"
#include "tensors.h"

using namespace halfstep::cuda;
using emulation::Buffer;

TEST_CASE("upload writes every byte, page by page, from parameters", "[table]") {
  for (const int64_t size : {1, 88, 3999, 4000, 4001, 12345}) {
    std::vector<unsigned char> host(static_cast<size_t>(size));
    for (size_t i = 0; i < host.size(); ++i) host[i] = static_cast<unsigned char>(i * 7 + 1);
    const auto findings = emulation::in_all_orders([&] {
      Buffer<unsigned char> device(host.size());
      CHECK(upload(device.data(), host.data(), size, nullptr) == kSuccess);
      CHECK(std::equal(host.begin(), host.end(), device.data()));
      return device.bytes();
    });
    CHECK(findings.empty());
  }
}

namespace {

/// Notes which block of threads took each chunk, and its bounds.
void note_chunks(Table table, int64_t* rows, int64_t* begins, int64_t* ends) {
  for_each_chunk(table,
                 [&](const Row& row, int64_t position, int64_t chunk, int64_t begin, int64_t end) {
                   if (threadIdx.x != 0) return;
                   write(rows + chunk, position * 1000 + row.index);
                   write(begins + chunk, begin);
                   write(ends + chunk, end);
                 });
}

}  // namespace

TEST_CASE("every chunk of every row is visited once, empty rows never", "[table]") {
  const std::vector<int64_t> numels = {0, 1, kChunk, 0, 0, kChunk + 1, 5, 3 * kChunk, 0};
  emulation::Rows rows;
  for (const int64_t numel : numels) rows.add({}, numel);
  const Table table = rows.table();
  const auto findings = emulation::in_all_orders([&] {
    const auto n = size_t(table.chunks);
    Buffer<int64_t> row(n, -1), begins(n), ends(n);
    launch(note_chunks, emulation::state().resident_blocks, 32, nullptr, table, row.data(),
           begins.data(), ends.data());
    size_t chunk = 0;
    for (size_t i = 0; i < numels.size(); ++i)
      for (int64_t begin = 0; begin < numels[i]; begin += kChunk, ++chunk) {
        CHECK(row[chunk] == int64_t(i) * 1001);
        CHECK(begins[chunk] == begin);
        CHECK(ends[chunk] == std::min(begin + kChunk, numels[i]));
      }
    CHECK(chunk == n);
    return row.bytes();
  });
  CHECK(findings.empty());
}
