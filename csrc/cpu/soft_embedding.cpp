// Mixtures of a table's entries, with what their gradient needs: then that is one pass in which nothing is to be found
// out, and G is multiplied with one weight an entry.
#include "../checks.h"
#include "operators.h"
#include "tile_matmul.h"
#include "vocabulary_pass.h"
#include "vocabulary_products.h"

#include <ATen/ops/empty.h>

#include <cmath>
#include <memory>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Mixture (N, k), offset (N, k): what the other entries' weights make of their difference from the likeliest one, the
// largest logit, its probability, and its index.
template <typename acc_t>
RecordedMixture mixtures(PassInput input, int64_t rows, const Tensor& hidden) {
  const auto options = at::dtype(c10::CppTypeToScalarType<acc_t>::value);
  const int64_t width = input.values.size(1);
  Tensor mixture = at::empty({rows, width}, options);
  Tensor offset = at::empty({rows, width}, options);
  Tensor top = at::empty({rows}, options);
  Tensor max_prob = at::empty({rows}, options);
  Tensor token = at::empty({rows}, at::kLong);
  input.apart = true;
  const Matrix table(input.values);
  std::vector<acc_t> likeliest(width);
  each_pass(rows, [&](int64_t begin, int64_t count) {
    input.rows = row_numbers(begin, begin + count);
    if (hidden.defined()) input.hidden = hidden.narrow(0, begin, count);
    const PassOutput<acc_t> output = vocabulary_pass<acc_t>(input);
    for (int64_t i = 0; i < count; ++i) {
      const State& state = output.states[i];
      const int64_t row = begin + i;
      const bool defined = state.defined();
      const double nan = std::numeric_limits<double>::quiet_NaN();
      const double total = defined ? 1 + state.sum_exp : nan;
      token.mutable_data_ptr<int64_t>()[row] = defined ? state.token : -1;
      top.mutable_data_ptr<acc_t>()[row] = static_cast<acc_t>(defined ? state.max : nan);
      max_prob.mutable_data_ptr<acc_t>()[row] = static_cast<acc_t>(1 / total);
      if (defined) table.copy(state.token, 0, width, likeliest.data());
      const auto factor = static_cast<acc_t>(1 / total);
      const auto others = static_cast<acc_t>(state.sum_exp);
      const acc_t* sums = output.sums.data() + i * width;
      acc_t* mixed = mixture.mutable_data_ptr<acc_t>() + row * width;
      acc_t* moved = offset.mutable_data_ptr<acc_t>() + row * width;
      for (int64_t j = 0; j < width; ++j) {
        mixed[j] = (sums[j] + likeliest[j]) * factor;
        moved[j] = (sums[j] - others * likeliest[j]) * factor;
      }
    }
  });
  return {mixture, offset, top, max_prob, token};
}

RecordedMixture recorded(const Tensor& z, const Tensor& table, double tau, const Check& check) {
  check.logits(z);
  check.table(table, "table", z.size(1), "d_k");
  check.inverse_of(tau);
  PassInput input(z, tau);
  input.values = table;
  return any_double({z}) ? mixtures<double>(input, z.size(0), {}) : mixtures<float>(input, z.size(0), {});
}

RecordedMixture recorded(const Tensor& h, const Tensor& weight, double scale, double softcap, const Tensor& table,
                         double tau, const Check& check) {
  check.product(h, "h", weight, "weight");
  check.table(table, "table", weight.size(0), "d_k");
  check.inverse_of(tau);
  PassInput input(weight, scale, softcap, tau);
  input.values = table;
  return any_double({h, weight}) ? mixtures<double>(input, h.size(0), h) : mixtures<float>(input, h.size(0), h);
}

// What reaches rows of logits or hidden states from `vector`, the gradient of their mixtures.
template <typename acc_t>
class Backward {
  using Vec = at::vec::Vectorized<acc_t>;

