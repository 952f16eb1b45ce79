// SPDX-License-Identifier: BSD-3-Clause
//
// What follows on a map in channels_last: the sum or the product with another one, factors of its channels, and an
// activation.
#pragma once

#include "separable.h"
#include "sigmoid-inl.h"

namespace fusedsep {
namespace {

// Rows of `count` elements: y = act(x + other), act(x * gate) or act(x). Pitches lie between rows.
template <typename T>
struct Join {
  const T* x;
  int64_t x_pitch;
  const T* gate;       // null: none
  int64_t gate_pitch;  // 0: the same for all rows
  const T* other;      // null: none, as where there is a gate
  int64_t other_pitch;
  T* y;  // may be x
  int64_t y_pitch;
  int64_t rows, count;
  Activation activation;
};

template <class V>
void join(Join<typename V::T> p) {
  constexpr int L = V::kLanes;
  const bool dense = p.count == p.x_pitch && p.count == p.y_pitch;
  if (dense && (!p.gate || p.count == p.gate_pitch) && (!p.other || p.count == p.other_pitch)) {
    p.count *= p.rows;
    p.rows = 1;
  }
  if (is_stored_first(p.activation) && (p.gate != nullptr || p.other != nullptr)) {  // a second pass: see below
    Join<typename V::T> first = p;
    first.activation = Activation::kNone;
    join<V>(first);
    p.x = p.y;
    p.x_pitch = p.y_pitch;
  }
  const int64_t whole = p.count / L * L;
  const auto mask = V::mask(0, p.count - whole);
  const auto pass = [&](bool gated, bool added, Activation constant) __attribute__((always_inline)) {
    const auto value = [&](V x, V factor, V other) __attribute__((always_inline)) {
      return activate_any(constant, gated ? V::mul(x, factor) : added ? V::add(other, x) : x);
    };
    const auto *x = p.x, *gate = p.gate, *other = p.other;
    auto* y = p.y;
    for (int64_t i = 0; i < p.rows; ++i) {
      for (int64_t k = 0; k < whole; k += L) {
        const V none = V::zero();
        value(V::load(x + k), gated ? V::load(gate + k) : none, added ? V::load(other + k) : none).store(y + k);
      }
      if (whole < p.count) {
        const V factor = gated ? V::load(gate + whole, mask) : V::zero();
        const V more = added ? V::load(other + whole, mask) : V::zero();
        value(V::load(x + whole, mask), factor, more).store(y + whole, mask);
      }
      x += p.x_pitch;
      gate += gated ? p.gate_pitch : 0;
      other += added ? p.other_pitch : 0;
      y += p.y_pitch;
    }
  };
  const auto passes = [&](Activation constant) __attribute__((always_inline)) {
    if (is_stored_first(constant)) {  // long code, not repeated for the rare case that something is joined before
      pass(false, false, constant);
    } else if (p.gate != nullptr) {
      pass(true, false, constant);
    } else if (p.other != nullptr) {
      pass(false, true, constant);
    } else {
      pass(false, false, constant);
    }
  };
  switch (p.activation) {
#define FUSEDSEP_JOIN(name) \
  case Activation::name:    \
    return passes(Activation::name);
    FUSEDSEP_JOIN(kNone)
    FUSEDSEP_JOIN(kRelu)
    FUSEDSEP_JOIN(kRelu6)
    FUSEDSEP_JOIN(kHardswish)
    FUSEDSEP_JOIN(kSilu)
    FUSEDSEP_JOIN(kSigmoid)
    FUSEDSEP_JOIN(kHardsigmoid)
    FUSEDSEP_JOIN(kGelu)
#undef FUSEDSEP_JOIN
  }
}

// What ends a layer whose map is x so far, for `count` channels of y from `channel` on and `pixels` pixels from the
// `first` one on, counted on from image to image.
template <typename T>
Join<T> join_of(const SeparableParams<T>& p, const T* x, int64_t x_pitch, int64_t first, int64_t pixels,
                int64_t channel, int64_t count) {
  const int64_t y_pitch = y_pitch_of(p), residual_pitch = residual_pitch_of(p);
  const T* const residual = p.residual == nullptr ? nullptr : p.residual + first * residual_pitch + channel;
  T* const y = p.y + first * y_pitch + channel;
  const T *gate = p.multiplies ? residual : nullptr, *other = p.multiplies ? nullptr : residual;
  return {x, x_pitch, gate, residual_pitch, other, residual_pitch, y, y_pitch, pixels, count, p.joined_activation};
}

// y = act(y), over `rows` rows of `count` elements.
template <class V>
void activate_map(Activation activation, typename V::T* y, int64_t rows, int64_t count, int64_t pitch) {
  join<V>({y, pitch, nullptr, 0, nullptr, 0, y, pitch, rows, count, activation});
}

}  // namespace
}  // namespace fusedsep
