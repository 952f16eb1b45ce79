// SPDX-License-Identifier: BSD-3-Clause
//
// What the functions for ctypes have in common.
#pragma once

#include <cstdio>
#include <exception>

#include "types.h"

inline char message[256];

// f(T()) for the type of that number; what it throws is kept for `error_message`.
template <class F>
int guarded(int type, const F& f) {
  try {
    if (type == 0) f(0.0f);
    if (type == 1) f(fusedsep::float16());
    if (type == 2) f(fusedsep::bfloat16());
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof(message), "%s", error.what());
    return 1;
  }
}
