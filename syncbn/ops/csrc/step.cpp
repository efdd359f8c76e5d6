// The training step of one layer in a process group: forward and backward, each with its exchange, without Python.
//
// step.py builds and calls this file and says when; autograd.py has the equations, kernels/fused.cpp the passes over
// memory. Same operators, same order of additions: not a bit differs from what autograd.py computes.

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/library.h>

#include "kernels/fused.cpp"

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether nobody follows the operators, who would miss what is done here.
bool is_unseen() {
  auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return !c10::impl::dispatch_mode_enabled() && !torch::jit::tracer::isTracing() &&
         !included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

// Whether this is a first forward pass outside of any checkpoint (of recompute.py, by a saved-tensors hook).
bool is_first() {
  return torch::autograd::get_current_graph_task_id() == -1 && at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
}

long code(at::ScalarType dtype) {  // numbered as in fused.py; -1 for others
  switch (dtype) {
    case at::kFloat: return 0;
    case at::kDouble: return 1;
    case at::kHalf: return 2;
    case at::kBFloat16: return 3;
    default: return -1;
  }
}

bool is_ordinary(const Tensor& t) {
  static const c10::DispatchKeySet others{
      c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
      c10::DispatchKey::Functionalize, c10::DispatchKey::Negative, c10::DispatchKey::Conjugate};
  auto keys = t.key_set();
  return keys.has(c10::DispatchKey::CPU) && !keys.has_any(others) && t.const_data_ptr();
}

bool is_plain(const Tensor& t) { return is_ordinary(t) && code(t.scalar_type()) >= 0; }

// Whether x lies in memory as [outer][channels][inner], with inner = 1 for channels-last; as in fused.py.
bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  long next = x.size(1);
  for (long i = x.dim() - 1; i >= 0; --i) {
    if (i == 1) continue;
    if (x.size(i) != 1 && x.stride(i) != next) return false;
    next *= x.size(i);
  }
  return x.size(1) == 1 || x.stride(1) == 1;
}

// Whether it may be changed here, which only inference mode may do to what it made.
bool may_change(const Tensor& t) { return !t.is_inference() || c10::InferenceMode::is_enabled(); }

bool fits(const Optional& t, long channels) {
  return !t || (is_plain(*t) && t->numel() == channels && t->is_contiguous());
}

bool is_count(const Optional& t) {
  return !t || (is_ordinary(*t) && may_change(*t) && t->scalar_type() == at::kLong && t->numel() == 1);
}

bool fits_running(const Optional& t, long channels) {
  return fits(t, channels) && (!t || (may_change(*t) && code(t->scalar_type()) < 2));
}

// autograd's functions take no undefined tensors: an empty one is none.
bool is_there(const Tensor& t) { return t.numel() > 0; }

Values values(const Tensor& t) { return is_there(t) ? Values{code(t.scalar_type()), t.data_ptr()} : Values{0, nullptr}; }

Layout layout(const Tensor& x) {
  long channels = x.size(1), num = x.numel(), outer = x.is_contiguous() ? x.size(0) : num / channels;
  return {code(x.scalar_type()), at::get_num_threads(), outer, channels, num / outer / channels};
}

// Past the dispatcher, which takes longer than a small layer's arithmetic.
Tensor empty(at::IntArrayRef shape, at::ScalarType dtype) {
  return at::detail::empty_cpu(shape, at::TensorOptions().dtype(dtype));
}

Tensor new_like(const Tensor& x) {
  return at::detail::empty_strided_cpu(x.sizes(), x.strides(), at::TensorOptions().dtype(x.dtype()));
}

double* doubles_of(const Tensor& t) { return t.data_ptr<double>(); }

// Row 0 or 1 of mean and invstd, (2, C).
Values row(const Tensor& both, long i) {
  auto start = static_cast<char*>(both.data_ptr()) + i * both.size(1) * both.element_size();
  return {code(both.scalar_type()), start};
}

