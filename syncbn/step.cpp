// The training step of one layer in a process group: forward and backward, each with its exchange, without Python.
//
// step.py builds and calls this file and says when; autograd.py has the equations, kernels/fused.cpp the passes over
// memory. Same operators, same order of additions: not a bit differs from what autograd.py computes.

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/library.h>

#include "kernels/fused.cpp"

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

long code(at::ScalarType dtype) {  // numbered as in fused.py; -1 for others
  switch (dtype) {
    case at::kFloat: return 0;
    case at::kDouble: return 1;
    case at::kHalf: return 2;
    case at::kBFloat16: return 3;
    default: return -1;
  }
}

bool is_plain(const Tensor& t) {
  auto keys = t.key_set();
  return keys.has(c10::DispatchKey::CPU) && !keys.has_any(c10::DispatchKeySet({
             c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
             c10::DispatchKey::Functionalize, c10::DispatchKey::Negative, c10::DispatchKey::Conjugate})) &&
         code(t.scalar_type()) >= 0 && t.const_data_ptr();
}

bool fits(const Optional& t, long channels) {
  return !t || (is_plain(*t) && t->numel() == channels && t->is_contiguous());
}

bool fits_running(const Optional& t, long channels) { return fits(t, channels) && (!t || code(t->scalar_type()) < 2); }

// autograd's functions take no undefined tensors: an empty one is none.
bool is_there(const Tensor& t) { return t.numel() > 0; }

Values values(const Tensor& t) { return is_there(t) ? Values{code(t.scalar_type()), t.data_ptr()} : Values{0, nullptr}; }

Layout layout(const Tensor& x) {
  long channels = x.size(1), num = x.numel(), outer = x.is_contiguous() ? x.size(0) : num / channels;
  return {code(x.scalar_type()), at::get_num_threads(), outer, channels, num / outer / channels};
}

Tensor empty(at::IntArrayRef shape, at::ScalarType dtype) { return at::empty(shape, at::TensorOptions().dtype(dtype)); }

// The exchange of collectives/exchange.py, under way. Where it does not gather, packed is overwritten.
struct Exchange {
  std::vector<Tensor> mine;
  Tensor all;
  long num_ranks;
  c10::intrusive_ptr<c10d::Work> work;
  Exchange(const Tensor& packed, const Group& group, long gather_limit) : mine{packed.view(-1)}, num_ranks(group->getSize()) {
    if (packed.numel() > gather_limit) {
      work = group->allreduce(mine);
      return;
    }
    all = empty({num_ranks * packed.numel()}, at::kDouble);
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // torch 2.13 has no other name
    work = group->_allgather_base(all, mine[0]);
#pragma GCC diagnostic pop
  }
  Tensor wait() {
    work->wait();
    return all.defined() ? at::sum(all.view({num_ranks, mine[0].numel()}), 0) : mine[0];
  }
};

