// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "host_access.hpp"
#include <mics/mics.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mics::test {

/// Spreads the bits of an integer: the source of all test data, the same on every rank.
[[nodiscard]] constexpr std::uint64_t scramble(std::uint64_t x) {
  x += 0x9E3779B97F4A7C15ULL;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  return x ^ (x >> 31);
}

/// A multiple of 1/64 in [-1, 1), exact in every dtype, from two numbers.
[[nodiscard]] constexpr double coarse(std::uint64_t stream, std::uint64_t index) {
  return static_cast<double>(scramble(stream * 0x10001ULL + index) % 128) / 64.0 - 1.0;
}

/// A network with everything that makes sharding hard: a tied unit that is used twice a pass, odd
/// shapes, a scalar, a parameter without elements, frozen parameters, one in LayoutLeft, factors of
/// learning rate and decay.
///
///   x = E[token] + shift                (shift frozen)
///   h = tanh(W0 x + b0)
///   y = gain (W1 h + b1) + P x          (P frozen, W1 LayoutLeft)
///   o = E y + c,  loss = |o - target|^2 / 2
struct SmallNet {
  static constexpr std::int64_t tokens = 19;
  static constexpr std::int64_t width = 33;
  static constexpr std::int64_t hidden = 61;

  Model model;
  UnitId embed, layer0, layer1, misc, head;
  ParameterId e, w0, b0, w1, b1, p, gain, shift, nothing, c;

  SmallNet() {
    const auto init = [](std::uint64_t stream, double scale) {
      return Init::function(
          [=](std::int64_t i) { return scale * coarse(stream, static_cast<std::uint64_t>(i)); });
    };
    embed = model.unit("embed");
    e = model.parameter(embed, "table", {tokens, width}, {.init = init(1, 0.25)});
    layer0 = model.unit("layer0");
    w0 = model.parameter(layer0, "weight", {hidden, width}, {.init = init(2, 0.25)});
    b0 =
        model.parameter(layer0, "bias", {hidden}, {.init = init(3, 0.5), .weight_decay_factor = 0});
    layer1 = model.unit("layer1");
    w1 = model.parameter(layer1, "weight", {width, hidden},
                         {.init = init(4, 0.25), .layout = MemoryLayout::left});
    b1 = model.parameter(layer1, "bias", {width},
                         {.init = init(5, 0.5), .learning_rate_factor = 0.5});
    p = model.parameter(layer1, "projection", {width, width},
                        {.init = init(6, 0.125), .trainable = false});
    misc = model.unit("misc");
    gain = model.parameter(misc, "gain", {}, {.init = Init::constant(0.75)});
    shift = model.parameter(misc, "shift", {width}, {.init = init(7, 0.5), .trainable = false});
    nothing = model.parameter(misc, "nothing", {0, 3});
    head = model.unit("head");
    c = model.parameter(head, "bias", {tokens}, {.init = init(8, 0.5)});
  }

  [[nodiscard]] static std::int64_t token(std::int64_t sample) {
    return static_cast<std::int64_t>(scramble(static_cast<std::uint64_t>(sample)) % tokens);
  }
  [[nodiscard]] static double target(std::int64_t sample, std::int64_t i) {
    return coarse(100 + static_cast<std::uint64_t>(sample), static_cast<std::uint64_t>(i));
  }
};

using Vector = std::vector<double>;

/// What the backward pass of one sample needs.
struct Activations {
  Vector x, h, z, y, o;
};

// The layers, for anything that is indexed with (i), (i, j) or (). Arithmetic in fp64; an element
// of another type is rounded when it is stored.

template <class View>
[[nodiscard]] double at(const View& view, auto... index) {
  return static_cast<double>(view(index...));
}
template <class View>
void add_to(const View& view, double value, auto... index) {
  auto& element = view(index...);
  using T = std::remove_cvref_t<decltype(element)>;
  element = static_cast<T>(static_cast<double>(element) + value);
}
[[nodiscard]] inline Vector zeros(std::int64_t count) {
  return Vector(static_cast<std::size_t>(count), 0.0);
}
[[nodiscard]] inline double& at(Vector& v, std::int64_t i) {
  return v[static_cast<std::size_t>(i)];
}
[[nodiscard]] inline double get(const Vector& v, std::int64_t i) {
  return v[static_cast<std::size_t>(i)];
}

/// rows x columns matrix times vector, added to `out`.
template <class Matrix>
void multiply(const Matrix& m, std::int64_t rows, std::int64_t columns, const Vector& v,
              Vector& out) {
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) at(out, i) += at(m, i, j) * get(v, j);
  }
}
template <class Matrix>
void multiply_transposed(const Matrix& m, std::int64_t rows, std::int64_t columns, const Vector& v,
                         Vector& out) {
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) at(out, j) += at(m, i, j) * get(v, i);
  }
}
template <class Matrix>
void add_outer(const Matrix& m, const Vector& a, const Vector& b) {
  for (std::int64_t i = 0; i < std::ssize(a); ++i) {
    for (std::int64_t j = 0; j < std::ssize(b); ++j) add_to(m, get(a, i) * get(b, j), i, j);
  }
}
template <class View>
void add_vector(const View& view, const Vector& a) {
  for (std::int64_t i = 0; i < std::ssize(a); ++i) add_to(view, get(a, i), i);
}

