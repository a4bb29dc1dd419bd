#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <optional>

namespace halfstep {

/// Numbers of a device on their way to the host, or there.
struct Arrival {
  at::Tensor numbers;                ///< float64 on the host
  std::optional<c10::Event> copied;  ///< of a device: done once the copy to the host is

  bool here() const { return !copied || copied->query(); }
  void wait() const {
    if (copied) copied->synchronize();
  }
};

/// Queues one copy of `numbers` to the host; nothing waits for it. Those of the CPU are there.
Arrival send(const at::Tensor& numbers);

}  // namespace halfstep
