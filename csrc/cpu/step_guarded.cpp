// The loops of rules that look at the guards of StepScalars: spikes, thresholds, resets, a tensor's gate, output rows.
#include "update_chunk.h"

namespace fca {
namespace {

template <typename T, Overshoot RULE>
UpdateChunk<T> choose_flags(bool amsgrad, bool coupled) {
  if (amsgrad) return coupled ? update_chunk<T, RULE, true, true, true> : update_chunk<T, RULE, true, false, true>;
  return coupled ? update_chunk<T, RULE, false, true, true> : update_chunk<T, RULE, false, false, true>;
}

}  // namespace

template <typename T>
UpdateChunk<T> choose_guarded(Overshoot rule, bool amsgrad, bool coupled) {
  switch (rule) {
    case Overshoot::NONE:
      return choose_flags<T, Overshoot::NONE>(amsgrad, coupled);
    case Overshoot::ALIGN_BLOCK:
      return choose_flags<T, Overshoot::ALIGN_BLOCK>(amsgrad, coupled);
    case Overshoot::ALIGN_ELEMENT:
      return choose_flags<T, Overshoot::ALIGN_ELEMENT>(amsgrad, coupled);
    case Overshoot::CAUTIOUS:
      return choose_flags<T, Overshoot::CAUTIOUS>(amsgrad, coupled);
    case Overshoot::GRAMS:
      return choose_flags<T, Overshoot::GRAMS>(amsgrad, coupled);
    case Overshoot::ATAN2:
      return choose_flags<T, Overshoot::ATAN2>(amsgrad, coupled);
    case Overshoot::FADAM:
      break;
  }
  fail("overshoot rule ", static_cast<int64_t>(rule), " does not go with guards");
}
template UpdateChunk<float> choose_guarded<float>(Overshoot, bool, bool);
template UpdateChunk<double> choose_guarded<double>(Overshoot, bool, bool);

}  // namespace fca
