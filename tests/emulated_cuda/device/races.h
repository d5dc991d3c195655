// The race detector: every access to memory is checked against those of other actors that it is not ordered after.
//
// Kernels run at once, so a race never spoils a result here. The detector finds it all the same, in any run of the code.
// Each page of memory remembers who wrote which of its bytes last, and who has read them since.
#pragma once
#include <cstddef>
#include <string>

#include "actors.h"

namespace emulated {

enum class Access { READ, WRITE };

// An actor reads or writes [start, start + size). A race is reported once per call.
void touch(Actor actor, const void* start, size_t size, Access access, const std::string& operation);

// Memory is handed out to a stream, as if that stream wrote it: what held it before may still be used by this stream alone.
void begin_life(const void* start, size_t size);

// Memory of a stream is freed: work of other streams on it must be done, unless the tensor was recorded on them. A host
// thread that has waited for the work counts, even if another thread frees: the last reference decides, and references
// are handed over in order.
void end_life(const void* start, size_t size, Actor stream, bool (*is_recorded)(const void* start, Actor actor));

void forget(const void* start, size_t size);  // what happened there
void watch(bool is_on);

}  // namespace emulated