 public:
  // `z` or `hidden` is undefined.
  Backward(const Tensor& z, const Tensor& hidden, const Tensor& weight, double scale, double softcap,
           const Tensor& vector, const Tensor& table, const Tensor& offset, const Tensor& top, const Tensor& max_prob,
           const Tensor& token, double tau)
      : rows_(vector.size(0)),
        width_(z.defined() ? 0 : weight.size(1)),
        vocabulary_(table.size(0)),
        softcap_(z.defined() ? 0 : softcap),
        power_scale_(Power<acc_t>::kUnits / tau),
        z_(optional_matrix(z)),
        top_(as_vector(top)),
        token_(token.contiguous()),
        factor_(as_vector(max_prob).div(tau)),
        products_(hidden, weight, {scale, softcap}, {{vector, table}}, z.defined() ? Tensor() : weight,
                  (z.defined() ? z : hidden).scalar_type()) {
    // Of the vector as it is multiplied with the table.
    const Tensor own = vector.to(kDtype);
    Tensor likeliest = at::empty({rows_, table.size(1)}, own.options());
    const Matrix source(table);
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t entry = std::max<int64_t>(tokens()[row], 0);
      source.copy(entry, 0, table.size(1), likeliest.mutable_data_ptr<acc_t>() + row * table.size(1));
    }
    // An infinity there would be subtracted from itself.
    reference_ = own.mul(likeliest).sum(1).nan_to_num(0., 0., 0.);
    mean_ = own.mul(offset.to(kDtype)).sum(1);
  }

  // To dz (N, V), of the dtype of z.
  void write(const Tensor& dz) const {
    const Matrix out(dz);
    run(&out, [&](int64_t row, int64_t begin, int64_t count, const acc_t* weights) {
      store(weights, count, dz, row, begin);
    });
  }

  // (N, d) before the head's scale.
  Tensor hidden_gradient() const {
    std::vector<std::vector<acc_t>> sums = run(nullptr, [](int64_t, int64_t, int64_t, const acc_t*) {});
    Tensor result = at::empty({rows_, width_}, at::dtype(kDtype));
    acc_t* out = result.mutable_data_ptr<acc_t>();
    for (int64_t at = 0; at < rows_ * width_; ++at) {
      acc_t sum = 0;
      for (const auto& part : sums) sum += part[at];
      out[at] = sum;
    }
    return result;
  }

 private:
  static constexpr auto kDtype = c10::CppTypeToScalarType<acc_t>::value;

  static Tensor as_vector(const Tensor& values) { return values.to(kDtype).contiguous(); }

  const int64_t* tokens() const { return token_.const_data_ptr<int64_t>(); }

  // use(row, begin, count, weights) for every row and tile, to write to `out` perhaps; the sums of weights times values
  // (N, width) of each part.
  template <typename Use>
  std::vector<std::vector<acc_t>> run(const Matrix* out, const Use& use) const {
    const Split split(vocabulary_, products_.width());
    std::vector<std::vector<acc_t>> sums(split.parts);
    split.run([&](int64_t part, int64_t first, int64_t last) {
      sums[part].resize(rows_ * width_);
      auto workspace = products_.workspace(split.tile);
      std::vector<acc_t> weights(kPanel * split.tile);
      std::vector<acc_t> logits(split.tile);
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t begin = split.begin(tile);
        const int64_t count = split.size(tile);
        products_.load(begin, count, workspace);
        for (int64_t panel = 0; panel * kPanel < rows_; ++panel) {
          const int64_t start = panel * kPanel;
          const int64_t rows = std::min(kPanel, rows_ - start);
          for (int64_t i = 0; i < rows; ++i) {
            if (z_) z_->prefetch(start + i, begin, count);
            if (out) out->prefetch(start + i, begin, count);
          }
          products_.compute(begin, count, panel, split.tile, workspace, workspace.logits.data());
          for (int64_t i = 0; i < rows; ++i) {
            const acc_t* x = workspace.logits.data() + i * split.tile;
            if (z_) x = z_->template read<acc_t>(start + i, begin, count, acc_t(0), logits.data());
            acc_t* gradient = workspace.gradient.data() + i * split.tile;
            acc_t* made = weights.data() + i * split.tile;
            weigh(start + i, begin, count, x, gradient, made);
            use(start + i, begin, count, made);
          }
          if (width_) {
            products_.add_values(rows, count, weights.data(), split.tile, workspace,
                                 sums[part].data() + start * width_);
          }
        }
      }
    });
    return sums;
  }

  // p (G - <p, G>) / tau of a tile of one row, and through the cap.
  void weigh(int64_t row, int64_t begin, int64_t count, const acc_t* x, acc_t* gradient, acc_t* out) const {
    const acc_t reference = reference_.template const_data_ptr<acc_t>()[row];
    const int64_t likeliest = tokens()[row] - begin;
    // Exactly: there the difference is all that a nearly certain token's gradient has.
    if (likeliest >= 0 && likeliest < count) gradient[likeliest] = reference;
    const Vec max(top_.template const_data_ptr<acc_t>()[row]);
    const Vec scale(static_cast<acc_t>(power_scale_));
    const Vec from(reference);
    const Vec mean(mean_.template const_data_ptr<acc_t>()[row]);
    const Vec factor(factor_.template const_data_ptr<acc_t>()[row]);
    const Vec inverse_cap(static_cast<acc_t>(softcap_ ? 1 / softcap_ : 0));
    each_vector<Vec>(count, [&](int64_t j, int64_t lanes) {
      const Vec logit = Vec::loadu(x + j, lanes);
      const Vec e = power_or_zero<acc_t>((logit - max) * scale);
      Vec weight = weighted(e, Vec::loadu(gradient + j, lanes) - from - mean) * factor;
      if (softcap_) {
        const Vec ratio = logit * inverse_cap;
        weight = weighted(weight, Vec(acc_t(1)) - ratio * ratio);
      }
      weight.store(out + j, lanes);
    });
  }

  static void store(const acc_t* from, int64_t count, const Tensor& to, int64_t row, int64_t begin) {
    const int64_t at = row * to.size(1) + begin;
    switch (to.scalar_type()) {
      case at::kBFloat16: return convert_to(from, to.mutable_data_ptr<at::BFloat16>() + at, count);
      case at::kHalf: return convert_to(from, to.mutable_data_ptr<at::Half>() + at, count);
      case at::kFloat: return convert_to(from, to.mutable_data_ptr<float>() + at, count);
      default: return convert_to(from, to.mutable_data_ptr<double>() + at, count);
    }
  }

  template <typename out_t>
  static void convert_to(const acc_t* from, out_t* to, int64_t count) {
    if constexpr (std::is_same_v<acc_t, float>) {
      at::vec::convert(from, to, count);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<out_t>(from[i]);
    }
  }

  int64_t rows_;
  int64_t width_;  // of the hidden states, or 0
  int64_t vocabulary_;
  double softcap_;
  double power_scale_;
  std::optional<Matrix> z_;
  Tensor top_, token_, factor_, reference_, mean_;
  VocabularyProducts<acc_t> products_;
};

