// SPDX-License-Identifier: Apache-2.0
#include <gpt/device/block.hpp>

#include <algorithm>

namespace gpt::device {

namespace {

/// y = x weight^T, weight (outputs, inputs).
Product forward_product(const Rows<const bf16>& x, const Rows<const bf16>& weight) {
  return {.rows = x.extent_int(0),
          .columns = weight.extent_int(0),
          .depth = weight.extent_int(1),
          .transpose_b = Transpose::yes};
}

/// d_x = d_y weight.
Product input_gradient(const Rows<const bf16>& d_y, const Rows<const bf16>& weight) {
  return {
      .rows = d_y.extent_int(0), .columns = weight.extent_int(1), .depth = weight.extent_int(0)};
}

/// d_weight = d_y^T x.
Product weight_gradient(const Rows<const bf16>& d_y, const Rows<const bf16>& x) {
  return {.rows = d_y.extent_int(1),
          .columns = x.extent_int(1),
          .depth = x.extent_int(0),
          .transpose_a = Transpose::yes};
}

/// y = residual + x weight^T + bias.
void linear_residual(const Machine& m, const Rows<const bf16>& x, const Rows<const bf16>& weight,
                     const Array<const bf16>& bias, const Rows<const bf16>& residual,
                     const Rows<bf16>& y) {
  Product product = forward_product(x, weight);
  product.epilogue = Epilogue::bias;
  product.add = true;
  m.products.run(m.exec, product,
                 {.a = x.data(),
                  .b = weight.data(),
                  .d = y.data(),
                  .c = residual.data(),
                  .vector = bias.data()});
}

/// d_weight = d_y^T x, d_bias = column sums of d_y.
void linear_weight_gradient(const Machine& m, const Rows<const bf16>& d_y,
                            const Rows<const bf16>& x, const Rows<bf16>& d_weight,
                            const Array<bf16>& d_bias) {
  Product product = weight_gradient(d_y, x);
  if (d_bias.data() != nullptr) product.epilogue = Epilogue::bias_gradient;
  m.products.run(m.exec, product,
                 {.a = d_y.data(), .b = x.data(), .d = d_weight.data(), .vector = d_bias.data()});
}

void linear_input_gradient(const Machine& m, const Rows<const bf16>& d_y,
                           const Rows<const bf16>& weight, const Rows<bf16>& d_x) {
  m.products.run(m.exec, input_gradient(d_y, weight),
                 {.a = d_y.data(), .b = weight.data(), .d = d_x.data()});
}

void attention(const Machine& m, const BlockActivations& saved, const Scratch& scratch) {
  const int heads = m.shape.heads;
  if (is_fused_head_width(m.shape.width / heads)) {
    attention_forward(m.exec, heads, m.shape.positions, saved.qkv, saved.attention, saved.log_sums);
  } else {
    plain_attention_forward(m.exec, m.products, heads, saved.qkv, saved.attention, scratch.scores);
  }
}

void attention_gradient(const Machine& m, const BlockActivations& saved, const Scratch& scratch) {
  const int heads = m.shape.heads;
  if (is_fused_head_width(m.shape.width / heads)) {
    attention_backward(m.exec, heads, m.shape.positions, scratch.d_narrow, saved.attention,
                       saved.qkv, saved.log_sums, scratch.d_qkv, scratch.row_dots);
  } else {
    plain_attention_backward(m.exec, m.products, heads, scratch.d_narrow, saved.qkv, scratch.d_qkv,
                             scratch.scores, scratch.d_scores);
  }
}

/// The two halves' inputs once more, from what was kept.
void first_norm(const Machine& m, const BlockViews<const bf16>& p, const BlockActivations& saved,
                const Scratch& scratch) {
  layer_norm_forward(m.exec, saved.x, p.ln1_weight, p.ln1_bias, scratch.normal, saved.ln1_mean,
                     saved.ln1_rstd);
}
void second_norm(const Machine& m, const BlockViews<const bf16>& p, const BlockActivations& saved,
                 const Scratch& scratch) {
  layer_norm_forward(m.exec, saved.middle, p.ln2_weight, p.ln2_bias, scratch.normal, saved.ln2_mean,
                     saved.ln2_rstd);
}

}  // namespace

void block_activations(const Machine& m, const BlockViews<const bf16>& p,
                       const BlockActivations& saved, const Scratch& scratch) {
  first_norm(m, p, saved, scratch);
  join_biases(m.exec, p.query_bias, p.value_bias, scratch.qkv_bias);
  Product product = forward_product(scratch.normal, p.qkv_weight);
  product.epilogue = Epilogue::bias;
  m.products.run(m.exec, product,
                 {.a = scratch.normal.data(),
                  .b = p.qkv_weight.data(),
                  .d = saved.qkv.data(),
                  .vector = scratch.qkv_bias.data()});
  attention(m, saved, scratch);
  linear_residual(m, saved.attention, p.proj_weight, p.proj_bias, saved.x, saved.middle);
  second_norm(m, p, saved, scratch);
  product = forward_product(scratch.normal, p.up_weight);
  product.epilogue = Epilogue::gelu;
  m.products.run(m.exec, product,
                 {.a = scratch.normal.data(),
                  .b = p.up_weight.data(),
                  .d = scratch.gelu.data(),
                  .vector = p.up_bias.data(),
                  .auxiliary = saved.up.data()});
}

void block_forward(const Machine& m, const BlockViews<const bf16>& p, const BlockActivations& saved,
                   const Scratch& scratch, Rows<bf16> y) {
  block_activations(m, p, saved, scratch);
  linear_residual(m, scratch.gelu, p.down_weight, p.down_bias, saved.middle, y);
}

void block_backward(const Machine& m, const BlockViews<const bf16>& p,
                    const BlockActivations& saved, const BlockViews<bf16>& g,
                    const Scratch& scratch) {
  gelu_forward(m.exec, saved.up, scratch.gelu);
  linear_weight_gradient(m, scratch.d_x, scratch.gelu, g.down_weight, g.down_bias);
  Product product = input_gradient(scratch.d_x, p.down_weight);
  product.epilogue = Epilogue::gelu_backward;
  m.products.run(m.exec, product,
                 {.a = scratch.d_x.data(),
                  .b = p.down_weight.data(),
                  .d = scratch.d_wide.data(),
                  .vector = g.up_bias.data(),
                  .auxiliary = saved.up.data()});
  second_norm(m, p, saved, scratch);
  linear_weight_gradient(m, scratch.d_wide, scratch.normal, g.up_weight, {});
  linear_input_gradient(m, scratch.d_wide, p.up_weight, scratch.d_narrow);
  layer_norm_backward(m.exec, scratch.d_narrow, saved.middle, saved.ln2_mean, saved.ln2_rstd,
                      p.ln2_weight, Residual::add, scratch.d_x, g.ln2_weight, g.ln2_bias,
                      scratch.partial);
  linear_weight_gradient(m, scratch.d_x, saved.attention, g.proj_weight, g.proj_bias);
  linear_input_gradient(m, scratch.d_x, p.proj_weight, scratch.d_narrow);
  attention_gradient(m, saved, scratch);
  first_norm(m, p, saved, scratch);
  linear_weight_gradient(m, scratch.d_qkv, scratch.normal, g.qkv_weight, scratch.qkv_bias);
  part_biases(m.exec, scratch.qkv_bias, g.query_bias, g.value_bias);
  linear_input_gradient(m, scratch.d_qkv, p.qkv_weight, scratch.d_narrow);
  layer_norm_backward(m.exec, scratch.d_narrow, saved.x, saved.ln1_mean, saved.ln1_rstd,
                      p.ln1_weight, Residual::add, scratch.d_x, g.ln1_weight, g.ln1_bias,
                      scratch.partial);
}

void head(const Machine& m, const FinalViews<const bf16>& p, Rows<const bf16> token,
          Rows<const Token> windows, const Activations& activations, Scalar<double, Exec> loss,
          const HeadGradients* gradients) {
  const Scratch& scratch = activations.scratch();
  const Activations::Head& saved = activations.head();
  layer_norm_forward(m.exec, saved.x, p.weight, p.bias, scratch.normal, saved.mean, saved.rstd);
  const int rows = activations.rows();
  const auto width = static_cast<std::size_t>(m.shape.width);
  for (int first = 0; first < rows; first += activations.logits_rows()) {
    const auto count = static_cast<std::size_t>(std::min(activations.logits_rows(), rows - first));
    const auto part = [&](const Rows<bf16>& all) {
      return Rows<bf16>(all.data() + static_cast<std::size_t>(first) * width, count, width);
    };
    const Rows<bf16> logits(scratch.logits.data(), count, token.extent(0));
    const Rows<bf16> normal = part(scratch.normal);
    m.products.run(m.exec, forward_product(normal, token),
                   {.a = normal.data(), .b = token.data(), .d = logits.data()});
    if (gradients == nullptr) {
      cross_entropy_forward(m.exec, logits, windows, first, scratch.row_losses);
      continue;
    }
    cross_entropy_forward_backward(m.exec, logits, windows, first, gradients->loss_scale,
                                   scratch.row_losses);
    Product of_weight = weight_gradient(logits, normal);
    of_weight.add = first > 0;
    m.products.run(m.exec, of_weight,
                   {.a = logits.data(), .b = normal.data(), .d = gradients->token.data()});
    linear_input_gradient(m, logits, token, part(scratch.d_narrow));
  }
  add_losses(m.exec, scratch.row_losses, m.shape.positions, loss);
  if (gradients == nullptr) return;
  layer_norm_backward(m.exec, scratch.d_narrow, saved.x, saved.mean, saved.rstd, p.weight,
                      Residual::none, scratch.d_x, gradients->norm.weight, gradients->norm.bias,
                      scratch.partial);
}

}  // namespace gpt::device
