// Where the logits are between two passes over the vocabulary.
#pragma once

#include "tile_matmul.h"
#include "vocabulary_pass.h"

#include <cstdint>
#include <optional>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Tile by tile, as they are made and read again: rows of a whole vocabulary lie a multiple of the page size apart, and
// the same few lines of the cache would have to hold a tile of all of them.
template <typename acc_t>
struct KeptLogits {
  acc_t* data;
  int64_t rows;  // filled up
  int64_t tile;

  // Of vocabulary entries from `begin` on, which begins a tile; lines are `tile` apart.
  acc_t* block(int64_t begin, int64_t row) const { return data + begin * rows + row * tile; }
};

// Those of a pass over the rows of hidden states.
template <typename acc_t>
std::optional<KeptLogits<acc_t>> optional_kept(const PassInput& input) {
  if (!input.kept.defined()) return std::nullopt;
  const auto rows = round_up(static_cast<int64_t>(input.rows.size()), kPanelUnit);
  return KeptLogits<acc_t>{input.kept.mutable_data_ptr<acc_t>(), rows,
                           Split(input.vocabulary(), input.weight.size(1)).tile};
}

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
