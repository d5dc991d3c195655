// Who acts, and what each knows of the others: vector clocks of streams and host threads.
//
// Every actor counts its own actions. Its clock says, for each other actor, up to which action that one is known to be
// done. Launching a kernel hands the host's knowledge to the stream; events and waits hand it on from there.
#pragma once
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace emulated {

using Actor = int;  // a stream's id, or FIRST_HOST plus the number of a host thread
constexpr Actor FIRST_HOST = 512;
constexpr Actor MOST_ACTORS = 1024;

class Clock {
 public:
  uint32_t at(Actor actor) const { return actor < (int)times_.size() ? times_[actor] : 0; }
  void tick(Actor actor);
  void join(const Clock& other);

 private:
  std::vector<uint32_t> times_;
};

// One lock guards all state. It is recursive: an allocator may be called from within a kernel. No Python code runs while it
// is held, so it cannot deadlock with the interpreter's lock.
std::recursive_mutex& mutex();
using Lock = std::lock_guard<std::recursive_mutex>;

Clock& clock_of(Actor actor);
Clock& known_to_any_host();  // what at least one host thread has waited for

Actor this_thread();
void become_new_thread();
int64_t current_stream();
void set_current_stream(int64_t id);
int64_t new_stream();
int num_streams();

void launch();              // the current stream gets work: it knows what this host thread knows, and counts on
void act_on_host();         // this host thread counts on
void learn(const Clock&);   // this host thread has waited until all of that was done
int64_t take_snapshot();    // of what this thread knows, for another thread to join
void join_snapshot(int64_t number);
void forget_snapshot(int64_t number);

std::string name_of(Actor actor);

}  // namespace emulated
