// What happens to one tile of the fp32 routes between its matmuls, in linear_cross_entropy_fold.cpp.
#pragma once

#include "linear_cross_entropy.h"

namespace vrpo {

// Products z = h . w of a tile [classes, lanes], rows of the batch in lanes.
struct Tile {
  float* z;
  int64_t stride, classes;
  const float* bias;  // of its first class on; null where there is none
};

// Lanes [first, last): moves the shift, turns z into e = exp(logit - m), with a soft-cap times its slope, and adds to
// the sums, which take e itself. A target's z is -inf: its e is 0.
void fold(const Tile& tile, const Head& head, int64_t first, int64_t last, RowSums& sums);

// Lanes [first, last) with known statistics: z -> exp(logit - m) * slope * coefficient.
void weigh(const Tile& tile, const Head& head, int64_t first, int64_t last, const float* shift,
           const float* coefficient);

}  // namespace vrpo
