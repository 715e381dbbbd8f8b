#pragma once
#include <cuda_runtime_api.h>  // IWYU pragma: export
