#include "memory.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include "actors.h"
#include "races.h"
#include "segments.h"

namespace emulated {
namespace {

constexpr size_t PAGE = 4096;
constexpr int NAN_BYTE = 0xFF;  // four of them are a NaN in every float type, so what is read before it is written shows
constexpr size_t MOST_FILLED = (size_t)64 << 20;  // of pinned memory: the pages of more would be taken for nothing

struct Block {
  size_t size, counted;
  Actor stream;
  uint64_t piece;
  std::set<Actor> recorded;
};

std::map<uint64_t, Block>& blocks() {
  static auto* all = new std::map<uint64_t, Block>();
  return *all;
}

Segments& segments() {
  static auto* all = new Segments();
  return *all;
}

// Address -> size, of pinned memory; and of what is kept for reuse, the number of blocks of each size.
std::map<uint64_t, size_t>& pinned_blocks() {
  static auto* all = new std::map<uint64_t, size_t>();
  return *all;
}

std::map<size_t, int>& kept_blocks() {
  static auto* all = new std::map<size_t, int>();
  return *all;
}

void* aligned(size_t size) {
  void* memory = nullptr;
  TORCH_CHECK(posix_memalign(&memory, PAGE, size) == 0, "the emulated device has no host memory left for ", size, " bytes");
  return memory;
}

void note_reserved() {
  auto& figures = memory_figures();
  figures.reserved = segments().reserved();
  figures.reserved_peak = std::max(figures.reserved_peak, figures.reserved);
}

// ------------------------------------------------------------------------------------------------ the device's

bool is_recorded(const void* start, Actor actor) { return blocks().at((uint64_t)start).recorded.count(actor) > 0; }

void free_on_device(void* memory) {
  if (!memory) return;
  {
    Lock lock(mutex());
    auto found = blocks().find((uint64_t)memory);
    Block& block = found->second;
    end_life(memory, block.size, block.stream, is_recorded);
    segments().give_back(block.piece);
    memory_figures().allocated -= block.counted;
    memory_figures().requested -= block.size;
    blocks().erase(found);
  }
  std::free(memory);
}

class DeviceAllocator final : public c10::DeviceAllocator {
 public:
  at::DataPtr allocate(size_t size) override {
    void* memory = size ? allocate_block(size) : nullptr;
    return {memory, memory, &free_on_device, at::Device(at::kCUDA, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_on_device; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    Lock lock(mutex());
    segments().release_unused();
    note_reserved();
  }
  void recordStream(const at::DataPtr& data, c10::Stream stream) override {
    Lock lock(mutex());
    if (auto found = blocks().find((uint64_t)data.get()); found != blocks().end()) {
      found->second.recorded.insert((Actor)stream.id());
    }
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return {}; }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override { reset_memory_peaks(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    auto& figures = memory_figures();
    return {figures.limit - figures.reserved, figures.limit};
  }

 private:
  static void* allocate_block(size_t size) {
    Lock lock(mutex());
    auto& figures = memory_figures();
    size_t counted = size;
    uint64_t piece = segments().take(counted, current_stream(), figures.limit);
    note_reserved();
    if (!piece) {
      throw c10::OutOfMemoryError(
          {__func__, __FILE__, (uint32_t)__LINE__},
          "CUDA out of memory. Tried to allocate " + std::to_string(size) + " bytes on the emulated device: " +
              std::to_string(figures.allocated) + " of " + std::to_string(figures.limit) + " are allocated");
    }
    void* memory = aligned(size);
    std::memset(memory, NAN_BYTE, size);
    blocks()[(uint64_t)memory] = Block{size, counted, (Actor)current_stream(), piece, {}};
    figures.requested += size;
    figures.requested_peak = std::max(figures.requested_peak, figures.requested);
    figures.allocated += counted;
    figures.allocated_peak = std::max(figures.allocated_peak, figures.allocated);
    begin_life(memory, size);
    return memory;
  }
};

// ------------------------------------------------------------------------------------------------ pinned

// Blocks of powers of two that are kept for reuse when they are freed. Only the account keeps them.
void count_pinned(size_t size) {
  auto& figures = memory_figures();
  figures.pinned += size;
  figures.pinned_peak = std::max(figures.pinned_peak, figures.pinned);
  figures.pinned_held_peak = std::max(figures.pinned_held_peak, figures.pinned_held);
}

void free_pinned(void* memory) {
  if (!memory) return;
  {
    Lock lock(mutex());
    auto found = pinned_blocks().find((uint64_t)memory);
    forget(memory, found->second);
    memory_figures().pinned -= found->second;
    kept_blocks()[found->second]++;
    pinned_blocks().erase(found);
  }
  std::free(memory);
}

class PinnedAllocator final : public at::HostAllocator {
 public:
  at::DataPtr allocate(size_t size) override {
    void* memory = size ? allocate_block(size) : nullptr;
    return {memory, memory, &free_pinned, at::Device(at::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {
    Lock lock(mutex());
    for (auto& [size, number] : kept_blocks()) memory_figures().pinned_held -= size * number;
    kept_blocks().clear();
  }
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override { reset_memory_peaks(); }

 private:
  static void* allocate_block(size_t wanted) {
    size_t size = 1;
    while (size < wanted) size *= 2;
    void* memory = aligned(std::max(size, PAGE));
    if (size <= MOST_FILLED) std::memset(memory, NAN_BYTE, size);
    Lock lock(mutex());
    if (auto kept = kept_blocks().find(size); kept != kept_blocks().end() && kept->second > 0) kept->second--;
    else memory_figures().pinned_held += size;
    pinned_blocks()[(uint64_t)memory] = size;
    count_pinned(size);
    return memory;
  }
};

}  // namespace

MemoryFigures& memory_figures() {
  static auto* all = new MemoryFigures();
  return *all;
}

void reset_memory_peaks() {
  Lock lock(mutex());
  auto& figures = memory_figures();
  figures.requested_peak = figures.requested;
  figures.allocated_peak = figures.allocated;
  figures.reserved_peak = figures.reserved;
  figures.pinned_peak = figures.pinned;
  figures.pinned_held_peak = figures.pinned_held;
  figures.registered_peak = figures.registered;
}

c10::DeviceAllocator* device_allocator() {
  static auto* one = new DeviceAllocator();
  return one;
}

at::HostAllocator* pinned_allocator() {
  static auto* one = new PinnedAllocator();
  return one;
}

bool is_pinned(const void* address) {
  Lock lock(mutex());
  auto next = pinned_blocks().upper_bound((uint64_t)address);
  if (next == pinned_blocks().begin()) return false;
  auto& [start, size] = *std::prev(next);
  return (uint64_t)address < start + size;
}

void pin(void* address, size_t size) {
  Lock lock(mutex());
  auto& figures = memory_figures();
  pinned_blocks()[(uint64_t)address] = size;
  figures.registered += size;
  figures.registered_peak = std::max(figures.registered_peak, figures.registered);
}

void unpin(void* address) {
  Lock lock(mutex());
  auto found = pinned_blocks().find((uint64_t)address);
  if (found == pinned_blocks().end()) return;
  forget(address, found->second);
  memory_figures().registered -= found->second;
  pinned_blocks().erase(found);
}

}  // namespace emulated
