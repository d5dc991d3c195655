// Kernels: every operator runs at once, by the CPU's kernel on the same bytes, and is noted as the current stream's.
//
// An operator without a kernel of its own here goes through `run_on_cpu`. Fused attention is not emulated: torch is told to
// take its plain products and softmax, which save more activations than a card's kernels.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include <cstring>
#include <unordered_set>

#include "actors.h"
#include "device.h"
#include "memory.h"
#include "races.h"
#include "records.h"
#include "tensors.h"

namespace emulated {
namespace {

using c10::DispatchKey;
using c10::IValue;

// Indexing takes indices on the host, and sends them itself.
const std::unordered_set<std::string> INDEXING = {
    "aten::index.Tensor", "aten::_unsafe_index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};

// The size of their results, or the results themselves, are values on the device.
const std::unordered_set<std::string> READS_VALUES = {
    "aten::nonzero",     "aten::masked_select",     "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::equal",       "aten::is_nonzero",        "aten::bincount", "aten::repeat_interleave.Tensor"};

std::string name_of(const c10::FunctionSchema& schema) {
  return schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
}

bool writes(const c10::AliasInfo* alias) { return alias && alias->isWrite(); }

bool returns_views(const c10::FunctionSchema& schema) {
  for (auto& result : schema.returns()) {
    if (result.alias_info() && !result.alias_info()->isWrite()) return true;
  }
  return false;
}

// Random operators without a generator draw from the CPU's default one: for a moment it is the device's.
class DeviceRandomness {
 public:
  explicit DeviceRandomness(bool is_needed) : is_needed_(is_needed) {
    if (!is_needed_) return;
    saved_ = cpu()->get_state();
    cpu()->set_state(*device()->get_state());
  }
  ~DeviceRandomness() {
    if (!is_needed_) return;
    device()->set_state(*cpu()->get_state());
    cpu()->set_state(*saved_);
  }

 private:
  static c10::GeneratorImpl* cpu() { return at::detail::getDefaultCPUGenerator().unsafeGetGeneratorImpl(); }
  static c10::GeneratorImpl* device() { return cpu_generator_of(default_generator()).unsafeGetGeneratorImpl(); }
  bool is_needed_;
  c10::intrusive_ptr<c10::TensorImpl> saved_;
};

// ------------------------------------------------------------------------------------------------ any operator

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op),
        schema_(op.schema()),
        stack_(stack),
        name_(name_of(op.schema())),
        is_view_(returns_views(op.schema())),
        num_arguments_(op.schema().arguments().size()),
        originals_(stack->end() - num_arguments_, stack->end()) {}

  void run() {
    InsideKernel inside;
    if (!is_view_) {
      launch();
      figures().kernels++;
      count("kernel: " + name_);
    }
    take_arguments();
    check_devices();
    {
      bool draws = !has_generator_ && op_.hasTag(at::Tag::nondeterministic_seeded);
      DeviceRandomness randomness(draws);
      op_.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack_);
    }
    fill_resized();
    if (READS_VALUES.count(name_) || reads_mask_) wait_for_current_stream(name_);
    if (INDEXING.count(name_) && has_host_ && has_device_) wait_for_current_stream(name_ + " with indices on the host");
    return_results();
  }

 private:
  // The arguments become the CPU's: aliases of tensors on the device, the CPU for the device, its generator for ours.
  void take_arguments() {
    size_t begin = stack_->size() - num_arguments_;
    for (size_t i = 0; i < num_arguments_; i++) {
      IValue& value = (*stack_)[begin + i];
      Access access = writes(schema_.arguments()[i].alias_info()) ? Access::WRITE : Access::READ;
      if (value.isTensor()) {
        value = take(value.toTensor(), access);
      } else if (value.isTensorList()) {
        auto tensors = value.toTensorVector();
        for (auto& tensor : tensors) tensor = take(tensor, access);
        value = c10::List<at::Tensor>(tensors);
      } else if (value.isOptionalTensorList()) {
        c10::List<std::optional<at::Tensor>> taken;
        for (auto& tensor : value.toOptionalTensorVector()) {
          if (tensor && is_on_device(*tensor) && INDEXING.count(name_) && is_mask(*tensor)) reads_mask_ = true;
          taken.push_back(tensor ? std::optional<at::Tensor>(take(*tensor, access)) : tensor);
        }
        value = taken;
      } else if (value.isDevice() && value.toDevice().is_cuda()) {
        has_device_ = true;
        value = at::Device(at::kCPU);
      } else if (value.isGenerator()) {
        has_generator_ = true;
        value = cpu_generator_of(value.toGenerator());
      }
    }
  }

