// What Python calls, through ctypes: see library.py.
#include <map>
#include <string>

#include "actors.h"
#include "memory.h"
#include "races.h"
#include "records.h"

using namespace emulated;

extern "C" {

// ---------------------------------------------------------------------------------------------------- threads

void emulated_become_new_thread() { become_new_thread(); }
int64_t emulated_take_snapshot() { return take_snapshot(); }
void emulated_join_snapshot(int64_t number) { join_snapshot(number); }
void emulated_forget_snapshot(int64_t number) { forget_snapshot(number); }

// ---------------------------------------------------------------------------------------------------- accesses

// Of the host to pinned memory, past torch's operators; other memory is not watched.
void emulated_touch_on_host(void* start, size_t size, int is_write, const char* operation) {
  if (is_pinned(start)) {
    act_on_host();
    touch(this_thread(), start, size, is_write ? Access::WRITE : Access::READ, operation);
  }
  deliver();
}

// Of a kernel that is not torch's, on the current stream; the first access of each kernel launches it.
void emulated_launch(const char* kernel) {
  launch();
  Lock lock(mutex());
  figures().kernels++;
  count("kernel: " + std::string(kernel));
}

void emulated_touch_on_stream(void* start, size_t size, int is_write, const char* operation) {
  touch((Actor)current_stream(), start, size, is_write ? Access::WRITE : Access::READ, operation);
  deliver();
}

void emulated_watch(int is_on) { watch(is_on); }
void emulated_set_listener(Listener listener) { set_listener(listener); }

// ---------------------------------------------------------------------------------------------------- memory

void emulated_pin(void* address, size_t size) { pin(address, size); }
void emulated_unpin(void* address) { unpin(address); }
void emulated_empty_cache() { device_allocator()->emptyCache(); }
void emulated_empty_host_cache() { pinned_allocator()->empty_cache(); }
void emulated_reset_peaks() { reset_memory_peaks(); }

void emulated_set_limit(size_t limit) {
  Lock lock(mutex());
  memory_figures().limit = limit;
}

// ---------------------------------------------------------------------------------------------------- figures

int64_t emulated_figure(const char* name) {
  Lock lock(mutex());
  auto& memory = memory_figures();
  auto& all = figures();
  const std::map<std::string, int64_t> known = {
      {"requested", memory.requested},
      {"requested_peak", memory.requested_peak},
      {"allocated", memory.allocated},
      {"allocated_peak", memory.allocated_peak},
      {"reserved", memory.reserved},
      {"reserved_peak", memory.reserved_peak},
      {"limit", memory.limit},
      {"pinned", memory.pinned},
      {"pinned_peak", memory.pinned_peak},
      {"pinned_held", memory.pinned_held},
      {"pinned_held_peak", memory.pinned_held_peak},
      {"registered", memory.registered},
      {"registered_peak", memory.registered_peak},
      {"kernels", all.kernels},
      {"copies", all.copies},
      {"waits", all.waits},
      {"races", all.races},
      {"bytes_to_device", all.bytes_to_device},
      {"bytes_to_host", all.bytes_to_host},
  };
  auto found = known.find(name);
  return found == known.end() ? -1 : found->second;
}

void emulated_reset_counts() {
  Lock lock(mutex());
  counts().clear();
  figures() = Figures();
}

// One line each: the name, a tab, the number. The text is this function's until it is called again.
const char* emulated_counts() {
  static std::string text;
  Lock lock(mutex());
  text.clear();
  for (auto& [name, number] : counts()) text += name + "\t" + std::to_string(number) + "\n";
  return text.c_str();
}

}  // extern "C"
