#pragma once

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace halfstep::api {

/// Gives memory that was freed back to the system. glibc keeps blocks of less than 32 MB for later:
/// after a model was cast and its masters were made, that can be a fifth of what the training state
/// holds.
inline void release_freed_memory() {
#ifdef __GLIBC__
  ::malloc_trim(0);
#endif
}

}  // namespace halfstep::api
