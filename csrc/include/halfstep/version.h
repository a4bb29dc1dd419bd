#pragma once

#include "export.h"

#define HALFSTEP_VERSION_MAJOR 1
#define HALFSTEP_VERSION_MINOR 0
#define HALFSTEP_VERSION_PATCH 0
/// The version string of the Python package.
#define HALFSTEP_VERSION "1.0.0.dev0"

namespace halfstep::detail {

/// A program that only looks ops up by name uses no symbol of the library, and a linker that passes
/// --as-needed would leave the library out. This one use of it, in every file that includes a
/// public header, keeps it.
HALFSTEP_API int keep_library();
inline const int library_is_kept = keep_library();

}  // namespace halfstep::detail