void check_record(const Check& check, const Tensor& vector, const Tensor& table, const Tensor& offset,
                  const Tensor& top, const Tensor& max_prob, const Tensor& token, int64_t rows, int64_t vocabulary) {
  check.table(table, "table", vocabulary, "d_k");
  check.floats(vector, "vector", {rows, table.size(1)});
  check.floats(offset, "offset", {rows, table.size(1)});
  check.floats(top, "top", {rows});
  check.floats(max_prob, "max_prob", {rows});
  check.integers(token, "token", {rows});
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t entry = token.const_data_ptr<int64_t>()[row * token.stride(0)];
    TORCH_CHECK_VALUE(entry >= -1 && entry < vocabulary,
                      "soft_embedding_backward: token must be -1 or below V = ", vocabulary, ", got ", entry);
  }
}

}  // namespace

Tensor soft_embedding(const Tensor& z, const Tensor& table, double tau) {
  return std::get<0>(recorded(z, table, tau, Check("soft_embedding")));
}

RecordedMixture soft_embedding_recorded(const Tensor& z, const Tensor& table, double tau) {
  return recorded(z, table, tau, Check("soft_embedding"));
}

Tensor linear_soft_embedding(const Tensor& h, const Tensor& weight, double scale, double softcap, const Tensor& table,
                             double tau) {
  return std::get<0>(recorded(h, weight, scale, softcap, table, tau, Check("linear_soft_embedding")));
}

RecordedMixture linear_soft_embedding_recorded(const Tensor& h, const Tensor& weight, double scale, double softcap,
                                               const Tensor& table, double tau) {
  return recorded(h, weight, scale, softcap, table, tau, Check("linear_soft_embedding"));
}

Tensor soft_embedding_backward(const Tensor& z, const Tensor& vector, const Tensor& table, const Tensor& offset,
                               const Tensor& top, const Tensor& max_prob, const Tensor& token, double tau) {
  const Check check("soft_embedding_backward");
  check.logits(z);
  check.inverse_of(tau);
  check_record(check, vector, table, offset, top, max_prob, token, z.size(0), z.size(1));
  Tensor dz = at::empty(z.sizes(), z.options());
  const Tensor factors = rounded_beside(table, vector, z.scalar_type());
  if (any_double({z})) {
    Backward<double>(z, {}, {}, 1, 0, factors, table, offset, top, max_prob, token, tau).write(dz);
  } else {
    Backward<float>(z, {}, {}, 1, 0, factors, table, offset, top, max_prob, token, tau).write(dz);
  }
  return dz;
}

Tensor linear_soft_embedding_backward(const Tensor& h, const Tensor& weight, double scale, double softcap,
                                      const Tensor& vector, const Tensor& table, const Tensor& offset,
                                      const Tensor& top, const Tensor& max_prob, const Tensor& token, double tau) {
  const Check check("linear_soft_embedding_backward");
  check.product(h, "h", weight, "weight");
  check.inverse_of(tau);
  check_record(check, vector, table, offset, top, max_prob, token, h.size(0), weight.size(0));
  const bool wide = any_double({h, weight});
  const Tensor factors = rounded_beside(table, vector, h.scalar_type());
  Tensor dh = at::empty(h.sizes(), at::dtype(wide ? at::kDouble : at::kFloat));
  each_pass(h.size(0), [&](int64_t first, int64_t count) {
    const auto part = [&](const Tensor& rows) { return rows.narrow(0, first, count); };
    const auto gradient = [&](auto acc) {
      return Backward<decltype(acc)>({}, part(h), weight, scale, softcap, part(factors), table, part(offset), part(top),
                                     part(max_prob), part(token), tau)
          .hidden_gradient();
    };
    part(dh).copy_(wide ? gradient(double()) : gradient(float()));
  });
  return dh.mul_(scale);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
