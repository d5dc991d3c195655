// The host's own accesses: operators on the CPU that read or write pinned memory, which copies may still be using.
#include <ATen/core/function_schema.h>
#include <ATen/record_function.h>

#include <memory>
#include <unordered_set>
#include <utility>
#include <vector>

#include "records.h"
#include "tensors.h"

namespace emulated {
namespace {

// They read no element, and write none that another one may still need.
const std::unordered_set<std::string> TOUCHES_NOTHING = {
    "aten::empty",       "aten::empty_like",    "aten::new_empty",    "aten::new_empty_strided",
    "aten::zeros_like",  "aten::new_zeros",     "aten::set_",         "aten::resize_",
    "aten::is_pinned",   "aten::size",          "aten::is_same_size", "aten::result_type",
    "aten::_has_compatible_shallow_copy_type"};

struct Touched {
  at::Tensor tensor;
  Access access;
};

bool is_pinned_on_cpu(const at::Tensor& tensor) {
  return tensor.device().is_cpu() && tensor.has_storage() && tensor.layout() == at::kStrided &&
         !tensor.key_set().has(c10::DispatchKey::Python) && is_pinned_tensor(tensor);
}

// Return false for an operator of the device: its kernel notes what it touches.
bool add(std::vector<Touched>& touched, const at::Tensor& tensor, Access access) {
  if (!tensor.defined()) return true;
  if (tensor.device().is_cuda()) return false;
  if (is_pinned_on_cpu(tensor)) touched.push_back({tensor, access});
  return true;
}

bool touches_nothing(const c10::FunctionSchema& schema) {
  if (TOUCHES_NOTHING.count(schema.name())) return true;
  for (auto& result : schema.returns()) {
    if (result.alias_info() && !result.alias_info()->isWrite()) return true;  // a view
  }
  return false;
}

std::unique_ptr<at::ObserverContext> note_operator(const at::RecordFunction& call) {
  if (InsideKernel::here()) return nullptr;
  auto schema = call.operator_schema();
  if (!schema || touches_nothing(*schema)) return nullptr;
  std::vector<Touched> touched;
  auto inputs = call.inputs();
  for (size_t i = 0; i < inputs.size() && i < schema->arguments().size(); i++) {
    const auto* alias = schema->arguments()[i].alias_info();
    Access access = alias && alias->isWrite() ? Access::WRITE : Access::READ;
    if (inputs[i].isTensor()) {
      if (!add(touched, inputs[i].toTensor(), access)) return nullptr;
    } else if (inputs[i].isTensorList()) {
      for (const auto& tensor : inputs[i].toTensorVector()) {
        if (!add(touched, tensor, access)) return nullptr;
      }
    }
  }
  for (auto& each : touched) touch_on_host(each.tensor, each.access, schema->name());
  deliver();
  return nullptr;
}

struct Observer {
  Observer() {
    at::addGlobalCallback(
        at::RecordFunctionCallback(note_operator).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
  }
} observer;

}  // namespace
}  // namespace emulated
