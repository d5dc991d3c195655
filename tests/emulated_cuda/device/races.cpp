#include "races.h"

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "records.h"

namespace emulated {
namespace {

constexpr int PAGE_BITS = 12;

struct Event {
  Actor actor = NOBODY;
  uint32_t time = 0;
  int operation = 0;
};

struct Page {
  Event writer;
  std::vector<Event> readers;  // since then, the last of each actor
};

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

struct Span {
  uint64_t first, last;
  Span(const void* start, size_t size)
      : first((uint64_t)start >> PAGE_BITS), last(((uint64_t)start + size - 1) >> PAGE_BITS) {}
};

bool is_before(const Event& event, const Clock& clock) {
  return event.actor == NOBODY || event.time <= clock.at(event.actor);
}

void report_race(const char* what, const Event& before, Actor actor, const std::string& operation) {
  figures().races++;
  report("race", std::string(what) + ": " + operation + " on " + name_of(actor) + " is not ordered after " +
                     operations().names[before.operation] + " on " + name_of(before.actor));
}

// Find an earlier event that the access is not ordered after, and say what the two are.
const char* find_race(const Page& page, Actor actor, Access access, const Clock& clock, Event& found) {
  auto races = [&](const Event& event) {
    if (event.actor == actor || is_before(event, clock)) return false;
    found = event;
    return true;
  };
  if (races(page.writer)) return access == Access::WRITE ? "write after write" : "read after write";
  if (access == Access::WRITE && std::any_of(page.readers.begin(), page.readers.end(), races)) return "write after read";
  return nullptr;
}

void remember(Page& page, const Event& event, Access access) {
  if (access == Access::WRITE) {
    page.writer = event;
    page.readers.clear();
    return;
  }
  for (auto& reader : page.readers) {
    if (reader.actor == event.actor) {
      reader = event;
      return;
    }
  }
  page.readers.push_back(event);
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
  Event event{actor, clock.at(actor), operations().number(operation)}, before;
  bool is_reported = false;
  Span span(start, size);
  for (uint64_t number = span.first; number <= span.last; number++) {
    Page& page = pages()[number];
    if (!is_reported) {
      if (const char* what = find_race(page, actor, access, clock, before)) {
        report_race(what, before, actor, operation);
        is_reported = true;
      }
    }
    remember(page, event, access);
  }
}

void begin_life(const void* start, size_t size) {
  Lock lock(mutex());
  if (!is_watching) return;
  Actor stream = current_stream();
  launch();  // an event that was recorded before does not cover it
  Event event{stream, clock_of(stream).at(stream), operations().number("what held this memory before")};
  Span span(start, size);
  for (uint64_t number = span.first; number <= span.last; number++) pages()[number] = Page{event, {}};
}

void end_life(const void* start, size_t size, Actor stream, bool (*is_recorded)(const void*, Actor)) {
  Lock lock(mutex());
  bool is_reported = false;
  auto check = [&](const Event& event) {
    if (is_reported || !is_watching || event.actor == NOBODY || event.actor == stream || event.actor >= FIRST_HOST) return;
    if (is_before(event, clock_of(stream)) || is_before(event, known_to_any_host())) return;
    if (is_recorded(start, event.actor)) return;
    report_race("freed while in use", event, stream, "free");
    is_reported = true;
  };
  Span span(start, size);
  for (uint64_t number = span.first; number <= span.last; number++) {
    auto found = pages().find(number);
    if (found == pages().end()) continue;
    check(found->second.writer);
    for (auto& reader : found->second.readers) check(reader);
    pages().erase(found);
  }
}

void forget(const void* start, size_t size) {
  Lock lock(mutex());
  Span span(start, size);
  for (uint64_t number = span.first; number <= span.last; number++) pages().erase(number);
}

}  // namespace emulated