void changed(const Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// mean and invstd, (2, C), of the batch on all ranks; packed is summed over them.
Tensor advance_(const Tensor& packed, const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
                double momentum, double eps) {
  bool is_double = x.scalar_type() == at::kDouble;
  Tensor both = empty({2, x.size(1)}, is_double ? at::kDouble : at::kFloat);
  Tensor mean = both[0], invstd = both[1];
  Advance a{x.size(1), packed.data_ptr<double>(), eps,
            momentum,  values(mean), values(invstd), values(running_mean), values(running_var)};
  advance(&a);
  if (is_there(running_mean)) changed(running_mean), changed(running_var);
  return both;
}

// dy as its kernels read it: in the memory format and dtype of x. Undefined here, it is perhaps not on other ranks.
Tensor like(const Tensor& dy, const Tensor& x) {
  if (!dy.defined()) return at::zeros_like(x);
  bool is_alike = dy.strides() == x.strides() && dy.scalar_type() == x.scalar_type();
  return is_alike ? dy : at::empty_like(x).copy_(dy);
}

struct Step : torch::autograd::Function<Step> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                        const Tensor& running_mean, const Tensor& running_var, double momentum, double eps,
                        const Group& group, long gather_limit) {
    long channels = x.size(1);
    Layout at = layout(x);
    Tensor packed = empty({2 * channels + 1}, at::kDouble);
    LocalSums local{at, x.const_data_ptr(), packed.data_ptr<double>()};
    local_sums(&local);
    packed = Exchange(packed, group, gather_limit).wait();
    Tensor both = advance_(packed, x, running_mean, running_var, momentum, eps), y = at::empty_like(x);
    Normalize last{at, values(both[0]), values(both[1]), values(weight), values(bias), x.const_data_ptr(), y.data_ptr()};
    normalize(&last);
    ctx->save_for_backward({x, weight, both});
    ctx->set_materialize_grads(false);
    auto& data = ctx->saved_data;
    data["needs"] = std::vector<bool>{x.requires_grad(), weight.requires_grad(), bias.requires_grad()};
    data["bias_dtype"] = bias.scalar_type();
    data["count"] = packed.data_ptr<double>()[2 * channels];
    data["eps"] = eps;
    data["group"] = group;
    data["gather_limit"] = gather_limit;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list dys) {
    auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &dy = dys[0];
    bool is_usual = !at::GradMode::is_enabled() && is_plain(x) && (!dy.defined() || is_plain(dy));
    is_usual = is_usual && !c10::impl::dispatch_mode_enabled();
    if (!is_usual) return general(ctx, x, weight, saved[2], dy);
    try {
      return quick(ctx, x, weight, saved[2], like(dy, x));
    } catch (c10::Error& error) {
      error.add_context(explain(weight));
      throw;
    } catch (const std::runtime_error& error) {  // gloo's
      throw std::runtime_error(std::string(error.what()) + "\n" + explain(weight));
    }
  }

  // What debug.py says of an error.
  static std::string explain(const Tensor& weight) {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("syncbn::explain", "");
    torch::jit::Stack stack{weight};
    op.callBoxed(&stack);
    return stack[0].toStringRef();
  }

  static variable_list quick(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& both,
                             const Tensor& dy) {
    auto& data = ctx->saved_data;
    auto needs = data["needs"].toBoolList();
    long channels = x.size(1);
    Layout at = layout(x);
    Values mean = values(both[0]), invstd = values(both[1]);
    Tensor sums = empty({2, channels}, at::kDouble);
    BackwardSums local{at, mean, invstd, dy.const_data_ptr(), x.const_data_ptr(), sums.data_ptr<double>()};
    backward_sums(&local);
    std::optional<Exchange> exchange;
    long gather_limit = data["gather_limit"].toInt();
    auto group = data["group"].toCustomClass<c10d::ProcessGroup>();
    if (needs[0]) exchange.emplace(sums.numel() > gather_limit ? sums.clone() : sums, group, gather_limit);
    Tensor dx, dweight, dbias;  // while it is under way
    if (needs[1]) dweight = sums[1].to(weight.scalar_type(), false, true);
    if (needs[2]) dbias = sums[0].to(data["bias_dtype"].toScalarType(), false, true);
    if (exchange) {
      Tensor total = exchange->wait();
      double count = data["count"].toDouble();
      dx = at::empty_like(x);
      InputGradient last{at,  mean, invstd, values(weight), dy.const_data_ptr(), x.const_data_ptr(),
                         total.data_ptr<double>(), &count, dx.data_ptr()};
      input_gradient(&last);
    }
    return {dx, dweight, dbias, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }

  // In Python: gradients that can be differentiated again, and what is traced or batched.
  static variable_list general(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& both,
                               const Tensor& dy) {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("syncbn::backward", "");
    auto& data = ctx->saved_data;
    auto optional = [](const Tensor& t) { return t.defined() && is_there(t) ? c10::IValue(t) : c10::IValue(); };
    Tensor count = at::scalar_tensor(data["count"].toScalar(), at::TensorOptions().dtype(at::kDouble));
    torch::jit::Stack stack{optional(dy), x, optional(weight), count, both, data["needs"], data["eps"],
                            data["bias_dtype"], data["group"]};
    op.callBoxed(&stack);
    variable_list gradients(9);
    for (size_t i = 0; i < 3; ++i)
      if (!stack[i].isNone()) gradients[i] = stack[i].toTensor();
    return gradients;
  }
};

// None where a tensor is not plain: Python goes on.
Optional train(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& running_mean,
               const Optional& running_var, double momentum, double eps, const Group& group,
               long gather_limit) {
  long channels = x.size(1);
  bool is_usual = fits(weight, channels) && fits(bias, channels) && fits_running(running_mean, channels) &&
                  fits_running(running_var, channels) && running_mean.has_value() == running_var.has_value() &&
                  (!running_mean || running_mean->scalar_type() == running_var->scalar_type());
  if (!is_usual) return std::nullopt;
  auto of = [](const Optional& t) { return t ? *t : empty({0}, at::kDouble); };
  return Step::apply(x, of(weight), of(bias), of(running_mean), of(running_var), momentum, eps, group, gather_limit);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(syncbn, library) {
  library.def(
      "train(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, float momentum, "
      "float eps, __torch__.torch.classes.c10d.ProcessGroup group, int gather_limit) -> Tensor?",
      train);
}
