#include "tensors.h"

#include <ATen/EmptyTensor.h>

#include <cstring>

#include "actors.h"
#include "memory.h"

namespace emulated {
namespace {

using c10::DispatchKey;

char* base_of(const at::Tensor& tensor) {
  return (char*)tensor.storage().unsafeGetStorageImpl()->mutable_data();
}

at::Tensor strided(c10::intrusive_ptr<c10::TensorImpl> tensor, int64_t offset, const at::Tensor& like) {
  tensor->set_storage_offset(offset);
  tensor->set_sizes_and_strides(like.sizes(), like.strides());
  return at::Tensor(std::move(tensor));
}

}  // namespace

bool is_on_device(const at::Tensor& tensor) { return tensor.defined() && tensor.device().is_cuda(); }

bool is_pinned_tensor(const at::Tensor& tensor) {
  Extent extent = extent_of(tensor);
  return extent.start && is_pinned(extent.start);
}

Extent extent_of(const at::Tensor& tensor) {
  char* base = base_of(tensor);
  if (tensor.numel() == 0 || !base) return {nullptr, 0};
  size_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); dim++) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  return {base + tensor.storage_offset() * tensor.itemsize(), (last + 1) * tensor.itemsize()};
}

at::Tensor as_cpu(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  char* base = base_of(tensor);
  if (tensor.numel() == 0 || !base) {
    return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
  }
  at::DataPtr borrowed(base, base, [](void*) {}, at::Device(at::kCPU));
  c10::Storage storage(
      c10::Storage::use_byte_size_t{}, tensor.storage().nbytes(), std::move(borrowed), nullptr, /*resizable=*/false);
  c10::DispatchKeySet keys({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::ADInplaceOrView});
  auto alias = c10::make_intrusive<c10::TensorImpl>(std::move(storage), keys, tensor.dtype());
  return strided(std::move(alias), tensor.storage_offset(), tensor);
}

at::Tensor copied_to_device(const at::Tensor& result) {
  at::Tensor copy(at::detail::empty_strided_generic(
      result.sizes(), result.strides(), device_allocator(), c10::DispatchKeySet(DispatchKey::CUDA), result.scalar_type()));
  Extent to = extent_of(copy), from = extent_of(result);
  if (to.start && from.start) std::memcpy(to.start, from.start, to.size);
  return copy;
}

at::Tensor as_view(const at::Tensor& base, const at::Tensor& cpu_result) {
  auto view = c10::make_intrusive<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), cpu_result.dtype());
  int64_t offset = base.storage_offset();
  if (cpu_result.numel()) offset = (extent_of(cpu_result).start - base_of(base)) / (int64_t)cpu_result.itemsize();
  return strided(std::move(view), offset, cpu_result);
}

void touch_on_stream(const at::Tensor& tensor, Access access, const std::string& operation) {
  if (Extent extent = extent_of(tensor); extent.start) {
    touch((Actor)current_stream(), extent.start, extent.size, access, operation);
  }
}

void touch_on_host(const at::Tensor& tensor, Access access, const std::string& operation) {
  if (Extent extent = extent_of(tensor); extent.start) {
    act_on_host();
    touch(this_thread(), extent.start, extent.size, access, operation);
  }
}

}  // namespace emulated
