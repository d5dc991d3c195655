// How torch's caching allocator cuts a card's memory: an account of addresses alone, the bytes are elsewhere.
//
// Small blocks (up to 1 MiB) come from segments of 2 MiB, larger ones from segments of 20 MiB, the largest (from 10 MiB) get
// one of their own. The smallest free piece that is large enough is taken, and cut if enough is left over; what is not cut
// off counts as allocated. Source: c10/cuda/CUDACachingAllocator.cpp.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <tuple>

namespace emulated {

class Segments {
 public:
  // Returns a piece's address, or 0 where the limit leaves no room. `size` becomes what counts as allocated.
  uint64_t take(size_t& size, int64_t stream, size_t limit);
  void give_back(uint64_t address);
  void release_unused();  // segments without a block in use
  size_t reserved() const { return reserved_; }

 private:
  struct Piece {
    size_t size;
    uint64_t segment;
    int64_t stream;
    bool is_small, is_free;
  };
  using Key = std::tuple<bool, int64_t, size_t, uint64_t>;  // small, stream, size, address

  Key key_of(uint64_t address) const;
  bool reserve(size_t size, bool is_small, int64_t stream, size_t limit);
  void cut(uint64_t address, size_t size);
  void join_with_next(uint64_t address);

  std::map<uint64_t, Piece> pieces_;
  std::map<uint64_t, size_t> segments_;
  std::set<Key> free_;
  uint64_t next_segment_ = 1;
  size_t reserved_ = 0;
};

}  // namespace emulated
