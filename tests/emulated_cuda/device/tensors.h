// Tensors of the emulated device: their bytes lie in host memory, apart from all that the host may touch.
#pragma once
#include <ATen/ATen.h>

#include <string>

#include "races.h"

namespace emulated {

struct Extent {
  char* start;
  size_t size;
};

bool is_on_device(const at::Tensor& tensor);
bool is_pinned_tensor(const at::Tensor& tensor);
Extent extent_of(const at::Tensor& tensor);  // from the first element to the last one, gaps included

at::Tensor as_cpu(const at::Tensor& tensor);                               // the same bytes, for the CPU's kernels
at::Tensor copied_to_device(const at::Tensor& result);                     // with the same strides
at::Tensor as_view(const at::Tensor& base, const at::Tensor& cpu_result);  // of `base`, as the result views its alias

void touch_on_stream(const at::Tensor& tensor, Access access, const std::string& operation);
void touch_on_host(const at::Tensor& tensor, Access access, const std::string& operation);

}  // namespace emulated
