// SPDX-License-Identifier: BSD-3-Clause
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fusedsep {
namespace {

struct Candidate {
  const char* name;
  const Isa& (*kernels)();
  bool supported, by_default;
};

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> list{
#define FUSEDSEP_CANDIDATE(name, supported, by_default) {#name, name##_isa, bool(supported), by_default},
      FUSEDSEP_ISAS(FUSEDSEP_CANDIDATE)
#undef FUSEDSEP_CANDIDATE
  };
  return list;
}

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::atomic<const Isa*> active{nullptr};

const Isa& choose() {
  const char* wanted = std::getenv("FUSEDSEP_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    try {
      return find_isa(wanted);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string("environment variable FUSEDSEP_ISA: ") + error.what());
    }
  }
  const Isa* best = nullptr;
  for (const Candidate& candidate : candidates()) {
    if (candidate.supported && candidate.by_default) best = &candidate.kernels();
  }
  return *best;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) names.emplace_back(candidate.name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.supported) names.emplace_back(candidate.name);
  }
  return names;
}

const Isa& find_isa(const std::string& name) {
  for (const Candidate& candidate : candidates()) {
    if (name != candidate.name) continue;
    if (candidate.supported) return candidate.kernels();
    throw std::invalid_argument("isa must be one that this processor supports (" + listed(supported_isas()) +
                                "), got '" + name + "'");
  }
  throw std::invalid_argument("isa must be one of " + listed(compiled_isas()) + ", got '" + name + "'");
}

const Isa& active_isa() {
  const Isa* isa = active.load(std::memory_order_acquire);
  if (isa == nullptr) {
    isa = &choose();
    active.store(isa, std::memory_order_release);
  }
  return *isa;
}

void use_isa(const std::string& name) { active.store(&find_isa(name), std::memory_order_release); }

}  // namespace fusedsep
