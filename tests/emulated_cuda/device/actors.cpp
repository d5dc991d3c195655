#include "actors.h"

#include <algorithm>
#include <unordered_map>

namespace emulated {
namespace {

// Leaked on purpose, as all other state here: tensors are freed until the very end of the process.
std::vector<Clock>& clocks() {
  static auto* all = new std::vector<Clock>(MOST_ACTORS);
  return *all;
}

std::unordered_map<int64_t, Clock>& snapshots() {
  static auto* all = new std::unordered_map<int64_t, Clock>();
  return *all;
}

int64_t next_snapshot = 1;
int next_stream = 1;  // 0 is the default stream
int next_host = FIRST_HOST + 1;
thread_local Actor thread_actor = FIRST_HOST;
thread_local int64_t thread_stream = 0;

}  // namespace

void Clock::tick(Actor actor) {
  if ((int)times_.size() <= actor) times_.resize(actor + 1);
  ++times_[actor];
}

void Clock::join(const Clock& other) {
  if (times_.size() < other.times_.size()) times_.resize(other.times_.size());
  for (size_t i = 0; i < other.times_.size(); i++) times_[i] = std::max(times_[i], other.times_[i]);
}

std::recursive_mutex& mutex() {
  static auto* one = new std::recursive_mutex();
  return *one;
}

Clock& clock_of(Actor actor) { return clocks()[actor]; }

Clock& known_to_any_host() {
  static auto* clock = new Clock();
  return *clock;
}

Actor this_thread() { return thread_actor; }

// Numbers are reused when all are taken. Actors that share one look ordered, so a race between them would be missed.
void become_new_thread() {
  Lock lock(mutex());
  if (next_host == MOST_ACTORS) next_host = FIRST_HOST + 1;
  thread_actor = next_host++;
}

int64_t current_stream() { return thread_stream; }

void set_current_stream(int64_t id) { thread_stream = id; }

int64_t new_stream() {
  Lock lock(mutex());
  return 1 + (next_stream++ - 1) % (FIRST_HOST - 1);
}

int num_streams() { return std::min(next_stream, (int)FIRST_HOST); }

void launch() {
  Lock lock(mutex());
  Clock& clock = clock_of(thread_stream);
  clock.join(clock_of(thread_actor));
  clock.tick(thread_stream);
}

void act_on_host() {
  Lock lock(mutex());
  clock_of(thread_actor).tick(thread_actor);
}

void learn(const Clock& clock) {
  clock_of(thread_actor).join(clock);
  known_to_any_host().join(clock);
}

int64_t take_snapshot() {
  Lock lock(mutex());
  act_on_host();
  snapshots()[next_snapshot] = clock_of(thread_actor);
  return next_snapshot++;
}

void join_snapshot(int64_t number) {
  Lock lock(mutex());
  if (auto found = snapshots().find(number); found != snapshots().end()) clock_of(thread_actor).join(found->second);
}

void forget_snapshot(int64_t number) {
  Lock lock(mutex());
  snapshots().erase(number);
}

std::string name_of(Actor actor) {
  if (actor == 0) return "the default stream";
  return actor < FIRST_HOST ? "stream " + std::to_string(actor) : "host thread " + std::to_string(actor - FIRST_HOST);
}

}  // namespace emulated
