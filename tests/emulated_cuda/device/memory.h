// Memory: of the device, with a limit and rounded as torch's allocator rounds; and of the host, pinned.
#pragma once
#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>

namespace emulated {

struct MemoryFigures {
  size_t requested = 0, requested_peak = 0;  // of the device: as tensors asked for,
  size_t allocated = 0, allocated_peak = 0;  // in whole blocks,
  size_t reserved = 0, reserved_peak = 0;    // in whole segments
  size_t limit = (size_t)24 << 30;
  size_t pinned = 0, pinned_peak = 0;            // blocks in use
  size_t pinned_held = 0, pinned_held_peak = 0;  // with those that are kept for reuse
  size_t registered = 0, registered_peak = 0;    // pinned where it was, which torch's allocator does not count
};

MemoryFigures& memory_figures();
void reset_memory_peaks();

c10::DeviceAllocator* device_allocator();
at::HostAllocator* pinned_allocator();

bool is_pinned(const void* address);
void pin(void* address, size_t size);  // memory that exists, as cudaHostRegister does
void unpin(void* address);

}  // namespace emulated