template <class E, class Shift>
void forward_embed(std::int64_t sample, const E& e, const Shift& shift, Activations& a) {
  a.x = zeros(SmallNet::width);
  for (std::int64_t j = 0; j < SmallNet::width; ++j) {
    at(a.x, j) = at(e, SmallNet::token(sample), j) + at(shift, j);
  }
}
template <class W, class B>
void forward_layer0(const W& w0, const B& b0, Activations& a) {
  a.h = zeros(SmallNet::hidden);
  multiply(w0, SmallNet::hidden, SmallNet::width, a.x, a.h);
  for (std::int64_t i = 0; i < SmallNet::hidden; ++i)
    at(a.h, i) = std::tanh(get(a.h, i) + at(b0, i));
}
template <class W, class B, class P>
void forward_layer1(const W& w1, const B& b1, const P& p, double gain, Activations& a) {
  a.z = zeros(SmallNet::width);
  a.y = zeros(SmallNet::width);
  multiply(w1, SmallNet::width, SmallNet::hidden, a.h, a.z);
  multiply(p, SmallNet::width, SmallNet::width, a.x, a.y);
  for (std::int64_t i = 0; i < SmallNet::width; ++i) {
    at(a.z, i) += at(b1, i);
    at(a.y, i) += gain * get(a.z, i);
  }
}
/// Returns the loss and leaves o - target, the gradient of o, in `o`.
template <class E, class C>
double forward_head(std::int64_t sample, const E& e, const C& c, Activations& a) {
  a.o = zeros(SmallNet::tokens);
  multiply(e, SmallNet::tokens, SmallNet::width, a.y, a.o);
  double loss = 0;
  for (std::int64_t i = 0; i < SmallNet::tokens; ++i) {
    at(a.o, i) += at(c, i) - SmallNet::target(sample, i);
    loss += get(a.o, i) * get(a.o, i) / 2;
  }
  return loss;
}

/// Gradients that travel from layer to layer for one sample.
struct Backward {
  Vector dy, dh, dx;
  double dgain = 0;
};

template <class E, class DE, class DC>
void backward_head(const E& e, const DE& de, const DC& dc, const Activations& a, Backward& b) {
  add_outer(de, a.o, a.y);
  add_vector(dc, a.o);
  b.dy = zeros(SmallNet::width);
  multiply_transposed(e, SmallNet::tokens, SmallNet::width, a.o, b.dy);
}
template <class W, class P, class DW, class DB>
void backward_layer1(const W& w1, const P& p, double gain, const DW& dw1, const DB& db1,
                     const Activations& a, Backward& b) {
  Vector dz = b.dy;
  for (double& value : dz) value *= gain;
  b.dgain = 0;
  for (std::int64_t i = 0; i < SmallNet::width; ++i) b.dgain += get(b.dy, i) * get(a.z, i);
  add_outer(dw1, dz, a.h);
  add_vector(db1, dz);
  b.dh = zeros(SmallNet::hidden);
  multiply_transposed(w1, SmallNet::width, SmallNet::hidden, dz, b.dh);
  b.dx = zeros(SmallNet::width);
  multiply_transposed(p, SmallNet::width, SmallNet::width, b.dy, b.dx);
}
template <class W, class DW, class DB>
void backward_layer0(const W& w0, const DW& dw0, const DB& db0, const Activations& a, Backward& b) {
  Vector da = b.dh;
  for (std::int64_t i = 0; i < SmallNet::hidden; ++i) at(da, i) *= 1 - get(a.h, i) * get(a.h, i);
  add_outer(dw0, da, a.x);
  add_vector(db0, da);
  multiply_transposed(w0, SmallNet::hidden, SmallNet::width, da, b.dx);
}
template <class DE>
void backward_embed(std::int64_t sample, const DE& de, const Backward& b) {
  for (std::int64_t j = 0; j < SmallNet::width; ++j) {
    add_to(de, get(b.dx, j), SmallNet::token(sample), j);
  }
}

/// How the two gradients of the tied table meet in one micro-step.
enum class Tied { nested, deferred };

/// The network as an application of mics: gathers a unit where it needs it, at most two at a time.
/// \tparam T  of the parameters; \tparam G  of their gradients
template <class T, class G = T>
class SmallNetClient {
 public:
  SmallNetClient(Engine& engine, const SmallNet& net) : engine_(engine), net_(net) {}

