// Rows from one place to another, cast on the way.

#include "common.h"

namespace {

template <class In, class Out>
void move_rows(const In* source, int64_t stride, const int64_t* rows, int64_t n, int64_t d, const int64_t* slots,
               Out* out) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    const In* from = source + rows[i] * stride;
    Out* to = out + (slots ? slots[i] : i) * d;
    if constexpr (std::is_same_v<In, Out>)
      std::memcpy(to, from, d * sizeof(Out));
    else
      for (int64_t j = 0; j < d; ++j) to[j] = rounded<Out>(wide(from[j]));
  }
}

}  // namespace

// A row or slot that is not there, or DONE; nothing has been moved then.
extern "C" int64_t fastsae_move_rows(int64_t half, int64_t half_out, const void* source, int64_t n_source, int64_t stride,
                                     const int64_t* rows, int64_t n, int64_t d, const int64_t* slots, int64_t n_out,
                                     void* out) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t slot = slots ? slots[i] : i;
    if (uint64_t(rows[i]) >= uint64_t(n_source)) return rows[i];
    if (uint64_t(slot) >= uint64_t(n_out)) return slot;
  }
  return guarded([&] {
    with_dtype(half, [&](auto in) {
      with_dtype(half_out, [&](auto o) {
        move_rows((const decltype(in)*)source, stride, rows, n, d, slots, (decltype(o)*)out);
      });
    });
  });
}
