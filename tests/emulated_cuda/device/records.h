// What happened: counters by name, and messages for Python, which knows the line of the program.
#pragma once
#include <cstdint>
#include <map>
#include <string>

namespace emulated {

struct Figures {
  int64_t kernels = 0, copies = 0, waits = 0, races = 0, bytes_to_device = 0, bytes_to_host = 0;
};

using Listener = void (*)(const char* kind, const char* text);

Figures& figures();
std::map<std::string, int64_t>& counts();
void count(const std::string& name);

// A message waits until no lock is held and no kernel runs; `deliver` then hands all of this thread's to the listener.
void report(const char* kind, const std::string& text);
void deliver();
void set_listener(Listener listener);

void wait_for_current_stream(const std::string& reason);  // this host thread does, and it is reported
void record_wait(const std::string& reason);              // of any kind

// Code of a kernel of ours: operators within are neither the program's own accesses nor kernels. Messages wait meanwhile.
class InsideKernel {
 public:
  InsideKernel() { ++depth_; }
  ~InsideKernel() { --depth_; }
  static bool here() { return depth_ > 0; }

 private:
  static thread_local int depth_;
};

}  // namespace emulated
