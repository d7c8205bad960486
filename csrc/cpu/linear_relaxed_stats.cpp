#include "../checks.h"
#include "operators.h"
#include "tile_softmax.h"

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// One pass over the head for at most kRowsPerPass rows.
template <typename acc_t>
std::vector<State> reduce_pass(const at::Tensor& h, const Matrix& table, const HeadTransform& transform,
                               double inverse_tau) {
  const Rows<acc_t> rows(h, table);
  const Split split(table.rows, table.columns);
  std::vector<std::vector<State>> states(split.parts);
  split.run([&](int64_t part, int64_t first, int64_t last) {
    // Of this thread's own memory while it is written to.
    std::vector<State> own(rows.padded_rows());
    std::vector<acc_t> logits(split.tile * kPanel);
    std::vector<double> factors(kPanel);
    TableTile<acc_t> tile;
    for (int64_t index = first; index < last; ++index) {
      const int64_t begin = split.begin(index);
      const int64_t size = split.size(index);
      if (!rows.bfloat16()) tile.load(table, begin, size);
      for (int64_t panel = 0; panel < rows.panels(); ++panel) {
        const int64_t columns = rows.columns(panel);
        rows.multiply(table, tile, begin, size, panel, logits.data(), false);
        transform.apply(logits.data(), size * columns);
        add_tile<false>(logits.data(), size, columns, begin, inverse_tau, own.data() + panel * kPanel, factors.data());
      }
    }
    states[part] = std::move(own);
  });
  return merge_parts(states, inverse_tau);
}

template <typename acc_t>
Statistics run(const at::Tensor& h, const at::Tensor& weight, const HeadTransform& transform, double inverse_tau,
               const Thresholds& thresholds) {
  const Matrix table(weight);
  std::vector<State> states;
  each_pass(h.size(0), [&](int64_t row, int64_t rows) {
    const std::vector<State> pass = reduce_pass<acc_t>(h.narrow(0, row, rows), table, transform, inverse_tau);
    states.insert(states.end(), pass.begin(), pass.begin() + rows);
  });
  return relaxed_statistics<acc_t>(states, h.size(0), inverse_tau, thresholds, h.options());
}

}  // namespace

Statistics linear_relaxed_stats(const Tensor& h, const Tensor& weight, double scale, double softcap, double tau,
                                std::optional<double> entropy_threshold, std::optional<double> confidence_threshold) {
  const Check check("linear_relaxed_stats");
  check.product(h, "h", weight, "weight");
  const double inverse_tau = check.inverse_of(tau);
  const HeadTransform transform{scale, softcap};
  const Thresholds thresholds{entropy_threshold, confidence_threshold};
  return any_double({h, weight}) ? run<double>(h, weight, transform, inverse_tau, thresholds)
                                 : run<float>(h, weight, transform, inverse_tau, thresholds);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
