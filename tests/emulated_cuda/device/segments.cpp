#include "segments.h"

#include <iterator>
#include <vector>

namespace emulated {
namespace {

constexpr size_t MIB = 1 << 20;
constexpr size_t BLOCK = 512;
constexpr size_t MOST_SMALL = MIB;
constexpr size_t OWN_SEGMENT = 10 * MIB;

size_t rounded_up(size_t size, size_t multiple) { return (size + multiple - 1) / multiple * multiple; }

size_t segment_size(size_t size) {
  if (size <= MOST_SMALL) return 2 * MIB;
  return size < OWN_SEGMENT ? 20 * MIB : rounded_up(size, 2 * MIB);
}

}  // namespace

Segments::Key Segments::key_of(uint64_t address) const {
  const Piece& piece = pieces_.at(address);
  return {piece.is_small, piece.stream, piece.size, address};
}

uint64_t Segments::take(size_t& size, int64_t stream, size_t limit) {
  size = rounded_up(size, BLOCK);
  bool is_small = size <= MOST_SMALL;
  auto smallest = [&] {
    auto found = free_.lower_bound({is_small, stream, size, 0});
    bool fits = found != free_.end() && std::get<0>(*found) == is_small && std::get<1>(*found) == stream;
    return fits ? found : free_.end();
  };
  if (smallest() == free_.end() && !reserve(size, is_small, stream, limit)) return 0;
  auto found = smallest();
  uint64_t address = std::get<3>(*found);
  free_.erase(found);
  Piece& piece = pieces_.at(address);
  piece.is_free = false;
  size_t left = piece.size - size;
  if (is_small ? left >= BLOCK : left > MOST_SMALL) cut(address, size);
  size = piece.size;
  return address;
}

bool Segments::reserve(size_t size, bool is_small, int64_t stream, size_t limit) {
  size_t total = segment_size(size);
  if (reserved_ + total > limit) release_unused();
  if (reserved_ + total > limit) return false;
  uint64_t address = next_segment_++ << 44;  // more than a segment apart
  segments_[address] = total;
  pieces_[address] = {total, address, stream, is_small, true};
  free_.insert(key_of(address));
  reserved_ += total;
  return true;
}

void Segments::cut(uint64_t address, size_t size) {
  Piece& piece = pieces_.at(address);
  Piece rest = piece;
  rest.size -= size;
  rest.is_free = true;
  piece.size = size;
  pieces_[address + size] = rest;
  free_.insert(key_of(address + size));
}

// Two free neighbours of a segment become one piece.
void Segments::join_with_next(uint64_t address) {
  auto piece = pieces_.find(address), next = std::next(piece);
  bool are_joined = next != pieces_.end() && piece->second.is_free && next->second.is_free &&
                    piece->second.segment == next->second.segment;
  if (!are_joined) return;
  free_.erase(key_of(address));
  free_.erase(key_of(next->first));
  piece->second.size += next->second.size;
  pieces_.erase(next);
  free_.insert(key_of(address));
}

void Segments::give_back(uint64_t address) {
  pieces_.at(address).is_free = true;
  free_.insert(key_of(address));
  join_with_next(address);
  if (auto piece = pieces_.find(address); piece != pieces_.begin()) join_with_next(std::prev(piece)->first);
}

void Segments::release_unused() {
  std::vector<uint64_t> unused;
  for (auto& [address, size] : segments_) {
    const Piece& first = pieces_.at(address);
    if (first.is_free && first.size == size) unused.push_back(address);
  }
  for (uint64_t address : unused) {
    free_.erase(key_of(address));
    pieces_.erase(address);
    reserved_ -= segments_.at(address);
    segments_.erase(address);
  }
}

}  // namespace emulated
