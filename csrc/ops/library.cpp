#include <halfstep/version.h>
#include <torch/library.h>

// The namespace itself; each family adds its schemas in a file of its own.
TORCH_LIBRARY(halfstep, m) { (void)m; }

int halfstep::detail::keep_library() { return HALFSTEP_VERSION_MAJOR; }