  static bool is_mask(const at::Tensor& index) {
    return index.scalar_type() == at::kBool || index.scalar_type() == at::kByte;
  }

  at::Tensor take(const at::Tensor& tensor, Access access) {
    if (!tensor.defined()) return tensor;
    if (!is_on_device(tensor)) {
      has_host_ |= tensor.dim() > 0;  // numbers may come from the host
      return tensor;
    }
    has_device_ = true;
    if (!is_view_) touch_on_stream(tensor, access, name_);
    if (access == Access::READ || tensor.numel() > 0) return as_cpu(tensor);
    // An empty `out` is made larger by the operator, which an alias cannot be.
    at::Tensor own = at::empty(tensor.sizes(), tensor.options().device(at::kCPU));
    resized_.push_back({tensor, own});
    return own;
  }

  void check_devices() const {
    TORCH_CHECK(
        !(has_device_ && has_host_) || INDEXING.count(name_),
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (", name_,
        " on the emulated device)");
  }

  void fill_resized() {
    for (auto& [device, own] : resized_) {
      if (own.numel() == 0 && own.sizes() == device.sizes()) continue;
      device.resize_(own.sizes());
      as_cpu(device).copy_(own);
      touch_on_stream(device, Access::WRITE, name_);
    }
  }

  void return_results() {
    size_t begin = stack_->size() - schema_.returns().size();
    for (size_t i = 0; i < schema_.returns().size(); i++) {
      IValue& value = (*stack_)[begin + i];
      const auto* alias = schema_.returns()[i].alias_info();
      const IValue* source = alias ? source_of(*alias) : nullptr;
      if (value.isTensor()) {
        value = give_back(value.toTensor(), source, writes(alias));
      } else if (value.isTensorList()) {
        if (writes(alias) && source) {
          value = *source;
          continue;
        }
        auto tensors = value.toTensorVector();
        for (auto& tensor : tensors) tensor = give_back(tensor, source, false);
        value = c10::List<at::Tensor>(tensors);
      }
    }
  }

  const IValue* source_of(const c10::AliasInfo& alias) const {
    const IValue* source = nullptr;
    for (size_t i = 0; i < num_arguments_; i++) {
      const auto* other = schema_.arguments()[i].alias_info();
      if (other && other->beforeSets() == alias.beforeSets()) source = &originals_[i];
    }
    return source;
  }

  at::Tensor give_back(const at::Tensor& result, const IValue* source, bool is_written) const {
    if (!result.defined() || !has_device_) return result;
    if (source && source->isTensor()) return is_written ? source->toTensor() : as_view(source->toTensor(), result);
    at::Tensor device = copied_to_device(result);
    touch_on_stream(device, Access::WRITE, name_);
    return device;
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  torch::jit::Stack* stack_;
  std::string name_;
  bool is_view_;
  size_t num_arguments_;
  std::vector<IValue> originals_;
  bool has_device_ = false, has_host_ = false, has_generator_ = false, reads_mask_ = false;
  struct Resized {
    at::Tensor device, own;
  };
  std::vector<Resized> resized_;
};

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call(op, stack).run();
  deliver();
}

// ------------------------------------------------------------------------------------------------ copies

struct Copy {
  at::Tensor to, from;
  bool is_non_blocking;
  bool to_device = is_on_device(to), from_device = is_on_device(from);

  bool stays_on_device() const { return to_device && from_device; }
  const at::Tensor& host_side() const { return to_device ? from : to; }
  const char* name() const { return stays_on_device() ? "copy on the device" : to_device ? "copy to the device" : "copy to the host"; }
  // Another dtype or layout: a kernel converts next to the copy, which then waits.
  bool needs_temporary() const {
    return to.scalar_type() != from.scalar_type() || !to.is_contiguous() || !from.is_contiguous();
  }

