// Finds an op by name alone: it uses no symbol of halfstep, so a linker may think the library
// unused.

#include <ATen/core/dispatch/Dispatcher.h>
#ifdef INCLUDE_HALFSTEP
#include <halfstep/version.h>
#endif

#include <iostream>

int main() {
  const auto op = c10::Dispatcher::singleton().findSchema({"halfstep::grad_stats", ""});
  std::cout << (op ? "found" : "not found") << "\n";
  return op ? 0 : 1;
}