// The exchange of collectives/exchange.py, under way. Where it does not gather, packed is overwritten.
struct Exchange {
  std::vector<Tensor> mine;
  Tensor all;
  long num_ranks;
  c10::intrusive_ptr<c10d::Work> work;
  Exchange(const Tensor& packed, const Group& group, long gather_limit) : mine{packed}, num_ranks(group->getSize()) {
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
  // The sum over the ranks: lives as long as this does.
  double* wait() {
    work->wait();
    if (!all.defined()) return doubles_of(mine[0]);
    long num = mine[0].numel();
    if (num_ranks >= IN_TURN) {
      mine[0] = at::sum(all.view({num_ranks, num}), 0);
      return doubles_of(mine[0]);
    }
    double* sum = doubles_of(all);
    for (long i = 0; i < num; ++i) sum[i] += 0.0;  // a zero has no sign then, as in at::sum
    for (long r = 1; r < num_ranks; ++r)
      for (long i = 0; i < num; ++i) sum[i] += sum[r * num + i];
    return sum;
  }
  static constexpr long IN_TURN = 5;  // rows that at::sum adds up in another order
};

constexpr auto OF_EXCHANGE = "(in an exchange of SyncBatchNorm)";  // step.py looks for it

// f(), whose errors say more.
template <class F, class G> auto in_exchange(F f, G say) try {
  return f();
} catch (c10::Error& error) {
  error.add_context(say());
  throw;
} catch (const std::runtime_error& error) {  // gloo's
  throw std::runtime_error(std::string(error.what()) + "\n" + say());
}

void changed(const Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// mean and invstd, (2, C), of the batch on all ranks; packed is summed over them.
Tensor advance_(const double* packed, const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
                double momentum, double eps) {
  Tensor both = empty({2, x.size(1)}, x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  Advance a{x.size(1), packed, eps, momentum, row(both, 0), row(both, 1), values(running_mean), values(running_var)};
  advance(&a);
  if (is_there(running_mean)) changed(running_mean), changed(running_var);
  return both;
}

template <class T> T rounded(double v) {
  if constexpr (std::is_same_v<T, Half>) return {c10::Half(float(v)).x};
  if constexpr (std::is_same_v<T, BFloat>) return {c10::BFloat16(float(v)).x};
  if constexpr (std::is_floating_point_v<T>) return v;
}

// A gradient of a parameter, of its dtype.
Tensor as(at::ScalarType dtype, const double* values, long num) {
  Tensor t = empty({num}, dtype);
  with_dtype(code(dtype), [&](auto zero) {
    using T = decltype(zero);
    auto out = static_cast<T*>(t.data_ptr());
    for (long c = 0; c < num; ++c) out[c] = rounded<T>(values[c]);
  });
  return t;
}

// dy as its kernels read it: in the memory format and dtype of x. Undefined here, it is perhaps not on other ranks.
Tensor like(const Tensor& dy, const Tensor& x) {
  if (!dy.defined()) return at::zeros_like(x);
  bool is_alike = dy.strides() == x.strides() && dy.scalar_type() == x.scalar_type();
  return is_alike ? dy : new_like(x).copy_(dy);
}

struct Step : torch::autograd::Function<Step> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                        const Tensor& running_mean, const Tensor& running_var, double momentum, double eps,
                        const Group& group, long gather_limit) {
    long channels = x.size(1);
    Layout at = layout(x);
    Tensor packed = empty({2 * channels + 1}, at::kDouble);
    LocalSums local{at, x.const_data_ptr(), doubles_of(packed)};
    local_sums(&local);
    auto say = [] { return std::string(OF_EXCHANGE); };
    Exchange exchange = in_exchange([&] { return Exchange(packed, group, gather_limit); }, say);
    Tensor y = new_like(x);  // while it is under way
    const double* total = in_exchange([&] { return exchange.wait(); }, say);
    Tensor both = advance_(total, x, running_mean, running_var, momentum, eps);
    Normalize last{at, row(both, 0), row(both, 1), values(weight), values(bias), x.const_data_ptr(), y.data_ptr()};
    normalize(&last);
    ctx->save_for_backward({x, weight, both});
    ctx->set_materialize_grads(false);
    auto& data = ctx->saved_data;
    data["needs"] = std::vector<bool>{x.requires_grad(), weight.requires_grad(), bias.requires_grad()};
    data["bias_dtype"] = bias.scalar_type();
    data["count"] = total[2 * channels];
    data["eps"] = eps;
    data["group"] = group->getGroupName();  // compiled autograd hashes what is here, and a group has no hash
    data["gather_limit"] = gather_limit;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list dys) {
    auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &dy = dys[0];
    TORCH_CHECK(!is_there(weight) || !weight.is_cpu() || weight.const_data_ptr(),
                "SyncBatchNorm: expected the weight to be in memory in the backward pass, found its storage freed; "
                "keep it, or gather it again before (as FSDP does).");
    bool is_usual = !at::GradMode::is_enabled() && is_plain(x) && (!dy.defined() || is_plain(dy));
    is_usual = is_usual && is_unseen();
    if (!is_usual) return general(ctx, x, weight, saved[2], dy);
    return quick(ctx, x, weight, saved[2], like(dy, x));
  }

  // What debug.py says of an error.
  static std::string explain(const Tensor& weight) try {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("syncbn::explain", "");
    torch::jit::Stack stack{weight};
    op.callBoxed(&stack);
    return stack[0].toStringRef();
  } catch (const std::exception&) {
    return OF_EXCHANGE;
  }

  static variable_list quick(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& both,
                             const Tensor& dy) {
    auto& data = ctx->saved_data;
    auto needs = data["needs"].toBoolList();
    long channels = x.size(1);
    Layout at = layout(x);
    Values mean = row(both, 0), invstd = row(both, 1);
    Tensor sums = empty({2 * channels}, at::kDouble);
    BackwardSums local{at, mean, invstd, dy.const_data_ptr(), x.const_data_ptr(), doubles_of(sums)};
    backward_sums(&local);
    std::optional<Exchange> exchange;
    long gather_limit = data["gather_limit"].toInt();
    auto group = c10d::resolve_process_group(data["group"].toStringRef());
    if (needs[0]) {
      Tensor sent = sums.numel() > gather_limit ? new_like(sums) : sums;
      if (!sent.is_same(sums)) std::copy_n(doubles_of(sums), 2 * channels, doubles_of(sent));
      in_exchange([&] { return &exchange.emplace(sent, group, gather_limit); }, [&] { return explain(weight); });
    }
    Tensor dx, dweight, dbias;  // while it is under way
    if (needs[1]) dweight = as(weight.scalar_type(), doubles_of(sums) + channels, channels);
    if (needs[2]) dbias = as(data["bias_dtype"].toScalarType(), doubles_of(sums), channels);
    if (exchange) {
      dx = new_like(x);
      double count = data["count"].toDouble();
      double* total = in_exchange([&] { return exchange->wait(); }, [&] { return explain(weight); });
      InputGradient last{at,  mean, invstd, values(weight), dy.const_data_ptr(), x.const_data_ptr(),
                         total, &count, dx.data_ptr()};
      input_gradient(&last);
    }
    return {dx, dweight, dbias, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }

  // In Python: gradients that can be differentiated again, and what is traced.
  static variable_list general(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& both,
                               const Tensor& dy) {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("syncbn::backward", "");
    auto& data = ctx->saved_data;
    auto optional = [](const Tensor& t) { return t.defined() && is_there(t) ? c10::IValue(t) : c10::IValue(); };
    Tensor count = at::scalar_tensor(data["count"].toScalar(), at::TensorOptions().dtype(at::kDouble));
    torch::jit::Stack stack{optional(dy), x, optional(weight), count, both, data["needs"], data["eps"],
                            data["bias_dtype"], c10d::resolve_process_group(data["group"].toStringRef())};
    op.callBoxed(&stack);
    variable_list gradients(9);
    for (size_t i = 0; i < 3; ++i)
      if (!stack[i].isNone()) gradients[i] = stack[i].toTensor();
    return gradients;
  }
};

// None where something is not usual: Python goes on.
Optional train(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& running_mean,
               const Optional& running_var, const Optional& num_batches, double momentum, double eps,
               std::string group_name, long gather_limit) {
  long channels = x.size(1);
  bool is_usual = is_unseen() && is_first() && is_plain(x) && is_dense(x) && x.numel() > channels &&
                  fits(weight, channels) && fits(bias, channels) &&
                  fits_running(running_mean, channels) && fits_running(running_var, channels) &&
                  running_mean.has_value() == running_var.has_value() && is_count(num_batches) &&
                  (!running_mean || running_mean->scalar_type() == running_var->scalar_type());
  if (!is_usual) return std::nullopt;
  auto of = [](const Optional& t) { return t ? *t : empty({0}, at::kDouble); };
  auto group = c10d::resolve_process_group(group_name);
  if (num_batches) ++*num_batches->data_ptr<int64_t>(), changed(*num_batches);
  return Step::apply(x, of(weight), of(bias), of(running_mean), of(running_var), momentum, eps, group, gather_limit);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(syncbn, library) {
  library.def(
      "train(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
      "Tensor? num_batches, float momentum, float eps, str group, int gather_limit) -> Tensor?",
      train);
}
