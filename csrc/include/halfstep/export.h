#pragma once

// Everything is built with hidden visibility; what carries HALFSTEP_API is the public C++ API.
#define HALFSTEP_API __attribute__((visibility("default")))
/// A guard: made without a name it would end at once, so the compiler warns.
#define HALFSTEP_NODISCARD_API [[nodiscard, gnu::visibility("default")]]