  /// One micro-step over this rank's samples. Collective over the shard group.
  void micro_step(const std::vector<std::int64_t>& samples, bool last, Tied tied) {
    order_.clear();
    engine_.begin_micro_step({.samples = std::ssize(samples), .last = last});
    std::vector<Activations> a(samples.size());
    std::vector<Backward> b(samples.size());
    forward(samples, a);
    const double scale = loss_scale(engine_);
    for (auto& sample : a) {
      for (double& value : sample.o) value *= scale;
    }
    backward(samples, a, b, tied);
  }

  /// Units in the order of the last micro-step's gathers.
  [[nodiscard]] const std::vector<UnitId>& order() const { return order_; }

 private:
  void forward(const std::vector<std::int64_t>& samples, std::vector<Activations>& a) {
    {
      const auto embed = gather(net_.embed);
      const auto misc = gather(net_.misc);
      const auto e = host_view<const T**>(embed, net_.e);
      const auto shift = host_view<const T*>(misc, net_.shift);
      for (std::size_t i = 0; i < samples.size(); ++i) forward_embed(samples[i], e, shift, a[i]);
    }
    {
      const auto layer0 = gather(net_.layer0);
      const auto w0 = host_view<const T**>(layer0, net_.w0);
      const auto b0 = host_view<const T*>(layer0, net_.b0);
      for (auto& sample : a) forward_layer0(w0, b0, sample);
    }
    {
      const auto layer1 = gather(net_.layer1);
      const auto misc = gather(net_.misc);
      const auto w1 = host_view<const T**, Kokkos::LayoutLeft>(layer1, net_.w1);
      const auto b1 = host_view<const T*>(layer1, net_.b1);
      const auto p = host_view<const T**>(layer1, net_.p);
      const auto gain = host_view<const T>(misc, net_.gain);
      for (auto& sample : a) forward_layer1(w1, b1, p, at(gain), sample);
    }
    const auto head = gather(net_.head);
    const auto embed = gather(net_.embed);
    const auto e = host_view<const T**>(embed, net_.e);
    const auto c = host_view<const T*>(head, net_.c);
    for (std::size_t i = 0; i < samples.size(); ++i) {
      add_loss(engine_, forward_head(samples[i], e, c, a[i]));
    }
  }

  void backward(const std::vector<std::int64_t>& samples, const std::vector<Activations>& a,
                std::vector<Backward>& b, Tied tied) {
    std::vector<HostScope> outer;
    {
      const auto embed = gather(net_.embed);
      HostScope d_embed = engine_.gradient(net_.embed);
      HostScope d_head = engine_.gradient(net_.head);
      const auto e = host_view<const T**>(embed, net_.e);
      const auto de = d_embed.template view<G**>(net_.e);
      const auto dc = d_head.template view<G*>(net_.c);
      for (std::size_t i = 0; i < samples.size(); ++i) backward_head(e, de, dc, a[i], b[i]);
      d_head.reduce();
      if (tied == Tied::deferred) {
        d_embed.defer();
      } else {
        d_embed.store();
        outer.push_back(std::move(d_embed));
      }
    }
    {
      const auto layer1 = gather(net_.layer1);
      const auto misc = gather(net_.misc);
      HostScope scope = engine_.gradient(net_.layer1);
      const auto w1 = host_view<const T**, Kokkos::LayoutLeft>(layer1, net_.w1);
      const auto p = host_view<const T**>(layer1, net_.p);
      const auto gain = host_view<const T>(misc, net_.gain);
      const auto dw1 = scope.template view<G**, Kokkos::LayoutLeft>(net_.w1);
      const auto db1 = scope.template view<G*>(net_.b1);
      for (std::size_t i = 0; i < samples.size(); ++i) {
        backward_layer1(w1, p, at(gain), dw1, db1, a[i], b[i]);
      }
      scope.reduce();
    }
    {
      HostScope scope = engine_.gradient(net_.misc);
      const auto dgain = scope.template view<G>(net_.gain);
      for (const auto& sample : b) add_to(dgain, sample.dgain);
      scope.reduce();
    }
    {
      const auto layer0 = gather(net_.layer0);
      HostScope scope = engine_.gradient(net_.layer0);
      const auto w0 = host_view<const T**>(layer0, net_.w0);
      const auto dw0 = scope.template view<G**>(net_.w0);
      const auto db0 = scope.template view<G*>(net_.b0);
      for (std::size_t i = 0; i < samples.size(); ++i) backward_layer0(w0, dw0, db0, a[i], b[i]);
      scope.reduce();
    }
    HostScope d_embed = engine_.gradient(net_.embed);
    const auto de = d_embed.template view<G**>(net_.e);
    for (std::size_t i = 0; i < samples.size(); ++i) backward_embed(samples[i], de, b[i]);
    d_embed.reduce();
    for (auto& scope : outer) scope.reduce();
  }

  [[nodiscard]] Lease gather(UnitId unit) {
    order_.push_back(unit);
    return engine_.gather(unit);
  }

  Engine& engine_;
  const SmallNet& net_;
  std::vector<UnitId> order_;
};

}  // namespace mics::test
