#include "records.h"

#include <cstdio>
#include <vector>

#include "actors.h"

namespace emulated {
namespace {

struct Message {
  const char* kind;
  std::string text;
};

thread_local std::vector<Message> waiting;
Listener listener = nullptr;

}  // namespace

thread_local int InsideKernel::depth_ = 0;

Figures& figures() {
  static auto* all = new Figures();
  return *all;
}

std::map<std::string, int64_t>& counts() {
  static auto* all = new std::map<std::string, int64_t>();
  return *all;
}

void count(const std::string& name) {
  Lock lock(mutex());
  counts()[name]++;
}

void report(const char* kind, const std::string& text) { waiting.push_back({kind, text}); }

void deliver() {
  if (waiting.empty() || InsideKernel::here()) return;
  std::vector<Message> messages;
  messages.swap(waiting);
  for (auto& message : messages) {
    if (listener) listener(message.kind, message.text.c_str());
    else std::fprintf(stderr, "emulated CUDA: %s: %s\n", message.kind, message.text.c_str());
  }
}

void set_listener(Listener new_listener) { listener = new_listener; }

void record_wait(const std::string& reason) {
  Lock lock(mutex());
  figures().waits++;
  counts()["wait: " + reason]++;
  report("wait", reason);
}

void wait_for_current_stream(const std::string& reason) {
  Lock lock(mutex());
  learn(clock_of(current_stream()));
  record_wait(reason);
}

}  // namespace emulated
