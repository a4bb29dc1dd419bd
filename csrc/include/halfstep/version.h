#pragma once

#define HALFSTEP_VERSION_MAJOR 1
#define HALFSTEP_VERSION_MINOR 0
#define HALFSTEP_VERSION_PATCH 0
/// The version string of the Python package.
#define HALFSTEP_VERSION "1.0.0.dev0"
