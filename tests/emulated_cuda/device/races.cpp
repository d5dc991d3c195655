#include "races.h"

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "records.h"

namespace emulated {
namespace {

constexpr int PAGE_BITS = 12;
constexpr uint64_t PAGE = 1 << PAGE_BITS;

// Bytes of one page, from `first` up to `last`.
struct Stretch {
  uint16_t first, last;

  bool overlaps(const Stretch& other) const { return first <= other.last && other.first <= last; }
  bool covers(const Stretch& other) const { return first <= other.first && other.last <= last; }
};

constexpr Stretch WHOLE_PAGE{0, PAGE - 1};

struct Event {
  Actor actor;
  uint32_t time;
  int operation;
  Access access;
  Stretch stretch;
};

// What was done to a page, as far as later accesses may race with it. Most pages are used as a whole, and hold few events.
using Page = std::vector<Event>;

std::unordered_map<uint64_t, Page>& pages() {
  static auto* all = new std::unordered_map<uint64_t, Page>();
  return *all;
}

struct Operations {
  std::vector<std::string> names;
  std::unordered_map<std::string, int> numbers;

  int number(const std::string& name) {
    auto [found, is_new] = numbers.try_emplace(name, (int)names.size());
    if (is_new) names.push_back(name);
    return found->second;
  }
};

Operations& operations() {
  static auto* all = new Operations();
  return *all;
}

bool is_watching = true;

// The pages of [start, start + size).
struct Span {
  uint64_t start, end, first, last;
  Span(const void* from, size_t size)
      : start((uint64_t)from), end(start + size), first(start >> PAGE_BITS), last((end - 1) >> PAGE_BITS) {}

  Stretch within(uint64_t page) const {
    uint64_t begin = page << PAGE_BITS;
    return {(uint16_t)(std::max(start, begin) - begin), (uint16_t)(std::min(end, begin + PAGE) - begin - 1)};
  }
};

bool is_before(const Event& event, const Clock& clock) {
  return event.time <= clock.at(event.actor);
}

void report_race(const char* what, const Event& before, Actor actor, const std::string& operation) {
  figures().races++;
  report("race", std::string(what) + ": " + operation + " on " + name_of(actor) + " is not ordered after " +
                     operations().names[before.operation] + " on " + name_of(before.actor));
}

const char* kind_of(Access before, Access now) {
  if (before == Access::READ) return "write after read";
  return now == Access::WRITE ? "write after write" : "read after write";
}

// Find an earlier event that the new one is not ordered after.
const Event* find_race(const Page& page, const Event& event, const Clock& clock) {
  for (auto& before : page) {
    bool are_reads = before.access == Access::READ && event.access == Access::READ;
    if (before.actor == event.actor || are_reads || !before.stretch.overlaps(event.stretch)) continue;
    if (!is_before(before, clock)) return &before;
  }
  return nullptr;
}

// Whatever races with an event that a write covers races with that write as well.
void remember(Page& page, const Event& event) {
  auto is_outdated = [&](const Event& before) {
    bool is_like = before.actor == event.actor && before.access == Access::READ;
    return event.stretch.covers(before.stretch) && (event.access == Access::WRITE || is_like);
  };
  page.erase(std::remove_if(page.begin(), page.end(), is_outdated), page.end());
  page.push_back(event);
}

}  // namespace

void watch(bool is_on) {
  Lock lock(mutex());
  is_watching = is_on;
}

void touch(Actor actor, const void* start, size_t size, Access access, const std::string& operation) {
  if (!is_watching || size == 0) return;
  Lock lock(mutex());
  const Clock& clock = clock_of(actor);
  Event event{actor, clock.at(actor), operations().number(operation), access, WHOLE_PAGE};
  bool is_reported = false;
  Span span(start, size);
  for (uint64_t number = span.first; number <= span.last; number++) {
    Page& page = pages()[number];
    event.stretch = span.within(number);
    if (const Event* before = is_reported ? nullptr : find_race(page, event, clock)) {
      report_race(kind_of(before->access, access), *before, actor, operation);
      is_reported = true;
    }
    remember(page, event);
  }
}

void begin_life(const void* start, size_t size) {
  Lock lock(mutex());
  if (!is_watching) return;
  Actor stream = current_stream();
  launch();  // an event that was recorded before does not cover it
  Event event{stream, clock_of(stream).at(stream), operations().number("what held this memory before"), Access::WRITE,
              WHOLE_PAGE};
  Span span(start, size);
  for (uint64_t number = span.first; number <= span.last; number++) pages()[number] = {event};
}

void end_life(const void* start, size_t size, Actor stream, bool (*is_recorded)(const void*, Actor)) {
  Lock lock(mutex());
  bool is_reported = false;
  auto check = [&](const Event& event) {
    if (is_reported || !is_watching || event.actor == stream || event.actor >= FIRST_HOST) return;
    if (is_before(event, clock_of(stream)) || is_before(event, known_to_any_host())) return;
    if (is_recorded(start, event.actor)) return;
    report_race("freed while in use", event, stream, "free");
    is_reported = true;
  };
  Span span(start, size);
  for (uint64_t number = span.first; number <= span.last; number++) {
    auto found = pages().find(number);
    if (found == pages().end()) continue;
    for (auto& event : found->second) check(event);
    pages().erase(found);
  }
}

void forget(const void* start, size_t size) {
  Lock lock(mutex());
  Span span(start, size);
  for (uint64_t number = span.first; number <= span.last; number++) pages().erase(number);
}

}  // namespace emulated