  void note() const {
    launch();
    figures().copies++;
    if (stays_on_device()) figures().kernels++;
    else (to_device ? figures().bytes_to_device : figures().bytes_to_host) += to.nbytes();
    if (from_device) touch_on_stream(from, Access::READ, name());
    if (to_device) touch_on_stream(to, Access::WRITE, name());
    if (stays_on_device()) count(name());
    else note_host_side();
  }

  void note_host_side() const {
    bool pinned = is_pinned_tensor(host_side());
    std::string how = std::string(is_non_blocking ? "non-blocking " : "blocking ") + name();
    count(how + (pinned ? ", pinned" : ", pageable") + (needs_temporary() ? ", converted" : ""));
    if (pinned) {
      Access access = to_device ? Access::READ : Access::WRITE;
      if (is_non_blocking && !needs_temporary()) touch_on_stream(host_side(), access, name());
      else touch_on_host(host_side(), access, name());
    }
    if (!is_non_blocking) wait_for_current_stream(how);
    else if (!pinned && !to_device) wait_for_current_stream(how + " that is not pinned");
  }

  void move() const {
    InsideKernel inside;
    at::NoGradGuard no_grad;
    c10::impl::ExcludeDispatchKeyGuard without_autograd(c10::autograd_dispatch_keyset);
    (to_device ? as_cpu(to) : to).copy_(from_device ? as_cpu(from) : from);
  }
};

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool is_non_blocking) {
  if (to.is_same(from) || to.numel() == 0) return to;
  Copy copy{to, from.sizes() == to.sizes() ? from : from.expand(to.sizes()), is_non_blocking};
  copy.note();
  copy.move();
  deliver();
  return to;
}

at::Scalar local_scalar_dense(const at::Tensor& number) {
  at::Scalar value;
  {
    InsideKernel inside;
    launch();
    touch_on_stream(number, Access::READ, "item");
    wait_for_current_stream("item");
    value = at::_local_scalar_dense(as_cpu(number));
  }
  deliver();
  return value;
}

// ------------------------------------------------------------------------------------------------ tensors

using Sizes = at::IntArrayRef;

at::ScalarType or_default(std::optional<at::ScalarType> dtype) {
  return dtype.value_or(at::get_default_dtype_as_scalartype());
}

at::Tensor empty(
    Sizes size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DispatchKeySet keys(DispatchKey::CUDA);
  return at::Tensor(at::detail::empty_generic(size, device_allocator(), keys, or_default(dtype), format));
}

at::Tensor empty_strided(
    Sizes size, Sizes stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>) {
  c10::DispatchKeySet keys(DispatchKey::CUDA);
  return at::Tensor(at::detail::empty_strided_generic(size, stride, device_allocator(), keys, or_default(dtype)));
}

const at::Tensor& resize_(const at::Tensor& tensor, Sizes size, std::optional<at::MemoryFormat>) {
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  size_t needed = (tensor.storage_offset() + tensor.numel()) * tensor.itemsize();
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  if (storage->nbytes() < needed) {
    at::DataPtr memory = device_allocator()->allocate(needed);
    if (storage->nbytes()) std::memcpy(memory.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(memory));
    storage->set_nbytes(needed);
  }
  return tensor;
}

at::Tensor& set_(at::Tensor& tensor, at::Storage source, int64_t offset, Sizes size, Sizes stride) {
  auto* own = tensor.unsafeGetTensorImpl();
  own->set_storage_keep_dtype(source);
  own->set_storage_offset(offset);
  if (stride.empty() && !size.empty()) own->set_sizes_contiguous(size);
  else own->set_sizes_and_strides(size, stride);
  return tensor;
}

void record_stream(at::Tensor& tensor, at::Stream stream) {
  device_allocator()->recordStream(tensor.storage().data_ptr(), stream);
}

// ------------------------------------------------------------------------------------------------ attention

constexpr int64_t PLAIN_ATTENTION = 0;  // sdp::SDPBackend::math

int64_t choose_attention(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>& mask, double, bool,
    std::optional<double>, bool) {
  count(mask && mask->defined() ? "attention with a mask" : "attention without a mask");
  return PLAIN_ATTENTION;
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("resize_", resize_);
  library.impl("set_.source_Storage_storage_offset", set_);
  library.impl("copy_", copy_);
  library.impl("_local_scalar_dense", local_scalar_dense);
  library.impl("_fused_sdp_choice", choose_attention);
  library.impl("record_stream", record_stream);
}

}  // namespace
}  // namespace emulated
