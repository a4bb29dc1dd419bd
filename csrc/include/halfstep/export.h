#pragma once

// Everything is built with hidden visibility; what carries HALFSTEP_API is the public C++ API.
#define HALFSTEP_API __attribute__((visibility("default")))
